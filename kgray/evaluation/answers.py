"""From scores to answers: the one core of what is served over HTTP and what is predicted in batches.

Dense ids in, arrays out; names are found elsewhere. Both callers rank, filter, calibrate and mark known facts by this
code, so a query has the same answers from either, up to the last bits in which the kernels of two batch sizes differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kgray.evaluation.calibration import Calibration, Rows
from kgray.evaluation.ranking import rank_scores
from kgray.graph.filter_index import FilterIndex

Task = Literal["tail", "head", "relation"]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Known = tuple[Ints, Ints]
"""(rows, candidates) of known answers, as ``FilterIndex`` looks them up."""

CELLS = 1 << 25
"""Numbers held at once by default (128 MiB of float32)."""

_COPIES = 4
"""Matrices as large as the scores that are held while they are ranked and calibrated."""


class Model(Protocol):
    """What answers are made of; :class:`kgray.model.bundle.Bundle` is one."""

    @property
    def num_entities(self) -> int: ...
    @property
    def num_relations(self) -> int: ...
    @property
    def known(self) -> FilterIndex: ...
    @property
    def calibration(self) -> Calibration | None: ...
    def score_tails(self, heads: Tensor, relations: Tensor) -> Tensor: ...
    def score_heads(self, relations: Tensor, tails: Tensor) -> Tensor: ...
    def score_relations(self, heads: Tensor, tails: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers to B queries of one task, best first; row i has ``count[i]`` of them, and what stands behind is void.

    ids (B, K) int64, scores (B, K) float32, known (B, K) bool. probability (B, K) float64 calibrated, of a known fact
    as if it were not known; in_set (B, K) whether the conformal answer set holds it; set_size (B,) of it, known facts
    not counted: these say something where ``calibrated`` (B,) is true. finite (B,): whether every score of the query is
    a number; where not the query has no answers.
    """

    ids: Ints
    scores: Floats
    known: Bools
    probability: Doubles
    in_set: Bools
    set_size: Ints
    count: Ints
    calibrated: Bools
    finite: Bools

    def __len__(self) -> int:
        return len(self.count)

    @classmethod
    def concatenate(cls, parts: Sequence[Answers]) -> Answers:
        """One after the other; ValueError when there is none."""
        if not parts:
            raise ValueError("no answers to put together")
        width = max(part.ids.shape[1] for part in parts)

        def wide(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.pad(array, ((0, 0), (0, width - array.shape[1]))) if array.ndim == 2 else array

        fields = (np.concatenate([wide(getattr(part, name)) for part in parts]) for name in cls.__slots__)
        return cls(*fields)


@dataclass(frozen=True, slots=True)
class Judged:
    """What is said of B whole triples, each asked from either end, all (B,).

    score: the mean of the two directions, as every family of models has it. tail_rank, head_rank: realistic ranks among
    all candidates, other known answers left out. tail_probability, head_probability: calibrated, NaN where nothing is
    said. in_set: whether both conformal answer sets hold it, meaningful where ``calibrated``. finite: as in `Answers`.
    """

    score: Floats
    known: Bools
    tail_rank: Doubles
    head_rank: Doubles
    tail_probability: Doubles
    head_probability: Doubles
    in_set: Bools
    calibrated: Bools
    finite: Bools

    @classmethod
    def concatenate(cls, parts: Sequence[Judged]) -> Judged:
        """One after the other; ValueError when there is none."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__))


class Answerer:
    """Answers queries by dense ids from one model. Thread-safe: it holds nothing that a query changes.

    cells: numbers held at once, to which batches are cut; one query at least is scored at a time.
    """

    def __init__(self, model: Model, cells: int = CELLS) -> None:
        self.model = model
        self.cells = cells

    def complete(self, task: Task, first: Tensor, second: Tensor, top_k: Ints, filter_known: Bools) -> Answers:
        """The best candidates of B queries.

        first, second (B,) int64: the given parts in the order head, relation, tail. top_k (B,): how many of each at
        most. filter_known (B,): whether known answers are left out.
        """
        parts = []
        for rows in self._slices(len(first), task):
            scores, known = self._scored(task, first[rows], second[rows])
            relations = _relations(task, first[rows], second[rows])
            parts.append(
                rank_candidates(
                    *(task, scores, known, relations, self.model.calibration, top_k[rows], filter_known[rows])
                )
            )
        return Answers.concatenate(parts)

    def judge(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Judged:
        """Score and rank B whole triples (B,) int64 x 3. Two rows of all entities a triple."""
        parts = []
        for rows in self._slices(len(heads), "tail"):
            h, r, t = heads[rows], relations[rows], tails[rows]
            known = self.model.known.contains(h, r, t)
            sides = []
            for task, first, second, gold in (("tail", h, r, t), ("head", r, t, h)):
                scores, others = self._scored(task, first, second)  # type: ignore[arg-type]
                sides.append(_judge_side(task, scores, others, r, gold, known, self.model.calibration))
            parts.append(both(sides[0], sides[1], known))
        return Judged.concatenate(parts)

    def _slices(self, count: int, task: Task) -> list[slice]:
        """Near-equal parts of so many queries: a leftover of one or two would go through another matrix kernel."""
        width = self.model.num_relations if task == "relation" else self.model.num_entities
        parts = -(-count // max(1, self.cells // (_COPIES * max(width, 1))))
        return [slice(count * i // parts, count * (i + 1) // parts) for i in range(parts)]

    def _scored(self, task: Task, first: Tensor, second: Tensor) -> tuple[Tensor, Known]:
        model, known = self.model, self.model.known
        with torch.inference_mode():
            if task == "tail":
                return _floats(model.score_tails(first, second)), known.tails(first, second)
            if task == "head":
                return _floats(model.score_heads(first, second)), known.heads(first, second)
            return _floats(model.score_relations(first, second)), known.relations(first, second)


def rank_candidates(
    task: Task,
    scores: Tensor,
    known: Known,
    relations: Ints | None,
    calibration: Calibration | None,
    top_k: Ints,
    filter_known: Bools,
) -> Answers:
    """Rank, calibrate and mark one batch. scores (B, C) float32; relations (B,) of entity queries; others as
    :meth:`Answerer.complete` has them."""
    batch, width = scores.shape
    finite = _finite(scores)
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    mask[torch.from_numpy(known[0]), torch.from_numpy(known[1])] = True
    number_known = np.bincount(known[0], minlength=batch)
    out = mask & torch.from_numpy(filter_known)[:, None] if filter_known.any() else None
    most = max(1, min(int(top_k.max(initial=1)), width))
    values, ids = best_candidates(scores, most, out)
    left = width - np.where(filter_known, number_known, 0)
    count = np.where(finite, np.minimum(top_k, left), 0)
    of_known = mask.numpy()[np.arange(batch)[:, None], ids]
    probability, inside = np.full(ids.shape, np.nan), np.zeros(ids.shape, dtype=bool)
    size = np.zeros(batch, dtype=np.int64)
    calibrated = np.zeros(batch, dtype=bool)
    if calibration is not None and task in calibration.tasks:
        rows = calibration.rows(task, scores, relations, mask)
        # Where every candidate is known there is none left to be likely or not.
        calibrated = finite & (number_known < width)
        every = np.arange(batch)[:, None]
        with np.errstate(invalid="ignore"):
            probability, inside = rows.probability(every, values, of_known), rows.contains(every, values, of_known)
        size = _set_sizes(scores, rows, known)
    return Answers(ids, values, of_known, probability, inside, size, count, calibrated, finite)


def best_candidates(scores: Tensor, count: int, out: Tensor | None) -> tuple[Floats, Ints]:
    """The ``count`` (at most C) highest of each row of scores (B, C), best first, of equal ones the lower index first:
    (values, ids), (B, count) each. out (B, C) bool: left out; such stand last, with value -inf."""
    own = scores if out is None else scores.masked_fill(out, -torch.inf)
    width = own.shape[1]
    found = own.topk(min(count + 1, width), dim=1)
    values, ids = found.values.numpy(), found.indices.numpy()
    if count < width:
        # Which of the candidates level with the last place are taken is topk's choice: there all are looked at.
        for row in np.flatnonzero((values[:, count - 1] == values[:, count]) & np.isfinite(values[:, count])):
            ids[row, :count] = top_k(own[row].numpy(), count)
            values[row, :count] = own[row].numpy()[ids[row, :count]]
        values, ids = values[:, :count], ids[:, :count]
    order = np.lexsort((ids, -values), axis=1)
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(ids, order, axis=1)


def top_k(scores: Floats, count: int, without: Ints | None = None) -> Ints:
    """Indices of the ``count`` highest of ``scores`` (N,), best first; of equal scores the lower index first.

    A partial sort: N comparisons to find the threshold, and only what passes it is sorted. Equal to the
    head of a stable full sort, ties at the threshold too. ``without``: indices that may not come back; fewer
    than ``count`` are returned when fewer are left.
    """
    if without is not None and len(without):
        allowed = np.ones(len(scores), dtype=bool)
        allowed[without] = False
        left = np.flatnonzero(allowed)
        return left[top_k(scores[left], count)]
    if count < len(scores):
        threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
        above = np.flatnonzero(scores > threshold)
        level = np.flatnonzero(scores == threshold)[: count - len(above)]
        chosen = np.sort(np.concatenate([above, level]))
    else:
        chosen = np.arange(len(scores))
    order: Ints = chosen[np.argsort(-scores[chosen], kind="stable")]
    return order


def _set_sizes(scores: Tensor, rows: Rows, known: Known) -> Ints:
    """(B,) candidates not known yet that belong to the answer set."""
    level = torch.from_numpy(rows.reaching())
    size = (scores >= level[:, None]).sum(1).numpy()
    held = (scores[torch.from_numpy(known[0]), torch.from_numpy(known[1])] >= level[known[0]]).numpy()
    sizes: Ints = size - np.bincount(known[0][held], minlength=len(size))
    return sizes


@dataclass(frozen=True, slots=True)
class Side:
    """One direction of B triples: as the fields of `Judged`."""

    score: Floats
    rank: Doubles
    probability: Doubles
    in_set: Bools
    calibrated: Bools
    finite: Bools


def _judge_side(
    task: str, scores: Tensor, others: Known, relations: Tensor, gold: Tensor, known: Bools,
    calibration: Calibration | None,
) -> Side:  # fmt: skip
    batch = len(gold)
    finite = _finite(scores)
    if not finite.all():
        scores = torch.where(torch.from_numpy(finite)[:, None], scores, torch.zeros(()))
    optimistic, pessimistic, true, _ = rank_scores(scores, gold, others)
    probability, inside = np.full(batch, np.nan), np.zeros(batch, dtype=bool)
    calibrated = np.zeros(batch, dtype=bool)
    if calibration is not None and task in calibration.tasks:
        mask = torch.zeros(scores.shape, dtype=torch.bool)
        mask[torch.from_numpy(others[0]), torch.from_numpy(others[1])] = True
        rows = calibration.rows(task, scores, relations.numpy(), mask)
        every = np.arange(batch)
        calibrated = finite & (np.bincount(others[0], minlength=batch) < scores.shape[1])
        with np.errstate(invalid="ignore"):
            probability, inside = rows.probability(every, true, known), rows.contains(every, true, known)
        probability = np.where(calibrated, probability, np.nan)
    return Side(true, (optimistic + pessimistic) / 2, probability, inside, calibrated, finite)


def both(tail: Side, head: Side, known: Bools) -> Judged:
    """What is said of triples from what is said from either end."""
    return Judged(
        score=np.float32(0.5) * (tail.score + head.score),
        known=known,
        tail_rank=tail.rank,
        head_rank=head.rank,
        tail_probability=tail.probability,
        head_probability=head.probability,
        in_set=tail.in_set & head.in_set,
        calibrated=tail.calibrated & head.calibrated,
        finite=tail.finite & head.finite,
    )


def _relations(task: Task, first: Tensor, second: Tensor) -> Ints | None:
    if task == "relation":
        return None
    relations: Ints = (second if task == "tail" else first).numpy()
    return relations


def _finite(scores: Tensor) -> Bools:
    """(B,) whether all scores of a row are numbers. A NaN or infinity makes its row's sum one; so may finite scores,
    hence the second look."""
    finite: Bools = torch.isfinite(scores.sum(dim=1)).numpy()
    for row in np.flatnonzero(~finite):
        finite[row] = bool(torch.isfinite(scores[row]).all())
    return finite


def _floats(scores: Tensor) -> Tensor:
    return scores.detach().to("cpu", torch.float32)
