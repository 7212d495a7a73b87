"""The one evaluator: validation during training, the offline test, baselines and ablations all rank here.

For each query every entity (or relation) is a candidate. The score of the true answer is read from the very
matrix its rivals stand in: computed by another kernel it would differ in the last bits and win or lose ties
it should share (LibKGE issue 221: MRR .723 on WN18RR for a model that knows nothing). Known other answers
are left out, the true answer never. Ranks are integers, kept with ties won (optimistic) and lost
(pessimistic); the realistic rank is their mean. A score that is NaN or infinite is an error, never a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from kgray.errors import NonFiniteError
from kgray.evaluation.counts import SIDES, Counts, Strata
from kgray.graph.filter_index import FilterIndex, KnownAnswers
from kgray.graph.graph import SPLITS, SUPPORT

SCORE_BUDGET = 1 << 24
"""Scores held at once by default: 64 MiB of float32."""

_BLOCK = {"cpu": 1 << 18}
_BLOCK_ELSEWHERE = 1 << 26
_EXACT_SUM = 1 << 24


class Scorer(Protocol):
    """What can be ranked. Arguments are (B,) int64 tensors on the CPU; higher scores are better, float32.

    A scorer need only have the methods of the tasks it is ranked on.
    """

    @property
    def num_entities(self) -> int: ...

    @property
    def num_relations(self) -> int: ...

    def score_tails(self, heads: torch.Tensor, relations: torch.Tensor) -> torch.Tensor:
        """(B, num_entities) scores of every entity as the tail."""
        ...

    def score_heads(self, relations: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        """(B, num_entities) scores of every entity as the head."""
        ...

    def score_relations(self, heads: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        """(B, num_relations) scores of every relation."""
        ...


@dataclass(frozen=True, slots=True)
class Scored:
    """The score matrix of B queries of one side, as it is ranked. triples (B, 3) int64, scores (B, C), gold (B,),
    left_out: (rows, columns) of known answers, the gold ones among them perhaps, or None."""

    side: str
    triples: npt.NDArray[np.int64]
    scores: torch.Tensor
    gold: torch.Tensor
    left_out: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None

    def others_known(self) -> torch.Tensor:
        """(B, C) bool: known answers other than the gold one."""
        out = torch.zeros(self.scores.shape, dtype=torch.bool)
        if self.left_out is not None:
            rows, columns = (torch.from_numpy(part) for part in self.left_out)
            out[rows, columns] = True
            out[torch.arange(len(self.gold)), self.gold] = False
        return out


@dataclass(frozen=True, slots=True)
class Ranks:
    """Ranks of B queries of one side. Arrays (B,), but ``triples`` (B, 3) int64."""

    side: str
    triples: npt.NDArray[np.int64]
    optimistic: npt.NDArray[np.int64]
    pessimistic: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    candidates: npt.NDArray[np.int64]

    @property
    def realistic(self) -> npt.NDArray[np.float64]:
        """Mean of optimistic and pessimistic rank: a constant scorer gets (candidates + 1) / 2."""
        return (self.optimistic + self.pessimistic) / 2


def filter_splits(split: str) -> tuple[str, ...]:
    """The splits whose triples are left out of the rivals when ``split`` is ranked.

    Train answers filter negatives in training, train+valid filter validation, all filter the test. Filtering
    validation by the test split would let model selection see the test. Support facts are known wherever something is
    asked that training did not see.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    first = SPLITS[: SPLITS.index(split) + 1]
    return first if split == "train" else (*first, SUPPORT)


def rank_triples(
    scorer: Scorer,
    triples: npt.NDArray[Any] | Iterable[npt.NDArray[Any]],
    known: KnownAnswers | None,
    *,
    split: str,
    train: Strata | FilterIndex | npt.NDArray[Any] | None = None,
    tasks: Sequence[str] = SIDES,
    batch_size: int | None = None,
    score_budget: int = SCORE_BUDGET,
    on_ranks: Callable[[Ranks], None] | None = None,
    on_scores: Callable[[Scored], None] | None = None,
) -> Counts:
    """Rank the true answer of each query of each triple; memory does not grow with the number of triples.

    ``triples``: (n, 3) integers head, relation, tail, or an iterable of such arrays, read once. ``known``:
    the triples of :func:`filter_splits`, or None for raw ranks. ``tasks``: of ``tail``, ``head``,
    ``relation``. ``train``: for the slices by cardinality and unseen entities; give a :class:`Strata` when
    ranking often. ``batch_size``: queries scored at once; by default as many as keep a score matrix within
    ``score_budget`` scores. ``on_ranks`` gets the ranks of every batch, to be written away; ``on_scores`` the
    scores themselves, after they were ranked.

    Raises NonFiniteError naming the first query with a NaN or infinite score, and ValueError when the
    scorer's matrix has the wrong shape, a task is unknown, or the filter is of another graph.
    """
    for task in tasks:
        if task not in SIDES:
            raise ValueError(f"unknown task {task!r}, expected some of {', '.join(SIDES)}")
    size = (scorer.num_entities, scorer.num_relations)
    if known is not None and (known.num_entities, known.num_relations) != size:
        raise ValueError(
            f"the filter is of a graph with {known.num_entities} entities and {known.num_relations} "
            f"relations, the scorer of one with {size[0]} and {size[1]}"
        )
    if batch_size is None:
        batch_size = max(1, score_budget // max(*size, 1))
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}, expected a positive number of queries")
    strata = _strata(train, *size)
    cardinality = None if strata is None else strata.cardinality
    counts = Counts(split, known is not None, size[1], cardinality)
    for batch in _batches(triples, batch_size):
        unseen = np.zeros(len(batch), dtype=bool)
        if strata is not None:
            unseen = ~(strata.seen[batch[:, 0]] & strata.seen[batch[:, 2]])
        for task in tasks:
            ranks = _rank_batch(scorer, batch, task, known, on_scores)
            relations, candidates = batch[:, 1], ranks.candidates
            counts.add(task, relations, unseen, ranks.optimistic, ranks.pessimistic, candidates)
            if on_ranks is not None:
                on_ranks(ranks)
    return counts


@torch.no_grad()
def _rank_batch(
    scorer: Scorer,
    batch: npt.NDArray[np.int64],
    side: str,
    known: KnownAnswers | None,
    on_scores: Callable[[Scored], None] | None,
) -> Ranks:
    head, relation, tail = torch.from_numpy(batch.T.copy())
    if side == "tail":
        scores, gold, width = scorer.score_tails(head, relation), tail, scorer.num_entities
        left_out = None if known is None else known.tails(head, relation)
    elif side == "head":
        scores, gold, width = scorer.score_heads(relation, tail), head, scorer.num_entities
        left_out = None if known is None else known.heads(relation, tail)
    else:
        scores, gold, width = scorer.score_relations(head, tail), relation, scorer.num_relations
        left_out = None if known is None else known.relations(head, tail)
    if tuple(scores.shape) != (len(batch), width):
        raise ValueError(f"{side} scores have shape {tuple(scores.shape)}, expected {(len(batch), width)}")
    try:
        optimistic, pessimistic, true, candidates = rank_scores(scores, gold, left_out)
    except NonFiniteScoreError as error:
        h, r, t = batch[error.row].tolist()
        asked = {"tail": f"({h}, {r}, ?)", "head": f"(?, {r}, {t})", "relation": f"({h}, ?, {t})"}[side]
        raise NonFiniteError(
            f"{side} query {asked}, true answer {int(gold[error.row])}: candidate {error.column} has the "
            f"score {error.value}; it cannot be ranked"
        ) from None
    if on_scores is not None:
        on_scores(Scored(side, batch, scores, gold, left_out))
    return Ranks(side, batch, optimistic, pessimistic, true, candidates)


class NonFiniteScoreError(NonFiniteError):
    """A non-finite score by its place in the matrix; :func:`rank_triples` tells it by its query."""

    def __init__(self, row: int, column: int, value: float) -> None:
        self.row, self.column, self.value = row, column, value
        super().__init__(row, column, value)

    def __str__(self) -> str:
        return f"score [{self.row}, {self.column}] is {self.value}"


def rank_scores(
    scores: torch.Tensor,
    gold: torch.Tensor,
    left_out: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Optimistic rank, pessimistic rank, true score, number of candidates of each row of a score matrix.

    ``scores`` (B, C) floating, compared as float32, not changed; ``gold`` (B,) int64 the true column of each
    row; ``left_out`` = (rows, columns) known answers, each pair once; the true one may be there and stays.
    Raises NonFiniteScoreError. Ties after Sun et al. 2020, "A re-evaluation of knowledge graph completion
    methods".
    """
    scores = scores.detach().to(torch.float32)
    gold = gold.to(scores.device)
    true = scores.gather(1, gold[:, None]).squeeze(1)
    above, level = _count_rivals(scores, true)
    candidates = torch.full_like(above, scores.shape[1])
    if left_out is not None:
        rows, columns = (torch.from_numpy(part).to(scores.device) for part in left_out)
        others = columns != gold[rows]
        rows, columns = rows[others], columns[others]
        dropped, reference = scores[rows, columns], true[rows]
        above -= torch.bincount(rows[dropped > reference], minlength=len(gold))
        level -= torch.bincount(rows[dropped == reference], minlength=len(gold))
        candidates -= torch.bincount(rows, minlength=len(gold))
    optimistic = above + 1
    pessimistic = above + level  # level counts the true answer itself
    return optimistic.cpu().numpy(), pessimistic.cpu().numpy(), true.cpu().numpy(), candidates.cpu().numpy()


def _count_rivals(scores: torch.Tensor, true: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many scores of each row lie above, and level with, the true one; (B,) int64 each.

    Rows go through a float32 buffer that stays in the cache: comparing into floats and summing them is ten
    times faster on a CPU than ``(scores > true).sum(1)``, whose bool-to-int64 sum does not vectorise.
    """
    rows, width = scores.shape
    above = torch.zeros(rows, dtype=torch.int64, device=scores.device)
    at_least = torch.zeros_like(above)
    block = _BLOCK.get(scores.device.type, _BLOCK_ELSEWHERE)
    step = max(1, block // max(width, 1))
    columns = min(width, _EXACT_SUM)  # a float32 sum of ones is exact up to 2**24
    buffer = torch.empty((min(step, rows), columns), dtype=torch.float32, device=scores.device)
    suspect = torch.zeros(rows, dtype=torch.float32, device=scores.device)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        reference = true[start:stop, None]
        for left in range(0, width, columns):
            part = scores[start:stop, left : left + columns]
            ones = buffer[: part.shape[0], : part.shape[1]]
            suspect[start:stop] += part.sum(dim=1)
            above[start:stop] += torch.gt(part, reference, out=ones).sum(dim=1).long()
            at_least[start:stop] += torch.ge(part, reference, out=ones).sum(dim=1).long()
    _raise_if_not_finite(scores, suspect)
    return above, at_least - above


def _raise_if_not_finite(scores: torch.Tensor, sums: torch.Tensor) -> None:
    """A NaN or infinity makes its row's sum non-finite; finite scores may too, hence the second look."""
    for row in torch.nonzero(~torch.isfinite(sums)).flatten().tolist():
        wrong = torch.nonzero(~torch.isfinite(scores[row])).flatten()
        if len(wrong):
            column = int(wrong[0])
            raise NonFiniteScoreError(row, column, float(scores[row, column]))


def _strata(
    train: Strata | FilterIndex | npt.NDArray[Any] | None, num_entities: int, num_relations: int
) -> Strata | None:
    if train is None or isinstance(train, Strata):
        return train
    triples = train.triples() if isinstance(train, FilterIndex) else train
    return Strata.of(triples, num_entities, num_relations)


def _batches(
    triples: npt.NDArray[Any] | Iterable[npt.NDArray[Any]], batch_size: int
) -> Iterator[npt.NDArray[np.int64]]:
    """(B, 3) int64 slices of at most ``batch_size`` rows, near-equal in length.

    Near-equal, because a leftover of one or two queries would go through another matrix kernel, which does not
    give equal candidates equal scores to the last bit.
    """
    for array in (triples,) if isinstance(triples, np.ndarray) else triples:
        whole = np.asarray(array).reshape(-1, 3)
        parts = -(-len(whole) // batch_size)
        for part in range(parts):
            yield whole[len(whole) * part // parts : len(whole) * (part + 1) // parts].astype(np.int64)
