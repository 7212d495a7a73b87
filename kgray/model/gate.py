"""The gate of the ensemble: how much each member's word counts for a query.

A member m gives a raw score s_m(q, c) to candidate c of query q. Its inverse temperature b_m makes scores of members
comparable, z_m = b_m s_m, and the gate a positive weight w_m(q) = softplus(theta_m(q)), so that the fused score
s(q, c) = sum_m w_m(q) z_m(q, c) is a sum with one addend a member. theta_m(q) is a sum too: a base a task; offsets of
what training says of the query (cardinality class, number of known answers, entity seen or not); an offset a relation
and direction; a linear function of how the members' scores are distributed (DynaSemble, Nandi et al. 2023). Softplus,
started where the weight is 1, instead of that paper's ReLU: a weight can come as close to 0 as it likes and still
find back, where a ReLU that has reached 0 for all members stays there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import softplus

from kgray.evaluation.counts import CARDINALITIES, SIDES, Strata
from kgray.graph.filter_index import FilterIndex, KeyedRows

ONE = 0.5413248546129181
"""softplus(ONE) is 1."""

ANSWER_BINS = (1, 2, 10, 100)
"""Lower edges of the bins of known training answers; the bin below the first is the half-link never seen."""

FEATURES = ("one_minus_mean", "variance", "gap")
"""Of a member's scores of all candidates: of the min-max normalised ones 1 - mean and variance, and how far the best
is ahead of the second; the last in the same units."""

_BINS = len(ANSWER_BINS) + 1
_CLASSES = 2 * len(CARDINALITIES)
LEVELS: Mapping[str, int] = {"entity": _CLASSES + _BINS + 2, "relation": _BINS + 4}
"""Levels of what training says of a query, of entity queries (tail, head) and of relation queries."""

FEATURE_LIMIT = 3.0
"""Standardised features are cut off here: a stranger query must not drive a weight out of what was fitted."""


def part_of(task: str) -> str:
    """Entity queries of both directions share a gate; relation queries have one of their own."""
    return "relation" if task == "relation" else "entity"


@dataclass(frozen=True)
class TrainingFacts:
    """What the training split says of a query.

    cardinality (R,) int8 indexes CARDINALITIES; seen (N,) bool: the entity has a training triple; answers: by task,
    sorted keys (K,) int64 of the two given parts and the number of answers (K,) int32 training has for them.
    """

    num_relations: int
    num_entities: int
    cardinality: npt.NDArray[np.int8]
    seen: npt.NDArray[np.bool_]
    answers: Mapping[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]]

    @classmethod
    def of(cls, train: npt.NDArray[Any], num_entities: int, num_relations: int) -> TrainingFacts:
        """Of training triples (n, 3)."""
        strata = Strata.of(train, num_entities, num_relations)
        known = FilterIndex.build(train, num_entities, num_relations)
        tables = (known.by_head_relation, known.by_relation_tail, known.by_head_tail)
        answers = {task: _lengths(table) for task, table in zip(SIDES, tables, strict=True)}
        return cls(num_relations, num_entities, strata.cardinality, strata.seen, answers)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Flat arrays for :meth:`from_arrays`."""
        arrays: dict[str, npt.NDArray[Any]] = {"cardinality": self.cardinality, "seen": self.seen.astype(np.uint8)}
        for task, (keys, counts) in self.answers.items():
            arrays |= {f"answers.{task}.keys": keys, f"answers.{task}.counts": counts}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> TrainingFacts:
        """What :meth:`to_arrays` gave; KeyError where something lacks."""
        answers = {task: (arrays[f"answers.{task}.keys"], arrays[f"answers.{task}.counts"]) for task in SIDES}
        cardinality, seen = arrays["cardinality"], arrays["seen"].astype(bool)
        return cls(len(cardinality), len(seen), cardinality, seen, answers)

    def keys(self, task: str, first: Tensor, second: Tensor) -> npt.NDArray[np.int64]:
        """One number a query; first and second (B,) are the given parts in the order head, relation, tail."""
        width = self.num_relations if task == "tail" else self.num_entities
        keys: npt.NDArray[np.int64] = first.numpy().astype(np.int64) * width + second.numpy()
        return keys

    def levels(self, task: str, first: Tensor, second: Tensor) -> Tensor:
        """(B, 3) int64: which of LEVELS hold, each query one of each kind."""
        keys, counts = self.answers[task]
        wanted = self.keys(task, first, second)
        number = np.zeros(len(wanted), dtype=np.int64)
        if len(keys):
            place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            number = np.where(keys[place] == wanted, counts[place], 0)
        bins = np.searchsorted(ANSWER_BINS, number, side="right")
        if task == "relation":
            unseen = [~self.seen[part.numpy()] for part in (first, second)]
            columns = [bins, _BINS + unseen[0], _BINS + 2 + unseen[1]]
        else:
            relation, entity = (second, first) if task == "tail" else (first, second)
            kind = self.cardinality[relation.numpy()] + (len(CARDINALITIES) if task == "head" else 0)
            columns = [kind, _CLASSES + bins, _CLASSES + _BINS + ~self.seen[entity.numpy()]]
        return torch.from_numpy(np.stack(columns, axis=1).astype(np.int64))

    def directions(self, task: str, first: Tensor, second: Tensor) -> Tensor:
        """(B,) int64: relation and direction of an entity query, reciprocal ones from R on; 0 of relation queries."""
        if task == "relation":
            return torch.zeros_like(first)
        return second if task == "tail" else first + self.num_relations


def _lengths(table: KeyedRows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    return table.keys, np.diff(table.offsets).astype(np.int32)


def row_features(scores: Tensor) -> Tensor:
    """FEATURES of (B, C) scores -> (B, 3) float32; zeros where all scores are equal."""
    low, high = scores.amin(1), scores.amax(1)
    span = high - low
    safe = torch.where(span > 0, span, torch.ones_like(span))
    deviation, mean = torch.std_mean(scores, dim=1, correction=0)
    second = scores.topk(min(2, scores.shape[1]), dim=1).values[:, -1]
    features = torch.stack([1 - (mean - low) / safe, (deviation / safe) ** 2, (high - second) / safe], dim=1)
    return torch.where((span > 0)[:, None], features, torch.zeros_like(features))


@dataclass(frozen=True)
class Queries:
    """What a gate may know of B queries: task (B,) int64 in SIDES, levels (B, 3), directions (B,), features
    (B, M, 3) or None where the gate does not read them."""

    task: Tensor
    levels: Tensor
    directions: Tensor
    features: Tensor | None

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, rows: Tensor) -> Queries:
        features = None if self.features is None else self.features[rows]
        return Queries(self.task[rows], self.levels[rows], self.directions[rows], features)


@dataclass(frozen=True)
class Gate:
    """A fitted gate over members ``members``; all tensors float32.

    scale (3, M): inverse temperature of a member at a task, 0 where it has no say. base (3, M): theta of a task.
    levels (L, M), directions (2R, M), features (3M, M): offsets, None where the variant has none. centre, spread
    (3M,): what standardises features.
    """

    members: tuple[str, ...]
    scale: Tensor
    base: Tensor
    levels: Tensor | None = None
    directions: Tensor | None = None
    features: Tensor | None = None
    centre: Tensor | None = None
    spread: Tensor | None = None

    @classmethod
    def single(cls, members: tuple[str, ...], chosen: str, scale: Tensor) -> Gate:
        """One member's say alone; ``scale`` (3, M) of which only that member's column counts."""
        only = torch.tensor([name == chosen for name in members])
        return cls(members, torch.where(only, scale, torch.zeros_like(scale)), torch.full_like(scale, ONE))

    def theta(self, queries: Queries) -> Tensor:
        """(B, M)."""
        theta = self.base[queries.task]
        if self.levels is not None:
            theta = theta + self.levels[queries.levels].sum(1)
        if self.directions is not None:
            theta = theta + self.directions[queries.directions]
        if self.features is not None and self.centre is not None and self.spread is not None:
            if queries.features is None:
                raise ValueError("this gate reads features of the members' scores")
            theta = theta + standardise(queries.features, self.centre, self.spread) @ self.features
        return theta

    def weights(self, queries: Queries) -> Tensor:
        """(B, M): what a raw score of each member is multiplied by, w_m(q) b_m."""
        return softplus(self.theta(queries)) * self.scale[queries.task]

    def used(self, task: str) -> tuple[str, ...]:
        """Members that have a say at the task."""
        scale = self.scale[SIDES.index(task)]
        return tuple(name for name, value in zip(self.members, scale.tolist(), strict=True) if value > 0)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """By field name, without the ones that are None."""
        found = {name: getattr(self, name) for name in _ARRAYS}
        return {name: value.contiguous().numpy() for name, value in found.items() if value is not None}

    @classmethod
    def from_arrays(cls, members: tuple[str, ...], arrays: Mapping[str, npt.NDArray[Any]]) -> Gate:
        """What :meth:`to_arrays` gave."""
        return cls(members, **{name: torch.from_numpy(arrays[name]) for name in _ARRAYS if name in arrays})


_ARRAYS = ("scale", "base", "levels", "directions", "features", "centre", "spread")


def standardise(features: Tensor, centre: Tensor, spread: Tensor) -> Tensor:
    """(B, M, 3) -> (B, 3M) of mean 0 and deviation 1 where it was fitted, cut off at FEATURE_LIMIT."""
    return ((features.flatten(1) - centre) / spread).clamp(-FEATURE_LIMIT, FEATURE_LIMIT)
