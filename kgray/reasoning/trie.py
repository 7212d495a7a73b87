"""Path rules as a trie: bodies that begin alike are followed once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from kgray.reasoning.facts import Facts, Int64, spread
from kgray.reasoning.fired import Fired
from kgray.reasoning.rules import HOPS, NONE, Rules
from kgray.reasoning.walks import first, lengths, reach, second, third

_ENTRIES = 1 << 22
"""Entries of the longest rows held at once, but for a single query that has more."""


@dataclass(frozen=True)
class Level:
    """Nodes of one depth, ordered by their parents. relation: (m,) the step into each node; rule: (m,) the rule whose
    body ends there, -1 where none. offsets: (parents + 1,) nodes of each parent; those of depth one hang on the
    relation asked for, 0..2R-1."""

    relation: Int64
    rule: Int64
    offsets: Int64

    def children(self, parents: Int64) -> tuple[Int64, Int64]:
        """(position in ``parents``, node) of all children."""
        start = self.offsets[parents]
        return spread(start, self.offsets[parents + 1] - start)


def levels(rules: Rules, facts: Facts) -> list[Level]:
    """The trie of all path rules, each from X to Y, and from Y to X under the reciprocal of its conclusion."""
    own = np.flatnonzero(rules.is_path)
    body, hops = rules.body[own], rules.hops[own]
    # Read from the other end: last atom first, every relation turned round, what is absent still at the end.
    at = hops[:, None] - 1 - np.arange(HOPS)
    mirrored = np.take_along_axis(body, np.maximum(at, 0), axis=1)
    mirrored = np.where(at >= 0, facts.inverse(mirrored), NONE)
    body = np.concatenate([body, mirrored])
    rule, hops = np.tile(own, 2), np.tile(hops, 2)
    parent = np.concatenate([rules.relation[own], facts.inverse(rules.relation[own])])
    parents = 2 * facts.num_relations
    found = []
    for depth in range(HOPS):
        keys = parent * (2 * facts.num_relations) + body[:, depth]
        nodes, node = np.unique(keys, return_inverse=True)
        above, relation = np.divmod(nodes, max(2 * facts.num_relations, 1))
        ends = np.full(len(nodes), NONE, dtype=np.int64)
        ending = hops == depth + 1
        ends[node[ending]] = rule[ending]
        found.append(Level(relation, ends, np.searchsorted(above, np.arange(parents + 1))))
        parents = len(nodes)
        body, parent, rule, hops = body[~ending], node[~ending], rule[~ending], hops[~ending]
    return found


@dataclass(frozen=True)
class _Rows:
    """Query and node of each row, and where its walks have got to."""

    query: Int64
    node: Int64
    rows: sparse.csr_array

    def fired(self, level: Level) -> Fired:
        ending = np.flatnonzero(level.rule[self.node] != NONE)
        return Fired(self.query[ending], level.rule[self.node[ending]], self.rows[ending])

    def take(self, chosen: Int64 | slice) -> _Rows:
        return _Rows(self.query[chosen], self.node[chosen], self.rows[chosen])


class Trie:
    """Follows the bodies of all path rules that can answer a batch of queries."""

    def __init__(self, rules: Rules, facts: Facts) -> None:
        self.facts = facts
        self.levels = levels(rules, facts)

    def rows(self, entities: Int64, relations: Int64) -> Iterator[tuple[int, int, Fired]]:
        """(low, high, fired): what fired for queries low..high-1, all queries in turn."""
        facts, (one, two, three) = self.facts, self.levels
        query, node = one.children(relations)
        ones = _some(_Rows(query, node, first(facts, entities[query], one.relation[node])))
        row, node, reached = self._step(ones, two)
        before = ones.rows[row]
        query = ones.query[row]
        twos = _Rows(query, node, second(facts, entities[query], before, two.relation[node]))
        kept = np.flatnonzero(lengths(twos.rows))
        twos, before = twos.take(kept), before[kept]
        row, node, reached = self._step(twos, three)
        for low, high in _pieces(twos.query[row], reached, len(entities)):
            own = slice(*np.searchsorted(twos.query[row], [low, high]).tolist())
            at, last = row[own], node[own]
            query = twos.query[at]
            relation = three.relation[last]
            ends = third(facts, entities[query], before[at], twos.rows[at], two.relation[twos.node[at]], relation)
            threes = _Rows(query, last, ends)
            shorter = [ones.fired(one).between(low, high), twos.fired(two).between(low, high)]
            yield low, high, Fired.join([*shorter, threes.fired(three)])

    def _step(self, rows: _Rows, level: Level) -> tuple[Int64, Int64, Int64]:
        """Rows that go on, the nodes they go to, and how far they can get: (n,) int64 each."""
        row, node = level.children(rows.node)
        reached = np.minimum(self._reach(rows.rows, row, level.relation[node]), self.facts.num_entities)
        on = reached > 0
        return row[on], node[on], reached[on]

    def _reach(self, rows: sparse.csr_array, chosen: Int64, relations: Int64) -> Int64:
        return reach(self.facts, rows[chosen], relations)


def _some(rows: _Rows) -> _Rows:
    return rows.take(np.flatnonzero(lengths(rows.rows)))


def _pieces(query: Int64, cost: Int64, queries: int) -> Iterator[tuple[int, int]]:
    """Ranges of queries that cover all, each of bounded cost or a single one."""
    total = np.cumsum(np.bincount(query, weights=cost, minlength=queries))
    low = 0
    while low < queries:
        before = total[low - 1] if low else 0
        high = max(low + 1, int(np.searchsorted(total, before + _ENTRIES, side="right")))
        yield low, high
        low = high


