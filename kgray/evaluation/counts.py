"""Exact, mergeable sums of ranks, and the metrics computed from them.

Every sum is an integer: reciprocal ranks are held in fixed point with 48 fractional bits. So shards merge in
any order, over any number of workers, to the very same bits, and a metric differs from the exact mean of
float64 reciprocal ranks by less than 2e-15.

The table is kept by (side, relation, seen or unseen entities); all slices a report shows are sums over it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

SIDES = ("tail", "head", "relation")
"""What a query asks for: ``(h, r, ?)``, ``(?, r, t)``, ``(h, ?, t)``. ``both`` adds tail and head."""
KINDS = ("optimistic", "realistic", "pessimistic")
"""Who wins a tie: the true answer, nobody (the mean of the two ranks), the rivals."""
HITS = (1, 3, 10)
CARDINALITIES = ("1-1", "1-N", "N-1", "N-N", "untrained")

_FRACTION = 48
_LIMB = 24
_COMMON = ("count", "ties", "candidates")
_PER_KIND = ("rank2", "reciprocal_high", "reciprocal_low", *(f"hits{k}" for k in HITS))
COLUMNS = (*_COMMON, *(f"{kind}.{name}" for kind in KINDS for name in _PER_KIND))


@dataclass(frozen=True, slots=True)
class Strata:
    """What the training split says about relations and entities, by which results are cut.

    ``cardinality`` (R,) int8 indexes :data:`CARDINALITIES`; ``seen`` (N,) bool: the entity is in a training
    triple.
    """

    cardinality: npt.NDArray[np.int8]
    seen: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, train: npt.NDArray[Any], num_entities: int, num_relations: int) -> Strata:
        """Strata of the training triples ``train``, (n, 3) integers.

        Cardinality after Bordes et al. 2013 (TransE, section 4.3): a side is "N" when a relation has on
        average at least 1.5 distinct entities there for one entity of the other side. A relation absent from
        train is "untrained".
        """
        train = distinct_triples(train)
        seen = np.zeros(num_entities, dtype=bool)
        seen[train[:, 0]] = True
        seen[train[:, 2]] = True
        triples = np.bincount(train[:, 1], minlength=num_relations)
        per_head = _ratio(triples, _distinct(train[:, 1], train[:, 0], num_entities, num_relations))
        per_tail = _ratio(triples, _distinct(train[:, 1], train[:, 2], num_entities, num_relations))
        cardinality = (per_head >= 1.5) + 2 * (per_tail >= 1.5)
        cardinality[triples == 0] = CARDINALITIES.index("untrained")
        return cls(cardinality.astype(np.int8), seen)


def distinct_triples(triples: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """(m, 3) int64: each of ``triples`` (n, 3) once, sorted by head, relation, tail."""
    rows = np.asarray(triples, dtype=np.int64).reshape(-1, 3)
    rows = rows[np.lexsort(rows.T[::-1])]
    fresh = np.ones(len(rows), dtype=bool)
    fresh[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    return rows[fresh]


def _distinct(
    relations: npt.NDArray[np.int64], entities: npt.NDArray[np.int64], num_entities: int, num_relations: int
) -> npt.NDArray[np.int64]:
    pairs = np.unique(relations * num_entities + entities)
    return np.bincount(pairs // max(num_entities, 1), minlength=num_relations)


def _ratio(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return a / np.maximum(b, 1)


@dataclass(slots=True)
class Counts:
    """Sums of ranks of one split under one protocol. Picklable; :meth:`to_json` for files; ``a + b`` merges.

    ``tables[side]`` is (R, 2, len(COLUMNS)) int64: relation x (seen, unseen) x sum. ``cardinality`` (R,)
    int8, or None when no training split was given: then there are no slices by cardinality or by seen
    entities.
    """

    split: str
    filtered: bool
    num_relations: int
    cardinality: npt.NDArray[np.int8] | None = None
    tables: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)

    def add(
        self,
        side: str,
        relations: npt.NDArray[np.int64],
        unseen: npt.NDArray[np.bool_],
        optimistic: npt.NDArray[np.int64],
        pessimistic: npt.NDArray[np.int64],
        candidates: npt.NDArray[np.int64],
    ) -> None:
        """Add B queries of one side; all arrays (B,). Ranks begin at 1 and optimistic <= pessimistic."""
        table = self._table(side)
        if not len(relations):
            return
        sums = _columns(optimistic, pessimistic, candidates)
        row = relations * 2 + unseen
        order = np.argsort(row, kind="stable")
        row = row[order]
        first = np.flatnonzero(np.concatenate(([True], row[1:] != row[:-1])))
        table.reshape(-1, len(COLUMNS))[row[first]] += np.add.reduceat(sums[order], first, axis=0)

    def __add__(self, other: Counts) -> Counts:
        """The counts of both; ValueError when split, protocol or graph differ."""
        same = (self.split, self.filtered, self.num_relations) == (
            other.split,
            other.filtered,
            other.num_relations,
        )
        if not same or not _equal(self.cardinality, other.cardinality):
            raise ValueError("counts of different splits, protocols or graphs cannot be merged")
        merged = Counts(self.split, self.filtered, self.num_relations, self.cardinality)
        for part in (self, other):
            for side, table in part.tables.items():
                merged._table(side)[...] += table
        return merged

    def _table(self, side: str) -> npt.NDArray[np.int64]:
        if side not in SIDES:
            raise ValueError(f"unknown side {side!r}, expected one of {', '.join(SIDES)}")
        if side not in self.tables:
            self.tables[side] = np.zeros((self.num_relations, 2, len(COLUMNS)), dtype=np.int64)
        return self.tables[side]

    def sides(self) -> list[str]:
        """The sides with results, ``both`` among them when head and tail are."""
        found = [side for side in SIDES if side in self.tables]
        return ["both", *found] if {"tail", "head"} <= self.tables.keys() else found

    def total(self, side: str) -> npt.NDArray[np.int64]:
        """Table of one side, (R, 2, len(COLUMNS)); ``both`` adds tail and head."""
        if side == "both":
            return self.tables["tail"] + self.tables["head"]
        return self.tables[side]

    def key(self, side: str, kind: str = "realistic") -> str:
        """The protocol as metrics carry it: ``test.both.realistic.filtered.full``."""
        return f"{self.split}.{side}.{kind}.{'filtered' if self.filtered else 'raw'}.full"

    def metrics(self, kinds: Sequence[str] = ("realistic",)) -> dict[str, float]:
        """All queries: ``test.both.realistic.filtered.full.mrr`` and so on, for every side."""
        return {
            f"{self.key(side, kind)}.{name}": value
            for side in self.sides()
            for kind in kinds
            for name, value in metrics_of(self.total(side).sum(axis=(0, 1)), kind).items()
        }

    def slices(
        self, relation_names: Sequence[str] | None = None, kind: str = "realistic"
    ) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
        """``{side: {"relation"|"cardinality"|"entities": {value: {metric: number}}}}``; empty slices left
        out.

        ``entities`` is ``seen`` (both in a training triple) or ``unseen``. Relations go by name when
        ``relation_names`` (R,) is given, else by their id in decimal.
        """
        return {side: self._slices_of(self.total(side), relation_names, kind) for side in self.sides()}

    def _slices_of(
        self, table: npt.NDArray[np.int64], names: Sequence[str] | None, kind: str
    ) -> dict[str, dict[str, dict[str, float]]]:
        by_relation = table.sum(axis=1)
        present = np.flatnonzero(by_relation[:, 0])
        groups: dict[str, dict[str, npt.NDArray[np.int64]]] = {
            "relation": {str(names[r]) if names is not None else str(r): by_relation[r] for r in present.tolist()}
        }
        if self.cardinality is not None:
            groups["cardinality"] = {
                name: by_relation[self.cardinality == code].sum(axis=0) for code, name in enumerate(CARDINALITIES)
            }
            groups["entities"] = {"seen": table[:, 0].sum(axis=0), "unseen": table[:, 1].sum(axis=0)}
        return {
            dimension: {value: metrics_of(row, kind) for value, row in rows.items() if row[0]}
            for dimension, rows in groups.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Plain lists, only the relations that occur; :meth:`from_json` is exact."""
        tables = {}
        for side, table in self.tables.items():
            present = np.flatnonzero(table[:, :, 0].any(axis=1))
            tables[side] = {"relations": present.tolist(), "sums": table[present].tolist()}
        return {
            "split": self.split,
            "filtered": self.filtered,
            "num_relations": self.num_relations,
            "columns": list(COLUMNS),
            "cardinality": None if self.cardinality is None else self.cardinality.tolist(),
            "tables": tables,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Counts:
        """What :meth:`to_json` gave. ValueError when its columns are another version's."""
        if tuple(data["columns"]) != COLUMNS:
            raise ValueError("these counts were written by another version: their columns differ")
        cardinality = data["cardinality"]
        counts = cls(
            split=data["split"],
            filtered=data["filtered"],
            num_relations=data["num_relations"],
            cardinality=None if cardinality is None else np.array(cardinality, dtype=np.int8),
        )
        for side, table in data["tables"].items():
            sums = np.array(table["sums"], dtype=np.int64).reshape(-1, 2, len(COLUMNS))
            counts._table(side)[table["relations"]] = sums
        return counts


def merge(parts: Iterable[Counts]) -> Counts:
    """The sum of all parts, the same bits in any order. ValueError when there is none."""
    total: Counts | None = None
    for part in parts:
        total = part if total is None else total + part
    if total is None:
        raise ValueError("no counts to merge")
    return total


def metrics_of(sums: npt.NDArray[np.int64], kind: str = "realistic") -> dict[str, float]:
    """Metrics of one row of sums, (len(COLUMNS),) int64: mrr, hits@k, mr, amri, ties, count.

    ``amri`` is 1 - (mr - 1) / (E[mr] - 1), the mean rank adjusted for chance (Berrendorf et al. 2020, "On the
    ambiguity of rank-based evaluation"): 1 is perfect, 0 is random; 0.0 when every query has one candidate.
    ``ties`` is the share of queries where a rival scores exactly as the true answer. A row without queries
    gives ``{"count": 0}``.
    """
    value = dict(zip(COLUMNS, sums.tolist(), strict=True))
    count = value["count"]
    if not count:
        return {"count": 0.0}
    reciprocal = (value[f"{kind}.reciprocal_high"] << _LIMB) + value[f"{kind}.reciprocal_low"]
    mean_rank = value[f"{kind}.rank2"] / (2 * count)
    expected = (value["candidates"] + count) / (2 * count)
    return {
        "mrr": reciprocal / (count << _FRACTION),
        **{f"hits@{k}": value[f"{kind}.hits{k}"] / count for k in HITS},
        "mr": mean_rank,
        "amri": 1.0 - (mean_rank - 1.0) / (expected - 1.0) if expected > 1.0 else 0.0,
        "ties": value["ties"] / count,
        "count": float(count),
    }


def _columns(
    optimistic: npt.NDArray[np.int64],
    pessimistic: npt.NDArray[np.int64],
    candidates: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """The addends of B queries, (B, len(COLUMNS)) int64, in the order of COLUMNS."""
    columns = [np.ones_like(optimistic), (pessimistic > optimistic).astype(np.int64), candidates]
    # Doubled ranks are integers for all three kinds.
    for doubled in (2 * optimistic, optimistic + pessimistic, 2 * pessimistic):
        # Two limbs of 24 bits: 2**39 queries fit before an int64 overflows.
        fixed = np.rint(np.ldexp(2.0 / doubled, _FRACTION)).astype(np.int64)
        columns += [doubled, fixed >> _LIMB, fixed & ((1 << _LIMB) - 1)]
        columns += [(doubled <= 2 * k).astype(np.int64) for k in HITS]
    return np.stack(columns, axis=1)


def _equal(a: npt.NDArray[Any] | None, b: npt.NDArray[Any] | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))
