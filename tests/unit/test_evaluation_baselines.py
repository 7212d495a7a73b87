"""Baselines against plain counting, and against numbers measured elsewhere."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from kgray.evaluation.baselines import BASELINES, InverseRule
from kgray.evaluation.config import EvaluateConfig
from kgray.evaluation.counts import Counts, distinct_triples
from kgray.evaluation.ranking import filter_splits, rank_triples
from kgray.evaluation.shards import prepare
from kgray.graph.filter_index import FilterIndex
from kgray.graph.graph import Graph

N, R = 12, 4


@pytest.fixture()
def train() -> np.ndarray:
    draw = np.random.default_rng(4)
    return np.stack([draw.integers(0, N - 1, 70), draw.integers(0, R - 1, 70), draw.integers(0, N - 1, 70)], 1)


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij")
    return a.flatten(), b.flatten()


def queries() -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.meshgrid(torch.arange(N), torch.arange(R), indexing="ij")
    return a.flatten(), b.flatten()


def test_distinct_triples_are_sorted_and_single() -> None:
    rows = np.array([[2, 0, 1], [0, 1, 1], [2, 0, 1], [0, 0, 5]], dtype=np.int32)
    assert distinct_triples(rows).tolist() == [[0, 0, 5], [0, 1, 1], [2, 0, 1]]
    assert distinct_triples(np.zeros((0, 3))).shape == (0, 3)


def test_frequency_counts_distinct_training_triples(train: np.ndarray) -> None:
    scorer = BASELINES["relation_frequency"].scorer(np.concatenate([train, train]), N, R)
    facts = {tuple(row) for row in train.tolist()}
    h, r = queries()
    tails, heads = scorer.score_tails(h, r), scorer.score_heads(r, h)
    assert tails.shape == heads.shape == (N * R, N)
    for row, relation in enumerate(r.tolist()):
        assert tails[row].tolist() == [sum(y == relation and z == e for _, y, z in facts) for e in range(N)]
        assert heads[row].tolist() == [sum(y == relation and x == e for x, y, _ in facts) for e in range(N)]
    relations = scorer.score_relations(*pairs())
    assert relations.shape == (N * N, R)
    assert relations[5].tolist() == [sum(y == r for _, y, _ in facts) for r in range(R)]


def test_inverse_rule_equals_plain_loops(train: np.ndarray) -> None:
    facts = {tuple(row) for row in train.tolist()}
    of = [sum(y == r for _, y, _ in facts) for r in range(R)]
    confidence = [
        [sum((z, r, x) in facts for x, y, z in facts if y == s) / max(of[s], 1) for r in range(R)] for s in range(R)
    ]

    def best(x: int, r: int, y: int) -> float:
        return max((confidence[s][r] for s in range(R) if (y, s, x) in facts), default=0.0)

    scorer = BASELINES["inverse_rule"].scorer(train, N, R)
    assert isinstance(scorer, InverseRule)
    h, r = queries()
    tails, heads = scorer.score_tails(h, r), scorer.score_heads(r, h)
    for row, (entity, relation) in enumerate(zip(h.tolist(), r.tolist(), strict=True)):
        sources = max(len({x for x, y, _ in facts if y == relation}), 1)
        targets = max(len({z for _, y, z in facts if y == relation}), 1)
        for e in range(N):
            share = sum(y == relation and z == e for _, y, z in facts) / sources
            assert tails[row, e] == pytest.approx(best(entity, relation, e) + share, abs=1e-6)
            share = sum(y == relation and x == e for x, y, _ in facts) / targets
            assert heads[row, e] == pytest.approx(best(e, relation, entity) + share, abs=1e-6)
    a, b = pairs()
    plain = BASELINES["marginals"].scorer(train, N, R).score_relations(a, b).numpy()
    ruled = scorer.score_relations(a, b).numpy()
    for row, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        for relation in range(R):
            assert ruled[row, relation] == pytest.approx(plain[row, relation] + best(x, relation, y), abs=1e-6)


def test_marginals_are_a_distribution_and_follow_the_counts() -> None:
    train = np.array([[0, 0, 1], [0, 0, 2], [3, 1, 1], [4, 1, 1], [5, 2, 6]])
    scorer = BASELINES["marginals"].scorer(train, N, R)
    scores = scorer.score_relations(*pairs())
    assert torch.allclose(scores.sum(dim=1), torch.ones(N * N), atol=1e-5)
    assert int(scores[5 * N + 6].argmax()) == 2
    assert int(scores[3 * N + 1].argmax()) == 1
    assert torch.isfinite(scores).all()


def test_baselines_know_nothing_when_training_is_empty() -> None:
    test = np.array([[0, 0, 1], [2, 1, 3]])
    known = FilterIndex.build(test, N, R)
    for baseline in BASELINES.values():
        scorer = baseline.scorer(np.zeros((0, 3), dtype=np.int64), N, R)
        counts = rank_triples(scorer, test, known, split="test", tasks=baseline.tasks)
        for side in baseline.tasks:
            assert counts.metrics()[counts.key(side) + ".amri"] == pytest.approx(0.0)


def load(folder: Path) -> tuple[dict[str, np.ndarray], int, int]:
    entities: dict[str, int] = {}
    relations: dict[str, int] = {}
    splits = {}
    for split in ("train", "valid", "test"):
        with gzip.open(folder / f"{split}.tsv.gz", "rt", encoding="utf-8") as lines:
            rows = [line.rstrip("\n").split("\t") for line in lines]
        splits[split] = np.array(
            [
                (entities.setdefault(h, len(entities)), relations.setdefault(r, len(relations)), t)
                for h, r, t in ((h, r, entities.setdefault(t, len(entities))) for h, r, t in rows)
            ]
        )
    return splits, len(entities), len(relations)


def measure(name: str, splits: dict[str, np.ndarray], n: int, r: int, tasks: tuple[str, ...]) -> Counts:
    known = Graph.from_arrays(splits, n, r).known(filter_splits("test"))
    return rank_triples(BASELINES[name].scorer(splits["train"], n, r), splits["test"], known, split="test", tasks=tasks)


@pytest.mark.slow  # needs the shared data, which the README's two commands do without
def test_real_data_gives_the_numbers_measured_independently(data_root: Path) -> None:
    """sota.md 1.7 and 4: majority relation and frequency baseline exactly; of the others, lower bounds."""
    splits, n, r = load(data_root / "fb15k-237")
    both = measure("relation_frequency", splits, n, r, ("tail", "head"))
    assert both.metrics()["test.both.realistic.filtered.full.mrr"] == pytest.approx(0.233, abs=6e-4)
    marginals = measure("marginals", splits, n, r, ("relation",))
    assert marginals.metrics()["test.relation.realistic.filtered.full.hits@1"] > 0.828
    splits, n, r = load(data_root / "wn18rr")
    majority = measure("relation_frequency", splits, n, r, ("relation",))
    hits = majority.metrics()["test.relation.realistic.filtered.full.hits@1"]
    assert hits == pytest.approx(0.399, abs=6e-4)
    marginals = measure("marginals", splits, n, r, ("relation",))
    assert marginals.metrics()["test.relation.realistic.filtered.full.mrr"] >= 0.811
    rule = measure("inverse_rule", splits, n, r, ("relation",))
    assert rule.metrics()["test.relation.realistic.filtered.full.mrr"] >= 0.884


def test_of_entities_held_out_the_support_edges_count_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entity 4 is in no training triple; that 1 likes it is support, and liking is mutual in training."""
    train = np.array([[0, 0, 1], [1, 0, 0], [2, 0, 3], [3, 0, 2]])
    graph = Graph.from_arrays({"train": train, "support": np.array([[1, 0, 4]])}, 5, 1)
    monkeypatch.setattr("kgray.evaluation.shards.Graph.load", lambda _: graph)
    prepared = prepare(None, EvaluateConfig())  # type: ignore[arg-type]
    scores = prepared.baselines["inverse_rule"].score_tails(torch.tensor([4]), torch.tensor([0]))
    assert scores.argmax() == 1
