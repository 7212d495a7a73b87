"""Which answers to a query are already known: the filter of ranks, negatives and served predictions.

One query of each kind looks up one row of a CSR (compressed sparse row) table: ``(head, relation) -> tails``,
``(relation, tail) -> heads``, ``(head, tail) -> relations``. Tables are keyed by a single int64, so a batch
of queries costs one binary search a query plus the answers themselves; no mask of the size batch x entities
or batch x triples is ever made. Relations here are always "real" ones, 0..R-1. Arguments called ``heads``,
``relations``, ``tails`` are (B,) integers: lists, numpy arrays or torch tensors on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kgray.graph.members import Members

Ints = npt.NDArray[np.int64]
"""A one-dimensional int64 array."""

_TABLES = ("tails", "heads", "relations")
_FIELDS = ("keys", "offsets", "values")


@dataclass(frozen=True, slots=True)
class KeyedRows:
    """CSR table: the row of ``keys[i]`` is ``values[offsets[i]:offsets[i + 1]]``, ascending.

    ``keys`` (K,) int64 strictly ascending, ``offsets`` (K+1,) int64, ``values`` (V,) int32 or int64.
    """

    keys: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    values: npt.NDArray[Any]

    @classmethod
    def build(cls, keys: Ints, values: Ints, num_values: int) -> KeyedRows:
        """Group ``values`` by ``keys`` (both (V,)); duplicates of a pair are kept once."""
        order = np.lexsort((values, keys))
        keys, values = keys[order], values[order]
        if len(keys):
            fresh = np.empty(len(keys), dtype=bool)
            fresh[0] = True
            np.not_equal(keys[1:], keys[:-1], out=fresh[1:])
            fresh[1:] |= values[1:] != values[:-1]
            keys, values = keys[fresh], values[fresh]
        unique, first = np.unique(keys, return_index=True)
        offsets = np.append(first, len(keys)).astype(np.int64)
        # Half the memory for every graph below two thousand million entities.
        narrow = np.int32 if num_values <= np.iinfo(np.int32).max else np.int64
        return cls(unique.astype(np.int64), offsets, values.astype(narrow))

    def spans(self, keys: Ints) -> tuple[Ints, Ints]:
        """Start in ``values`` and length of each key's row, both (B,) int64; length 0 for an absent key."""
        if not len(self.keys):
            return np.zeros(len(keys), dtype=np.int64), np.zeros(len(keys), dtype=np.int64)
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        start = self.offsets[place]
        length = np.where(self.keys[place] == keys, self.offsets[place + 1] - start, 0)
        return start, length

    def lookup(self, keys: Ints) -> tuple[Ints, Ints]:
        """All values of all keys: ``(rows, values)``, both int64, where ``rows[i]`` indexes ``keys``."""
        start, length = self.spans(keys)
        rows = np.repeat(np.arange(len(keys), dtype=np.int64), length)
        ends = np.cumsum(length)
        within = np.arange(len(rows), dtype=np.int64) - np.repeat(ends - length, length)
        return rows, self.values[start[rows] + within].astype(np.int64)


@dataclass(frozen=True, slots=True)
class FilterIndex:
    """Known triples, looked up by any two of head, relation, tail.

    Made by :meth:`build`; its arrays go to disk by :meth:`to_arrays` and come back, possibly memory-mapped,
    by :meth:`from_arrays`. Which splits it is built from is the caller's duty: train for negatives,
    train+valid for validation, all for the test (see ``kgray.evaluation.ranking.filter_splits``).
    Lookups raise ValueError on an id out of range: it would alias the key of another query.
    """

    num_entities: int
    num_relations: int
    by_head_relation: KeyedRows
    by_relation_tail: KeyedRows
    by_head_tail: KeyedRows

    @classmethod
    def build(cls, triples: npt.NDArray[Any], num_entities: int, num_relations: int) -> FilterIndex:
        """Index ``triples``, (n, 3) integers head, relation, tail; duplicates count once.

        Raises ValueError when an id lies outside ``[0, num_entities)`` or ``[0, num_relations)``, or when the
        graph is so large that a pair of ids does not fit 63 bits.
        """
        triples = np.asarray(triples, dtype=np.int64).reshape(-1, 3)
        if num_entities * max(num_entities, num_relations) >= 2**63:
            raise ValueError(f"{num_entities} entities x {num_relations} relations do not fit a 63-bit key")
        head = checked("entity", triples[:, 0], num_entities)
        relation = checked("relation", triples[:, 1], num_relations)
        tail = checked("entity", triples[:, 2], num_entities)
        return cls(
            num_entities=num_entities,
            num_relations=num_relations,
            by_head_relation=KeyedRows.build(head * num_relations + relation, tail, num_entities),
            by_relation_tail=KeyedRows.build(relation * num_entities + tail, head, num_entities),
            by_head_tail=KeyedRows.build(head * num_entities + tail, relation, num_relations),
        )

    def tails(
        self, heads: npt.ArrayLike, relations: npt.ArrayLike, among: Members | None = None
    ) -> tuple[Ints, Ints]:
        """Known tails of B queries ``(head, relation, ?)``: ``(rows, entities)``, int64, rows in 0..B-1, both
        ascending. among: the only entities wanted; None wants all."""
        h, r = self._entity_ids(heads), self._relation_ids(relations)
        return only(self.by_head_relation.lookup(h * self.num_relations + r), among)

    def heads(
        self, relations: npt.ArrayLike, tails: npt.ArrayLike, among: Members | None = None
    ) -> tuple[Ints, Ints]:
        """Known heads of B queries ``(?, relation, tail)``: ``(rows, entities)``."""
        r, t = self._relation_ids(relations), self._entity_ids(tails)
        return only(self.by_relation_tail.lookup(r * self.num_entities + t), among)

    def relations(self, heads: npt.ArrayLike, tails: npt.ArrayLike) -> tuple[Ints, Ints]:
        """Known relations of B queries ``(head, ?, tail)``: ``(rows, relations)``."""
        h, t = self._entity_ids(heads), self._entity_ids(tails)
        return self.by_head_tail.lookup(h * self.num_entities + t)

    def contains(self, heads: npt.ArrayLike, relations: npt.ArrayLike, tails: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether each of B triples is known, (B,) bool; costs the relations between each pair."""
        wanted = self._relation_ids(relations)
        rows, found = self.relations(heads, tails)
        known = np.zeros(len(wanted), dtype=bool)
        known[rows[found == wanted[rows]]] = True
        return known

    @property
    def num_triples(self) -> int:
        """Distinct triples in the index."""
        return len(self.by_head_relation.values)

    def triples(self) -> npt.NDArray[np.int64]:
        """The distinct triples, (n, 3) int64, sorted by head, relation, tail."""
        table = self.by_head_relation
        keys = np.repeat(table.keys, np.diff(table.offsets))
        head, relation = np.divmod(keys, max(self.num_relations, 1))
        return np.stack([head, relation, table.values.astype(np.int64)], axis=1)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Flat arrays, what :meth:`from_arrays` takes: ``size`` (N, R), ``tails.keys``, ``tails.offsets``..."""
        tables = (self.by_head_relation, self.by_relation_tail, self.by_head_tail)
        return {
            "size": np.array([self.num_entities, self.num_relations], dtype=np.int64),
            **{
                f"{name}.{field}": getattr(table, field)
                for name, table in zip(_TABLES, tables, strict=True)
                for field in _FIELDS
            },
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> FilterIndex:
        """The index :meth:`to_arrays` wrote; arrays are used as they are, no copy. KeyError if one lacks."""
        num_entities, num_relations = arrays["size"].tolist()
        tails, heads, relations = (KeyedRows(*(arrays[f"{name}.{field}"] for field in _FIELDS)) for name in _TABLES)
        return cls(num_entities, num_relations, tails, heads, relations)

    def _entity_ids(self, ids: npt.ArrayLike) -> Ints:
        return checked("entity", ids, self.num_entities)

    def _relation_ids(self, ids: npt.ArrayLike) -> Ints:
        return checked("relation", ids, self.num_relations)


class KnownAnswers(Protocol):
    """Known answers to queries, wherever the facts lie; see :class:`FilterIndex`."""

    @property
    def num_entities(self) -> int: ...
    @property
    def num_relations(self) -> int: ...
    def tails(
        self, heads: npt.ArrayLike, relations: npt.ArrayLike, among: Members | None = None
    ) -> tuple[Ints, Ints]: ...
    def heads(
        self, relations: npt.ArrayLike, tails: npt.ArrayLike, among: Members | None = None
    ) -> tuple[Ints, Ints]: ...
    def relations(self, heads: npt.ArrayLike, tails: npt.ArrayLike) -> tuple[Ints, Ints]: ...


@dataclass(frozen=True, slots=True)
class Layered:
    """The facts of two indexes of one graph, as one: a large one that stays where it lies and a small one."""

    below: KnownAnswers
    above: KnownAnswers

    @property
    def num_entities(self) -> int:
        return self.below.num_entities

    @property
    def num_relations(self) -> int:
        return self.below.num_relations

    def tails(
        self, heads: npt.ArrayLike, relations: npt.ArrayLike, among: Members | None = None
    ) -> tuple[Ints, Ints]:
        """See :meth:`FilterIndex.tails`."""
        return _united(self.below.tails(heads, relations, among), self.above.tails(heads, relations, among))

    def heads(
        self, relations: npt.ArrayLike, tails: npt.ArrayLike, among: Members | None = None
    ) -> tuple[Ints, Ints]:
        """See :meth:`FilterIndex.heads`."""
        return _united(self.below.heads(relations, tails, among), self.above.heads(relations, tails, among))

    def relations(self, heads: npt.ArrayLike, tails: npt.ArrayLike) -> tuple[Ints, Ints]:
        """See :meth:`FilterIndex.relations`."""
        return _united(self.below.relations(heads, tails), self.above.relations(heads, tails))


def only(answers: tuple[Ints, Ints], among: Members | None) -> tuple[Ints, Ints]:
    """The (rows, values) whose values are among those wanted."""
    if among is None:
        return answers
    wanted = among.positions_in(answers[1])
    return answers[0][wanted], answers[1][wanted]


def _united(one: tuple[Ints, Ints], other: tuple[Ints, Ints]) -> tuple[Ints, Ints]:
    """Two answers as one, by ascending row and value, what both know once."""
    if not len(other[0]):
        return one
    rows, values = (np.concatenate(parts) for parts in zip(one, other, strict=True))
    order = np.lexsort((values, rows))
    rows, values = rows[order], values[order]
    fresh = np.ones(len(rows), dtype=bool)
    fresh[1:] = (rows[1:] != rows[:-1]) | (values[1:] != values[:-1])
    return rows[fresh], values[fresh]


def checked(what: str, ids: npt.ArrayLike, limit: int) -> Ints:
    """``ids`` as contiguous int64, every one in ``[0, limit)``."""
    array = np.ascontiguousarray(ids, dtype=np.int64).reshape(-1)
    if array.size and (int(array.min()) < 0 or int(array.max()) >= limit):
        wrong = int(array.min()) if int(array.min()) < 0 else int(array.max())
        raise ValueError(f"{what} id {wrong} outside 0..{limit - 1}")
    return array
