"""The facts rules are counted and grounded on, indexed by entity, by pair and as one sparse matrix.

Every triple (h, r, t) stands twice: as itself and as its reciprocal (t, r + R, h). Loops (h = t) are left out: rules
are read under object identity (AnyBURL, Meilicke et al. 2019), different variables are different entities, so no atom
of a rule holds a loop. As the pair of the conclusion then never is the pair of a body atom of a longer rule, no body
can contain the fact it predicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from kgray.errors import TrainingError

Int64 = NDArray[np.int64]
_MOST_ROWS = 2**31


def spread(starts: Int64, lengths: Int64) -> tuple[Int64, Int64]:
    """All positions of B spans, one after another: (span, position), both (sum of lengths,) int64."""
    spans = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    ends = np.cumsum(lengths)
    return spans, np.arange(len(spans), dtype=np.int64) - np.repeat(ends - lengths - starts, lengths)


def find(keys: Int64, wanted: Int64) -> Int64:
    """Position of each wanted key in the ascending ``keys``, -1 where it is not there; (n,) int64."""
    if not len(keys):
        return np.full(len(wanted), -1, dtype=np.int64)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, place, -1)


@dataclass(frozen=True)
class Facts:
    """Distinct facts without loops, both directions; relations 0..2R-1.

    heads, relations, tails: (F,) int64, ordered by head, tail, relation, so that the facts of an entity and of a pair
    stand together. pair_keys: (P,) int64 ascending, ``head * N + tail`` of every pair with a fact.
    pair_offsets: (P + 1,) facts of each pair. neighbours: (N + 1,) pairs of each entity as head.
    matrix: ((2R + 1) * N, N) int64 CSR; row ``r * N + h`` holds the tails of (h, r), the last N rows are the identity.

    Memory is 8 (2R * N) bytes of offsets besides the facts: for graphs of millions of entities with hundreds of
    relations a compressed row index would be needed.
    """

    num_entities: int
    num_relations: int
    heads: Int64
    relations: Int64
    tails: Int64
    pair_keys: Int64
    pair_offsets: Int64
    neighbours: Int64
    matrix: sparse.csr_array

    @classmethod
    def build(cls, triples: Int64, num_entities: int, num_relations: int) -> Facts:
        """Index ``triples`` (n, 3) of head, relation, tail; duplicates count once.

        Raises ValueError for an id out of range, TrainingError for a graph too large for :attr:`matrix`.
        """
        triples = np.asarray(triples, dtype=np.int64).reshape(-1, 3)
        n, r = num_entities, num_relations
        # Columns of walks.py are rows of the matrix, 32-bit like its columns; keys of two entities then fit 63 bits.
        if (2 * r + 1) * n >= _MOST_ROWS:
            raise TrainingError(
                f"rules need (2 x relations + 1) x entities below {_MOST_ROWS}; {r} relations and {n} entities are more"
            )
        limits = np.array([n, r, n])
        if len(triples) and (triples.min() < 0 or bool((triples.max(axis=0) >= limits).any())):
            raise ValueError(f"triple ids outside {n} entities and {r} relations")
        triples = triples[triples[:, 0] != triples[:, 2]]
        head, relation, tail = triples.T
        forward = (head * n + tail) * (2 * r) + relation
        backward = (tail * n + head) * (2 * r) + relation + r
        pairs, relations = np.divmod(np.unique(np.concatenate([forward, backward])), max(2 * r, 1))
        heads, tails = np.divmod(pairs, max(n, 1))
        pair_keys, first = np.unique(pairs, return_index=True)
        neighbours = np.searchsorted(pair_keys, np.arange(n + 1, dtype=np.int64) * n)
        rows = np.concatenate([relations * n + heads, 2 * r * n + np.arange(n)])
        columns = np.concatenate([tails, np.arange(n)])
        ones = np.ones(len(rows), dtype=np.int64)
        matrix = sparse.csr_array((ones, (rows, columns)), shape=((2 * r + 1) * n, n))
        offsets = np.append(first, len(pairs)).astype(np.int64)
        return cls(n, r, heads, relations, tails, pair_keys, offsets, neighbours.astype(np.int64), matrix)

    def inverse(self, relations: Int64) -> Int64:
        """r to r + R and back."""
        return np.where(relations < self.num_relations, relations + self.num_relations, relations - self.num_relations)

    def contains(self, heads: Int64, relations: Int64, tails: Int64) -> NDArray[np.bool_]:
        """Whether each (head, relation, tail) is a fact; (n,) bool."""
        return find(self.keys, (heads * self.num_entities + tails) * (2 * self.num_relations) + relations) >= 0

    def edges(self, entities: Int64) -> tuple[Int64, Int64]:
        """All facts with the given heads: (position in ``entities``, position in the facts)."""
        start = self.pair_offsets[self.neighbours[entities]]
        return spread(start, self.pair_offsets[self.neighbours[entities + 1]] - start)

    @cached_property
    def keys(self) -> Int64:
        """(F,) int64 ascending: (pair key) * 2R + relation of every fact."""
        return (self.heads * self.num_entities + self.tails) * (2 * self.num_relations) + self.relations

    @cached_property
    def pair_tails(self) -> Int64:
        """(P,) int64, second entity of each pair."""
        return self.pair_keys % max(self.num_entities, 1)

    @cached_property
    def mirror(self) -> Int64:
        """(P,) int64, position of the pair (b, a) for each pair (a, b); every pair has one."""
        first, second = np.divmod(self.pair_keys, max(self.num_entities, 1))
        return find(self.pair_keys, second * self.num_entities + first)

    @cached_property
    def degrees(self) -> Int64:
        """(2R * N,) int64, number of tails of each ``r * N + h``."""
        tails: Int64 = np.diff(self.matrix.indptr).astype(np.int64)
        return tails[: 2 * self.num_relations * self.num_entities]

    @cached_property
    def sizes(self) -> Int64:
        """(2R,) int64, number of facts of each relation."""
        return np.bincount(self.relations, minlength=2 * self.num_relations)

    @cached_property
    def together(self) -> tuple[Int64, Int64, Int64]:
        """Relations that hold of one pair: (pair, a, b) for every ordered choice, a = b too."""
        sizes = np.diff(self.pair_offsets)
        fact, other = spread(np.repeat(self.pair_offsets[:-1], sizes), np.repeat(sizes, sizes))
        pairs = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)[fact]
        return pairs, self.relations[fact], self.relations[other]

    @cached_property
    def closed(self) -> tuple[Int64, Int64, NDArray[np.bool_]]:
        """Walks of two steps that come back: ascending keys ``(a * 2R + b) * N + e``, how many z have a(e, z) and
        b(z, e), and a (2R, 2R) table of the (a, b) that have any."""
        pairs, a, b = self.together
        b = self.inverse(b)
        entity = self.pair_keys[pairs] // max(self.num_entities, 1)
        keys, counts = np.unique((a * (2 * self.num_relations) + b) * self.num_entities + entity, return_counts=True)
        some = np.zeros((2 * self.num_relations,) * 2, dtype=bool)
        some[a, b] = True
        return keys, counts, some
