"""Are the reasons of the rules reasons? Facts named are deleted, and the answer is scored again without them.

Against it, as many facts drawn at random among those adjacent to head or tail are deleted (the named ones may be among
them: a draw that avoids them would be no random draw). Where there are fewer adjacent facts, all of them are deleted
and the rest is drawn from the whole graph. One point of the deletion curve of Petsiuk et al. 2018 (RISE).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kgray.evaluation.ranking import Ranks, rank_triples
from kgray.graph.filter_index import FilterIndex
from kgray.reasoning.explain import explain, fact_rows
from kgray.reasoning.facts import Int64
from kgray.reasoning.rules import Rules
from kgray.reasoning.scorer import RuleScorer

_ALL = 1 << 20


@dataclass(frozen=True)
class DeletionTest:
    """Means over ``queries`` triples.

    deleted: facts deleted a triple. adjacent: facts adjacent to head or tail. score, reciprocal_rank (of tail and head
    query, filtered, ties shared): with all facts; ``_explained`` and ``_random``: by how much they fall without those
    facts. harder: share of triples whose score falls more without the explained facts than without the random ones;
    softer: less.
    """

    queries: int
    deleted: float
    adjacent: float
    score: float
    score_explained: float
    score_random: float
    reciprocal_rank: float
    reciprocal_rank_explained: float
    reciprocal_rank_random: float
    harder: float
    softer: float


def deletion_test(
    rules: Rules,
    train: Int64,
    triples: Int64,
    known: FilterIndex,
    *,
    split: str,
    count: int,
    top: int = 5,
    seed: int = 0,
) -> DeletionTest:
    """Of ``count`` triples (n, 3) drawn from those that some rule predicts from ``train`` (T, 3), or of all of them
    where there are fewer. known: facts left out of ranks, of the graph's size.

    Explained facts are all groundings of the ``top`` rules that make up a score. Raises ValueError where no triple is
    predicted by a rule.
    """
    size = known.num_entities, known.num_relations
    train = np.unique(np.asarray(train, dtype=np.int64).reshape(-1, 3), axis=0)
    full = RuleScorer.over(rules, train, *size, top)
    predicted = triples[_scores(full, triples) > 0]
    if not len(predicted):
        raise ValueError("no rule predicts any of the triples")
    draw = np.random.default_rng(seed)
    asked = predicted[np.sort(draw.choice(len(predicted), min(count, len(predicted)), replace=False))]
    rows = np.zeros((len(asked), 3, 2))
    sizes = np.zeros((len(asked), 2))
    for number, triple in enumerate(asked):
        head, relation, tail = triple.tolist()
        named = _places(train, fact_rows(explain(full, head, relation, tail, limit=top, groundings=_ALL)))
        adjacent = np.flatnonzero(np.isin(train[:, [0, 2]], triple[[0, 2]]).any(axis=1))
        others = _draw(adjacent, len(train), len(named), draw)
        sizes[number] = len(named), len(adjacent)
        less = (np.delete(train, gone, axis=0) for gone in (named, others))
        scorers = [full, *(RuleScorer.over(rules, rest, *size, top) for rest in less)]
        rows[number] = [_judge(scorer, triple[None], known, split) for scorer in scorers]
    drops = rows[:, :1] - rows[:, 1:]
    mean, fall = rows.mean(axis=0)[0], drops.mean(axis=0)
    return DeletionTest(
        queries=len(asked),
        deleted=float(sizes[:, 0].mean()),
        adjacent=float(sizes[:, 1].mean()),
        score=float(mean[0]),
        score_explained=float(fall[0, 0]),
        score_random=float(fall[1, 0]),
        reciprocal_rank=float(mean[1]),
        reciprocal_rank_explained=float(fall[0, 1]),
        reciprocal_rank_random=float(fall[1, 1]),
        harder=float((drops[:, 0, 0] > drops[:, 1, 0]).mean()),
        softer=float((drops[:, 0, 0] < drops[:, 1, 0]).mean()),
    )


def _scores(scorer: RuleScorer, triples: Int64) -> NDArray[np.float32]:
    asked = (torch.from_numpy(column.copy()) for column in triples.T)
    found: NDArray[np.float32] = scorer.score_triples(*asked).numpy()
    return found


def _judge(scorer: RuleScorer, triple: Int64, known: FilterIndex, split: str) -> tuple[float, float]:
    """Score and mean reciprocal rank of both directions of a triple (1, 3)."""
    ranks: list[float] = []

    def note(found: Ranks) -> None:
        ranks.extend(found.realistic.tolist())

    rank_triples(scorer, triple, known, split=split, tasks=("tail", "head"), on_ranks=note)
    return float(_scores(scorer, triple)[0]), float(np.mean([1 / rank for rank in ranks]))


def _places(train: Int64, rows: Int64) -> Int64:
    """Positions of the rows in ``train``, which is sorted by all columns; all of them are there."""
    both = np.concatenate([train, rows])
    numbers = np.unique(both, axis=0, return_inverse=True)[1].reshape(-1)
    found: Int64 = np.flatnonzero(np.isin(numbers[: len(train)], numbers[len(train) :]))
    return found


def _draw(adjacent: Int64, total: int, count: int, draw: np.random.Generator) -> Int64:
    if count <= len(adjacent):
        return draw.choice(adjacent, count, replace=False)
    rest = np.delete(np.arange(total), adjacent)
    return np.concatenate([adjacent, draw.choice(rest, min(count - len(adjacent), len(rest)), replace=False)])
