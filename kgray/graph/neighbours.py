"""The message graph as compressed sparse rows.

Every training triple (h, r, t) gives two edges: into ``t`` from ``h`` with relation ``r``, and into ``h`` from ``t``
with the reciprocal relation ``r + R``. Both carry the position of their triple, so that removing a target triple
removes the edge and its reciprocal together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Ints = NDArray[Any]
"""An array of integers of any width: what lies on disk or travels is as narrow as its numbers allow."""


class Edges(NamedTuple):
    """Incoming edges: where a message comes from, by which relation (0..2R-1) and triple; (E,) integers each."""

    sources: Ints
    relations: Ints
    triples: Ints


class MessageIndex(Protocol):
    """The message graph as a sampler sees it, wherever its rows lie.

    Every row (an entity's incoming edges) has one order, the same in every body: a position in a row names the same
    edge everywhere, and so do random positions drawn by whoever samples.
    """

    @property
    def num_entities(self) -> int: ...
    @property
    def num_triples(self) -> int: ...
    @property
    def degrees(self) -> Ints:
        """(N,) integers, number of incoming edges, both directions counted."""
        ...

    def degrees_of(self, nodes: Int64) -> Int64:
        """(n,) int64 of (n,) entity ids."""
        ...

    def edges(self, whole: Int64, hubs: Int64, drawn: Int64, hop: int = 0) -> Edges:
        """The complete rows of the entities ``whole`` (a,), one after another, then of each of ``hubs`` (b,) the edges
        at the positions ``drawn`` (b, k) of its row. hop: which one this is for, 0 the nearest; for counters only."""
        ...


@dataclass(frozen=True, slots=True)
class NeighbourIndex:
    """Incoming edges by destination entity, in this process's memory or mapped into it.

    offsets: (N + 1,) int64, edges of entity e are ``offsets[e]:offsets[e + 1]``.
    sources: (2T,) integers, the neighbour a message comes from.
    relations: (2T,) integers in 0..2R-1, reciprocal ones from R on.
    triples: (2T,) integers, position of the edge's triple in the array the index was built from.
    """

    offsets: Int64
    sources: Ints
    relations: Ints
    triples: Ints
    num_triples: int

    @property
    def num_entities(self) -> int:
        return len(self.offsets) - 1

    @property
    def degrees(self) -> Int64:
        """(N,) int64, number of incoming edges, both directions counted."""
        return np.diff(self.offsets)

    def degrees_of(self, nodes: Int64) -> Int64:
        """(n,) int64 of (n,) entity ids."""
        return self.offsets[nodes + 1] - self.offsets[nodes]

    def edges(self, whole: Int64, hubs: Int64, drawn: Int64, hop: int = 0) -> Edges:
        """See :class:`MessageIndex`."""
        places = row_positions(self.offsets[whole], self.degrees_of(whole))
        if len(hubs):
            places = np.concatenate([places, (drawn + self.offsets[hubs][:, None]).ravel()])
        return Edges(self.sources.take(places), self.relations.take(places), self.triples.take(places))

    @classmethod
    def build(cls, triples: Int64, num_entities: int, num_relations: int) -> NeighbourIndex:
        """Index ``triples`` (T, 3) of head, relation, tail; all arrays int64.

        Raises ValueError when an id lies outside its range.
        """
        triples = np.asarray(triples, dtype=np.int64).reshape(-1, 3)
        heads, relations, tails = triples[:, 0], triples[:, 1], triples[:, 2]
        if len(triples) and (
            triples.min() < 0 or max(heads.max(), tails.max()) >= num_entities or relations.max() >= num_relations
        ):
            raise ValueError(f"triple ids outside {num_entities} entities and {num_relations} relations")
        destinations = np.concatenate([tails, heads])
        # A stable sort keeps the order of the triples within an entity: the same input gives the same index.
        order = np.argsort(destinations, kind="stable")
        offsets = np.zeros(num_entities + 1, dtype=np.int64)
        np.cumsum(np.bincount(destinations, minlength=num_entities), out=offsets[1:])
        positions = np.arange(len(triples), dtype=np.int64)
        return cls(
            offsets=offsets,
            sources=np.concatenate([heads, tails])[order],
            relations=np.concatenate([relations, relations + num_relations])[order],
            triples=np.concatenate([positions, positions])[order],
            num_triples=len(triples),
        )


def row_positions(starts: Int64, lengths: Int64) -> Int64:
    """All positions of spans of given (n,) starts and lengths, one after another; (sum of lengths,) int64."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    positions: Int64 = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
    return positions


def narrow(limit: int) -> type[np.signedinteger[Any]]:
    """The narrowest of int16, int32, int64 that holds 0..limit-1."""
    return next(kind for kind in (np.int16, np.int32, np.int64) if limit - 1 <= np.iinfo(kind).max)
