"""The message graph as compressed sparse rows.

Every training triple (h, r, t) gives two edges: into ``t`` from ``h`` with relation ``r``, and into ``h`` from ``t``
with the reciprocal relation ``r + R``. Both carry the position of their triple, so that removing a target triple
removes the edge and its reciprocal together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class NeighbourIndex:
    """Incoming edges by destination entity.

    offsets: (N + 1,) int64, edges of entity e are ``offsets[e]:offsets[e + 1]``.
    sources: (2T,) int64, the neighbour a message comes from.
    relations: (2T,) int64 in 0..2R-1, reciprocal ones from R on.
    triples: (2T,) int64, position of the edge's triple in the array the index was built from.
    """

    offsets: Int64
    sources: Int64
    relations: Int64
    triples: Int64
    num_triples: int

    @property
    def num_entities(self) -> int:
        return len(self.offsets) - 1

    @property
    def degrees(self) -> Int64:
        """(N,) int64, number of incoming edges, both directions counted."""
        return np.diff(self.offsets)

    @classmethod
    def build(cls, triples: Int64, num_entities: int, num_relations: int) -> NeighbourIndex:
        """Index ``triples`` (T, 3) of head, relation, tail.

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
