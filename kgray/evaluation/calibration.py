"""From scores to statements one can hold against the world: probabilities that are frequencies, and answer sets that
contain the true answer as often as they promise.

Probability: the softmax of a query's scores over all its candidates, other known answers left out as in ranking, at a
temperature fitted by likelihood (Guo et al. 2017); then a monotone map of it to how often such a candidate is right
(isotonic regression, Zadrozny and Elkan 2002), one for the first-placed candidate and one for those behind it. A
known fact has the probability it would have if it were not known yet.

Validation queries know the other answers of their own split, but not those of later ones: a first-placed candidate
counts as wrong there that is right and left out as known in a later test. Probabilities and answer sets are therefore
fitted to worlds in which such hidden answers are known (:mod:`kgray.evaluation.hidden`); without them probabilities
would be too low, and sets larger than they need be.

Answer set: all candidates whose softmax probability reaches a threshold, which is the quantile of the true answers'
own probabilities over validation queries (split conformal prediction; the smallest sets on average, Sadinle et al.
2019), a threshold a relation and direction where it has queries enough, else one for all the others of that task
together. It holds for queries like those of validation, as far as what is known of hidden answers does. A set may be
empty: no candidate is likely enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kgray.errors import ArtifactError
from kgray.evaluation.hidden import WORLDS, chances, worlds

FORMAT = 1
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LEAST_QUERIES = 100
"""Fewer validation queries say nothing of frequencies: the softmax is left as it is."""


@dataclass(frozen=True)
class Monotone:
    """A nondecreasing map of [0, 1] to itself, linear between ``x`` and ``y`` (K,), the identity where K is 0."""

    x: Floats
    y: Floats

    def __call__(self, values: npt.NDArray[Any]) -> Floats:
        values = np.asarray(values, dtype=np.float64)
        return np.interp(values, self.x, self.y) if len(self.x) else values

    @classmethod
    def fit(cls, predicted: Floats, right: Floats, weight: float = 1.0) -> Monotone:
        """Isotonic regression of ``right`` (n,) in [0, 1] on ``predicted`` (n,) by pool adjacent violators.

        weight: what an observation counts. Each block counts one more, whole, that says what was predicted: a hundred
        right answers in a row do not make the next one certain. The identity where there is less than LEAST_QUERIES.
        """
        if weight * len(predicted) < LEAST_QUERIES:
            return cls(np.zeros(0), np.zeros(0))
        order = np.argsort(predicted, kind="stable")
        blocks: list[list[float]] = []  # sum right, sum predicted, weight
        for p, r in zip(predicted[order].tolist(), right[order].tolist(), strict=True):
            blocks.append([weight * r, weight * p, weight])
            while len(blocks) > 1 and blocks[-2][0] * blocks[-1][2] >= blocks[-1][0] * blocks[-2][2]:
                last = blocks.pop()
                blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
        sums = np.array(blocks)
        x = np.clip(sums[:, 1] / sums[:, 2], 0.0, 1.0)
        y = np.clip((sums[:, 0] + x) / (sums[:, 2] + 1), 0.0, 1.0)
        order = np.argsort(x, kind="stable")
        x, y = x[order], np.maximum.accumulate(y[order])
        x, first = np.unique(x, return_index=True)
        return cls(x, y[first])


@dataclass(frozen=True)
class TaskCalibration:
    """Of one task. inverse_temperature: what scores are multiplied by. first, others: maps of the softmax probability
    of the first-placed candidate, of any other. thresholds (R,): natural logarithm of the least probability in an
    answer set, by relation (the same for all of relation queries); -inf: every candidate."""

    inverse_temperature: float
    first: Monotone
    others: Monotone
    thresholds: Floats


@dataclass(frozen=True)
class Rows:
    """What calibration says of B queries. float64; log_sum (B,): of the candidates' tempered exponentials; best (B,):
    the highest score; threshold (B,): a candidate belongs to the answer set if its score reaches it."""

    task: TaskCalibration
    log_sum: Floats
    best: Floats
    log_threshold: Floats

    @property
    def threshold(self) -> Floats:
        return (self.log_threshold + self.log_sum) / self.task.inverse_temperature

    def reaching(self) -> npt.NDArray[np.float32]:
        """(B,) the least float32 that reaches the threshold: with it float32 scores compare exactly."""
        with np.errstate(over="ignore"):
            single = self.threshold.astype(np.float32)
        found: npt.NDArray[np.float32] = np.where(
            single < self.threshold, np.nextafter(single, np.float32(np.inf)), single
        )
        return found

    def probability(self, row: int | Ints, scores: npt.NDArray[Any], known: npt.NDArray[np.bool_]) -> Floats:
        """(K,) calibrated probabilities of candidates of one query. known (K,): left out of the sum until now.

        row: the query, or of several one a candidate, in any shape that goes with that of scores.
        """
        log_p = self._log_softmax(row, scores, known)
        p = np.exp(np.minimum(log_p, 0.0))
        leading = np.asarray(scores, dtype=np.float64) >= self.best[row]
        top = self.task.first(p)
        # What stands behind the first is never more likely than the first itself would be.
        others = np.minimum(self.task.others(p), self.task.first(_best_probability(self, row)))
        return np.where(leading, top, others)

    def contains(
        self, row: int | Ints, scores: npt.NDArray[Any], known: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        """(K,) whether candidates are in the answer set; a known one as if it were not known. row: as above."""
        inside: npt.NDArray[np.bool_] = np.asarray(scores, dtype=np.float64) >= self.threshold[row]
        if np.any(known):
            inside = np.where(known, self._log_softmax(row, scores, known) >= self.log_threshold[row], inside)
        return inside

    def _log_softmax(self, row: int | Ints, scores: npt.NDArray[Any], known: npt.NDArray[np.bool_]) -> Floats:
        own = np.asarray(scores, dtype=np.float64) * self.task.inverse_temperature
        total = np.where(known, np.logaddexp(self.log_sum[row], own), self.log_sum[row])
        found: Floats = own - total
        return found


def _best_probability(rows: Rows, row: int | Ints) -> Floats:
    log_p = rows.best[row] * rows.task.inverse_temperature - rows.log_sum[row]
    found: Floats = np.exp(np.minimum(np.asarray(log_p), 0.0))
    return found


@dataclass(frozen=True)
class Calibration:
    """Of a model's scores, by task. alpha: the share of queries whose answer set may miss the true answer."""

    alpha: float
    tasks: Mapping[str, TaskCalibration]

    @property
    def coverage(self) -> float:
        return 1.0 - self.alpha

    def rows(self, task: str, scores: Tensor, relations: npt.NDArray[Any] | None, left_out: Tensor | None) -> Rows:
        """Of B queries: scores (B, C), relations (B,) of entity queries, left_out (B, C) bool candidates known
        already. KeyError for a task that is not calibrated."""
        found = self.tasks[task]
        own = scores.detach().to(torch.float32)
        if left_out is not None:
            own = own.masked_fill(left_out, -torch.inf)
        best = own.amax(1)
        # Differences to the best are exact enough in float32; the sums of large scores themselves would not be.
        shifted = torch.where(torch.isinf(own), own, own - torch.where(torch.isinf(best), 0.0, best)[:, None])
        log_sum = torch.logsumexp(shifted * found.inverse_temperature, dim=1).double().numpy()
        top = best.double().numpy()
        log_sum = log_sum + np.where(np.isinf(top), 0.0, top) * found.inverse_temperature
        at = np.zeros(len(own), dtype=np.int64) if relations is None else np.asarray(relations)
        return Rows(found, log_sum, top, found.thresholds[at])

    def one(self, task: str, scores: npt.NDArray[Any], relation: int | None, known: Ints) -> Rows | None:
        """Of one query: scores (C,), the relation of an entity query, the answers known already (n,); None where
        nothing can be said, as the task is not calibrated or every candidate is known."""
        if task not in self.tasks or len(known) == len(scores):
            return None
        out = torch.zeros(1, len(scores), dtype=torch.bool)
        out[0, torch.from_numpy(known)] = True
        relations = None if relation is None else np.array([relation])
        return self.rows(task, torch.from_numpy(scores)[None], relations, out)

    def to_json(self) -> dict[str, Any]:
        """Plain lists for calibration.json; -inf as null."""
        tasks = {
            name: {
                "inverse_temperature": task.inverse_temperature,
                "first": [task.first.x.tolist(), task.first.y.tolist()],
                "others": [task.others.x.tolist(), task.others.y.tolist()],
                "log_thresholds": [None if math.isinf(v) else v for v in task.thresholds.tolist()],
            }
            for name, task in self.tasks.items()
        }
        return {"format": FORMAT, "alpha": self.alpha, "tasks": tasks}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Calibration:
        """What :meth:`to_json` gave; ArtifactError when it is of another format."""
        if data.get("format") != FORMAT:
            raise ArtifactError(f"calibration has format {data.get('format')}, this kgray reads {FORMAT}")
        tasks = {
            name: TaskCalibration(
                task["inverse_temperature"],
                Monotone(*(np.array(part, dtype=np.float64) for part in task["first"])),
                Monotone(*(np.array(part, dtype=np.float64) for part in task["others"])),
                np.array([-np.inf if v is None else v for v in task["log_thresholds"]]),
            )
            for name, task in data["tasks"].items()
        }
        return cls(data["alpha"], tasks)


def fit_task(
    scores: Tensor,
    log_weight: Tensor,
    relations: Ints,
    num_relations: int,
    *,
    alpha: float,
    group: int,
    inverse_temperature: float,
    questions: Ints | None = None,
    unknown: float = 1.0,
) -> TaskCalibration:
    """Calibrate one task on Q validation queries.

    scores, log_weight (Q, C): candidates, the gold one first, as :class:`kgray.model.candidates.Candidates` has them;
    the scores must come from weights that never saw the query. relations (Q,), all 0 of relation queries. group:
    least number of queries for a threshold of its own. questions (Q,): queries that ask the same and differ in the gold
    answer share a number; None where none do. unknown: answers that only a later split knows, as a multiple of these
    queries.
    """
    log_p = scores.double() * inverse_temperature
    total = torch.logsumexp(log_p + log_weight, dim=1, keepdim=True)
    log_p = (log_p - total).masked_fill(log_weight != 0, -torch.inf)
    if questions is not None:
        chance = chances(scores * inverse_temperature, log_weight, questions, unknown)
        if chance.any():
            log_p = worlds(log_p, chance, WORLDS, seed=0)
    weight = len(scores) / len(log_p)
    first, others = _pairs(log_p)
    gold = log_p[:, 0].view(-1, len(scores)).numpy()  # a row a world
    # Each world promises the coverage, and needs as many queries for it as there are: worlds are no further evidence.
    each = [conformal_thresholds(one, relations, num_relations, alpha=alpha, group=group) for one in gold]
    thresholds = np.mean(each, axis=0)
    return TaskCalibration(inverse_temperature, Monotone.fit(*first, weight), Monotone.fit(*others, weight), thresholds)


_BEHIND = 9


def _pairs(log_p: Tensor) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats]]:
    """(probability, share of being right) of the first-placed candidates, and of the next few; (n,) each.

    Where several stand first together the credit is shared.
    """
    best = log_p.amax(1, keepdim=True)
    leading = log_p >= best
    credit = (leading[:, 0] / leading.sum(1)).double()
    behind = log_p.masked_fill(leading, -torch.inf)
    top, place = behind.topk(min(_BEHIND, behind.shape[1]), dim=1)
    there = ~torch.isinf(top)
    right = (place == 0).double()
    return (best.squeeze(1).exp().numpy(), credit.numpy()), (top[there].exp().numpy(), right[there].numpy())


def conformal_thresholds(log_p: Floats, groups: Ints, num_groups: int, *, alpha: float, group: int) -> Floats:
    """(num_groups,) thresholds of log probability that the true answer reaches with probability 1 - alpha.

    log_p (n,): of the true answers; groups (n,). Groups with less than ``group`` queries share one threshold, which
    is that of all queries together where even these are too few.
    """
    sizes = np.bincount(groups, minlength=num_groups)
    small = sizes < group
    shared = log_p[small[groups]]
    common = conformal_quantile(shared if len(shared) >= group else log_p, alpha)
    found = np.full(num_groups, common)
    for number in np.flatnonzero(~small):
        found[number] = conformal_quantile(log_p[groups == number], alpha)
    return found


def conformal_quantile(values: Floats, alpha: float) -> float:
    """The threshold that a new value, exchangeable with ``values`` (n,), reaches with probability 1 - alpha at least;
    -inf where n is too small to promise that."""
    last = math.floor((len(values) + 1) * alpha + 1e-9)
    return -math.inf if last < 1 else float(np.partition(values, last - 1)[last - 1])
