"""Which path bodies hold of given pairs: the same question as in walks.py, asked from both ends.

Enumerates entities rather than rows, so it also tells the facts that ground a body.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kgray.reasoning.facts import Facts, Int64, find, spread

_STEPS = 1 << 22
"""Walks looked at together; bounds the memory of an enumeration."""


@dataclass(frozen=True)
class Paths:
    """Entity paths between B pairs, X first, all entities of a path different.

    query: (n,) int64 into the pairs asked for. pairs: (n, L) int64, positions in ``Facts.pair_keys`` of the L steps.
    """

    query: Int64
    pairs: Int64

    def bodies(self, facts: Facts) -> tuple[Int64, Int64]:
        """Every choice of relations along every path: (query, body), (m,) and (m, L) int64, each once."""
        size = 2 * facts.num_relations
        path = np.arange(len(self.query), dtype=np.int64)
        keys = self.query.copy()
        for step in range(self.pairs.shape[1]):
            pair = self.pairs[path, step]
            start = facts.pair_offsets[pair]
            again, place = spread(start, facts.pair_offsets[pair + 1] - start)
            path, keys = path[again], keys[again] * size + facts.relations[place]
        keys = np.unique(keys)
        columns = []
        for _ in range(self.pairs.shape[1]):
            keys, relation = np.divmod(keys, max(size, 1))
            columns.append(relation)
        return keys, np.stack(columns[::-1], axis=1)


def work(facts: Facts, heads: Int64, tails: Int64, length: int) -> Int64:
    """Steps that :func:`paths_between` takes for each pair, (B,) int64."""
    count = (_one_each, _degree, _walks)[length - 1]
    return np.minimum(count(facts, heads), count(facts, tails))


def paths_between(facts: Facts, heads: Int64, tails: Int64, length: int) -> Paths:
    """Paths of 1, 2 or 3 atoms between B pairs; those with head = tail have none."""
    # The marks of `_three` are queries x entities.
    limit = max(1, 8 * _STEPS // max(facts.num_entities, 1))
    finder = (_one, _two, _three)[length - 1]
    found = [Paths(np.zeros(0, dtype=np.int64), np.zeros((0, length), dtype=np.int64))]
    for start, stop in pieces(work(facts, heads, tails, length), most=_STEPS, limit=limit):
        paths = finder(facts, heads[start:stop], tails[start:stop])
        found.append(Paths(paths.query + start, paths.pairs))
    return Paths(np.concatenate([p.query for p in found]), np.concatenate([p.pairs for p in found]))


def pieces(cost: Int64, *, most: int, limit: int) -> list[tuple[int, int]]:
    """Stretches (start, stop) of at most ``limit`` pairs and of ``most`` steps, or of one pair that costs more.

    cost: (B,) int64, see :func:`work`.
    """
    total = np.cumsum(cost)
    found, start = [], 0
    while start < len(cost):
        before = int(total[start - 1]) if start else 0
        stop = int(np.searchsorted(total, before + most, side="right"))
        stop = min(max(stop, start + 1), start + limit)
        found.append((start, stop))
        start = stop
    return found


def _one_each(facts: Facts, entities: Int64) -> Int64:
    return np.ones(len(entities), dtype=np.int64)


def _degree(facts: Facts, entities: Int64) -> Int64:
    others: Int64 = facts.neighbours[entities + 1] - facts.neighbours[entities]
    return others


def _walks(facts: Facts, entities: Int64) -> Int64:
    """Walks of two steps from each entity."""
    sums = np.concatenate([[0], np.cumsum(_degree(facts, facts.pair_tails))])
    walks: Int64 = sums[facts.neighbours[entities + 1]] - sums[facts.neighbours[entities]]
    return walks


def _one(facts: Facts, heads: Int64, tails: Int64) -> Paths:
    pair = find(facts.pair_keys, heads * facts.num_entities + tails)
    query = np.flatnonzero((pair >= 0) & (heads != tails))
    return Paths(query, pair[query][:, None])


def _turned(facts: Facts, paths: Paths, turned: NDArray[np.bool_]) -> Paths:
    """Paths found from the other end, the right way round."""
    flip = turned[paths.query]
    pairs = np.where(flip[:, None], facts.mirror[paths.pairs[:, ::-1]], paths.pairs)
    return Paths(paths.query, pairs)


def _two(facts: Facts, heads: Int64, tails: Int64) -> Paths:
    turned = _degree(facts, heads) > _degree(facts, tails)
    x, y = np.where(turned, tails, heads), np.where(turned, heads, tails)
    query, pair = spread(facts.neighbours[x], _degree(facts, x))
    z = facts.pair_tails[pair]
    last = find(facts.pair_keys, z * facts.num_entities + y[query])
    kept = (last >= 0) & (x != y)[query]
    return _turned(facts, Paths(query[kept], np.stack([pair[kept], last[kept]], axis=1)), turned)


def _three(facts: Facts, heads: Int64, tails: Int64) -> Paths:
    turned = _walks(facts, heads) > _walks(facts, tails)
    x, y = np.where(turned, tails, heads), np.where(turned, heads, tails)
    marks = np.zeros((len(x), facts.num_entities), dtype=bool)
    query, pair = spread(facts.neighbours[y], _degree(facts, y))
    marks[query, facts.pair_tails[pair]] = True
    marks[np.arange(len(x)), x] = False
    query, pair = spread(facts.neighbours[x], _degree(facts, x))
    kept = (facts.pair_tails[pair] != y[query]) & (x != y)[query]
    query, pair = query[kept], pair[kept]
    z1 = facts.pair_tails[pair]
    again, middle = spread(facts.neighbours[z1], _degree(facts, z1))
    z2 = facts.pair_tails[middle]
    kept = np.flatnonzero(marks.reshape(-1)[query[again] * facts.num_entities + z2])
    again, middle, z2 = again[kept], middle[kept], z2[kept]
    query, pair = query[again], pair[again]
    last = find(facts.pair_keys, z2 * facts.num_entities + y[query])
    return _turned(facts, Paths(query, np.stack([pair, middle, last], axis=1)), turned)
