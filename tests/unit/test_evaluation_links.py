"""Links against pairs without one: negatives are what they say, figures are those of the slow definitions.

python3 -m pytest tests/unit/test_evaluation_links.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kgray.evaluation.links import AdamicAdar, CommonNeighbours, LinkScores, adjacency, draw_negatives
from kgray.evaluation.ranking import Scored, rank_triples
from kgray.graph.filter_index import FilterIndex

N = 40


def social(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(train, test) edges of one relation."""
    generator = np.random.default_rng(seed)
    pairs = np.unique(np.sort(generator.integers(0, N, (160, 2)), axis=1), axis=0)
    pairs = generator.permutation(pairs[pairs[:, 0] != pairs[:, 1]])
    triples = np.insert(pairs, 1, 0, axis=1)
    return triples[20:], triples[:20]


def seen(batch_size: int, count: int = 3) -> list[tuple[Scored, dict[str, tuple[np.ndarray, np.ndarray]]]]:
    train, test = social()
    near, found = adjacency(train, N), []
    known = FilterIndex.build(np.concatenate([train, test]), N, 1)
    rank_triples(
        CommonNeighbours(train, N, 1),
        test,
        known,
        split="test",
        tasks=("tail", "head"),
        batch_size=batch_size,
        on_scores=lambda scored: found.append((scored, draw_negatives(scored, near, count))),
    )
    return found


def test_negatives_are_no_links_and_hard_ones_are_two_hops_away() -> None:
    train, test = social()
    near = adjacency(train, N).toarray() > 0
    links = {tuple(pair) for pair in np.concatenate([train, test])[:, [0, 2]].tolist()}
    for scored, negatives in seen(7):
        entity = scored.triples[:, 0] if scored.side == "tail" else scored.triples[:, 2]
        for kind, (rows, ids) in negatives.items():
            drawn = list(zip(rows.tolist(), ids.tolist(), strict=True))
            assert len(set(drawn)) == len(drawn)
            assert max(np.bincount(rows), default=0) <= 3
            for row, other in drawn:
                one = int(entity[row])
                assert other != one
                assert ((one, other) if scored.side == "tail" else (other, one)) not in links
                if kind == "hard":
                    assert (near[one] & near[other]).any()
        assert len(negatives["uniform"][0]) == 3 * len(scored.triples)


def test_the_same_negatives_however_queries_are_cut_into_batches() -> None:
    def whole(batch_size: int) -> set[tuple[object, ...]]:
        return {
            (scored.side, kind, *scored.triples[row].tolist(), other)
            for scored, negatives in seen(batch_size)
            for kind, (rows, ids) in negatives.items()
            for row, other in zip(rows.tolist(), ids.tolist(), strict=True)
        }

    assert whole(1) == whole(64)


def test_a_lone_entity_has_no_hard_negatives() -> None:
    triples = np.array([[0, 0, 1]])
    scored = Scored("tail", triples, torch.zeros(1, 5), torch.tensor([1]), None)
    for train in (triples[:0], np.array([[2, 0, 3]])):
        negatives = draw_negatives(scored, adjacency(train, 5), 4)
        assert len(negatives["hard"][0]) == 0
        assert set(negatives["uniform"][1].tolist()) <= {2, 3, 4}


@pytest.mark.parametrize("ties", [False, True])
def test_figures_are_those_of_the_definitions_and_of_any_shards(ties: bool) -> None:
    generator = np.random.default_rng(1)
    scores = generator.normal(size=(30, 10)).astype(np.float32)
    if ties:
        scores = np.round(scores)
    gold = torch.zeros(30, dtype=torch.int64)
    rows, columns = np.repeat(np.arange(30), 4), np.tile(np.arange(1, 5), 30)

    def of(part: slice) -> LinkScores:
        which = torch.from_numpy(scores[part])
        scored = Scored("tail", np.zeros((len(which), 3), dtype=np.int64), which, gold[: len(which)], None)
        inside = rows < len(which)
        found = LinkScores()
        found.see(scored, {"uniform": (rows[inside], columns[inside])}, which)
        return found

    metrics = (of(slice(0, 12)) + of(slice(12, 30))).metrics("test")
    assert metrics == of(slice(0, 30)).metrics("test")
    positive, negative = scores[:, 0], scores[:, 1:5].ravel()
    auc = np.mean((positive[:, None] > negative) + 0.5 * (positive[:, None] == negative))
    precisions = [np.sum(positive >= p) / (np.sum(positive >= p) + np.sum(negative >= p)) for p in positive]
    assert metrics["test.auc.uniform"] == pytest.approx(auc, abs=2e-3)
    assert metrics["test.ap.uniform"] == pytest.approx(np.mean(precisions), abs=5e-3)
    assert "test.auc.hard" not in metrics


def test_neighbours_in_common_are_counted() -> None:
    train, _ = social()
    near = adjacency(train, N).toarray()
    others = 1 - np.eye(N)
    heads = torch.arange(N)
    relations = torch.zeros(N, dtype=torch.int64)
    common = CommonNeighbours(train, N, 1).score_tails(heads, relations)
    np.testing.assert_array_equal(common.numpy(), near @ near * others)
    weights = 1 / np.log(np.maximum(near.sum(0), 2))
    rare = AdamicAdar(train, N, 1).score_heads(relations, heads)
    np.testing.assert_allclose(rare.numpy(), near @ np.diag(weights) @ near * others, rtol=1e-5)
