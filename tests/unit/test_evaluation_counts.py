"""Slices, cardinality classes and merging of counts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from kgray.evaluation.counts import CARDINALITIES, Counts, Strata, merge, metrics_of
from kgray.evaluation.ranking import Ranks, rank_triples
from kgray.graph.filter_index import FilterIndex


class RandomScorer:
    num_entities, num_relations = 40, 5

    def score_tails(self, heads: torch.Tensor, relations: torch.Tensor) -> torch.Tensor:
        rows = heads * 7 + relations
        return torch.stack([torch.randn(40, generator=torch.Generator().manual_seed(int(x))) for x in rows])

    def score_heads(self, relations: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        return self.score_tails(tails, relations + 100)

    def score_relations(self, heads: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        return self.score_tails(heads, tails)[:, :5]


def test_cardinality_by_the_threshold_of_one_and_a_half() -> None:
    one_to_one = [[0, 0, 1], [2, 0, 3], [4, 0, 5], [4, 0, 6]]  # 4/3 tails a head
    one_to_many = [[0, 1, 1], [0, 1, 2], [3, 1, 4]]  # exactly 1.5 tails a head
    many_to_one = [[1, 2, 0], [2, 2, 0], [3, 2, 0]]
    many_to_many = [[a, 3, b] for a in range(3) for b in range(3)]
    train = np.array(one_to_one + one_to_many + many_to_one + many_to_many)
    twice = np.concatenate([train, train])  # duplicates do not count
    strata = Strata.of(twice, 8, 5)
    assert [CARDINALITIES[c] for c in strata.cardinality] == ["1-1", "1-N", "N-1", "N-N", "untrained"]
    assert strata.seen.tolist() == [True] * 7 + [False]


def test_slices_are_the_metrics_of_their_queries() -> None:
    draw = np.random.default_rng(0)
    triples = np.stack([draw.integers(0, 40, 200), draw.integers(0, 5, 200), draw.integers(0, 40, 200)], 1)
    train = triples[(triples[:, 0] < 30) & (triples[:, 2] < 30) & (triples[:, 1] < 4)][:60]
    strata = Strata.of(train, 40, 5)
    batches: list[Ranks] = []
    counts = rank_triples(
        RandomScorer(),
        triples,
        FilterIndex.build(triples, 40, 5),
        split="test",
        train=FilterIndex.build(train, 40, 5),
        batch_size=33,
        on_ranks=batches.append,
    )
    slices = counts.slices(["a", "b", "c", "d", "e"])
    assert list(slices) == ["both", "tail", "head", "relation"]
    for side, by in slices.items():
        mine = [b for b in batches if b.side == side or (side == "both" and b.side in ("tail", "head"))]
        queries = np.concatenate([b.triples for b in mine])
        inverse = 1 / np.concatenate([b.realistic for b in mine])
        unseen = ~(strata.seen[queries[:, 0]] & strata.seen[queries[:, 2]])
        classes = strata.cardinality[queries[:, 1]]
        masks = {
            ("entities", "seen"): ~unseen,
            ("entities", "unseen"): unseen,
            **{("relation", "abcde"[r]): queries[:, 1] == r for r in range(5)},
            **{("cardinality", name): classes == c for c, name in enumerate(CARDINALITIES)},
        }
        for (dimension, value), mask in masks.items():
            if not mask.any():
                assert value not in by[dimension]
                continue
            assert by[dimension][value]["count"] == mask.sum()
            assert by[dimension][value]["mrr"] == pytest.approx(inverse[mask].mean(), abs=1e-12)
        assert sum(row["count"] for row in by["entities"].values()) == len(queries)


def test_names_carry_the_protocol_and_json_is_plain() -> None:
    triples = np.array([[0, 1, 2], [3, 4, 5]])
    counts = rank_triples(RandomScorer(), triples, None, split="valid", tasks=["tail", "head"])
    names = counts.metrics()
    assert "valid.both.realistic.raw.full.mrr" in names
    assert "valid.head.realistic.raw.full.hits@10" in names
    assert not any("relation" in name for name in names)
    assert "cardinality" not in counts.slices()["both"]
    text = json.dumps(counts.to_json())
    assert Counts.from_json(json.loads(text)).metrics() == names
    assert len(json.loads(text)["tables"]["tail"]["relations"]) == 2


def test_what_does_not_belong_together_is_not_merged() -> None:
    base = Counts("test", True, 3)
    for other in (Counts("valid", True, 3), Counts("test", False, 3), Counts("test", True, 4)):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge([base, other])
    with pytest.raises(ValueError, match="cannot be merged"):
        base + Counts("test", True, 3, np.zeros(3, dtype=np.int8))
    with pytest.raises(ValueError, match="no counts"):
        merge([])
    with pytest.raises(ValueError, match="another version"):
        Counts.from_json({**base.to_json(), "columns": ["count"]})


def test_nothing_ranked_gives_a_count_of_nought() -> None:
    counts = rank_triples(RandomScorer(), np.zeros((0, 3), dtype=np.int64), None, split="test")
    assert counts.metrics() == {}
    assert metrics_of(np.zeros(21, dtype=np.int64)) == {"count": 0.0}
