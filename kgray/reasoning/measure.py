"""How often a path body holds and how often its conclusion then does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse

from kgray.reasoning.config import RulesConfig
from kgray.reasoning.facts import Facts, Int64, find, spread
from kgray.reasoning.walks import first, lengths, reach, second, third

_LEAST_STARTS = 8
_ENTRIES = 1 << 23
_ROWS = 1 << 18
"""A chunk of bodies has at most about so many entries and rows, but for a single body that has more."""


@dataclass(frozen=True)
class Measure:
    """Support and size of path bodies over the given facts."""

    facts: Facts
    config: RulesConfig

    def measure(self, bodies: Int64, relations: Int64, which: Int64) -> tuple[Int64, Int64]:
        """Of n conclusions, each ``relations[i](X, Y) <- bodies[which[i]]``: (support, body size), (n,) int64.

        bodies: (b, 2 or 3) int64; which: (n,) int64 ascending.
        """
        support = np.zeros(len(relations), dtype=np.int64)
        size = np.zeros(len(relations), dtype=np.int64)
        starts = np.minimum(self._domain[1][bodies[:, 0] + 1] - self._domain[1][bodies[:, 0]], self._most)
        weight = starts * max(1, _ENTRIES // _ROWS) + self._most
        total = np.cumsum(weight)
        begin = 0
        while begin < len(bodies):
            before = int(total[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(total, before + _ENTRIES, side="right")))
            low, high = np.searchsorted(which, [begin, end])
            part = slice(int(low), int(high))
            support[part], size[part] = self._chunk(bodies[begin:end], relations[part], which[part] - begin)
            begin = end
        return support, size

    @property
    def _most(self) -> int:
        return self.config.max_groundings

    @cached_property
    def _domain(self) -> tuple[Int64, Int64]:
        """Entities with an edge of each relation, in an order drawn by the seed; their offsets (2R + 1,)."""
        relation, entity = np.divmod(np.flatnonzero(self.facts.degrees), max(self.facts.num_entities, 1))
        rank = np.random.default_rng(self.config.seed).permutation(self.facts.num_entities)
        order = np.lexsort((rank[entity], relation))
        offsets = np.searchsorted(relation, np.arange(2 * self.facts.num_relations + 1))
        return entity[order], offsets.astype(np.int64)

    @cached_property
    def _pairs(self) -> sparse.csr_array:
        """(N, N), 1 + the position of each pair that has a fact."""
        n = self.facts.num_entities
        numbers = np.arange(1, len(self.facts.pair_keys) + 1, dtype=np.int64)
        return sparse.csr_array((numbers, self.facts.pair_tails, self.facts.neighbours), shape=(n, n))

    def _chunk(self, bodies: Int64, relations: Int64, which: Int64) -> tuple[Int64, Int64]:
        facts = self.facts
        entities, offsets = self._domain
        start = offsets[bodies[:, 0]]
        body, place = spread(start, np.minimum(offsets[bodies[:, 0] + 1] - start, self._most))
        starts = entities[place]
        ones = first(facts, starts, bodies[body, 0])
        kept = self._affordable(body, reach(facts, ones, bodies[body, 1]))
        body, starts, ones = body[kept], starts[kept], ones[kept]
        rows = second(facts, starts, ones, bodies[body, 1])
        if bodies.shape[1] == 3:
            kept = self._affordable(body, reach(facts, rows, bodies[body, 2]))
            body, starts = body[kept], starts[kept]
            rows = third(facts, starts, ones[kept], rows[kept], bodies[body, 1], bodies[body, 2])
        size = np.bincount(body, weights=lengths(rows), minlength=len(bodies)).astype(np.int64)
        rows.data[:] = 1
        hits = sparse.csr_array(rows.multiply(self._pairs[starts]))
        pair = hits.data - 1
        span, fact = spread(facts.pair_offsets[pair], facts.pair_offsets[pair + 1] - facts.pair_offsets[pair])
        held = body[np.repeat(np.arange(len(body)), lengths(hits))[span]]
        keys, counts = np.unique(held * (2 * facts.num_relations) + facts.relations[fact], return_counts=True)
        found = find(keys, which * (2 * facts.num_relations) + relations)
        support = np.zeros(len(which), dtype=np.int64)
        support[found >= 0] = counts[found[found >= 0]]
        return support, size[which]

    def _affordable(self, body: Int64, cost: Int64) -> Int64:
        """Rows that go on: of each body the first ones, until they cost more than ``max_groundings``."""
        some = cost > 0
        total = np.cumsum(cost)
        begin = np.searchsorted(body, body)
        spent = total - (total[begin] - cost[begin])
        early = np.arange(len(body)) - begin < _LEAST_STARTS
        return np.flatnonzero(some & (early | (spent <= self._most)))
