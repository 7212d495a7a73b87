"""What training facts say of a pair of entities: the relations around either end, and the paths between them.

The relational context and the relational paths of PathCon (Wang, Ren and Leskovec 2021), as counts and bags rather
than as messages. Nothing here holds the fact that is asked for: it is taken off the counts around its ends, and of
paths of one edge; longer paths cannot hold it, as all their entities are different (:mod:`kgray.reasoning.facts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from kgray.reasoning.facts import Facts, Int64, find, spread
from kgray.reasoning.paths import paths_between, pieces, work
from kgray.reasoning.rules import pack

Float32 = NDArray[np.float32]
_SAMPLED = 20_000
"""Training pairs on which kinds of paths are counted: enough for those that many pairs have."""
_PIECE = 4096
_STEPS = 1 << 19
"""Steps taken together; bounds the memory of a lookup."""
_MOST_STEPS = 1 << 17
"""Steps taken for the paths of one length of a pair; a pair of hubs that needs more has none of that length. Those of
FB15k-237 need 50,000 at most."""


@dataclass(frozen=True)
class Bag:
    """Numbers of B pairs, one after another: those of pair i are ``items[offsets[i]:offsets[i + 1]]``.

    offsets: (B + 1,) int64; items: (n,) int32, ascending within a pair.
    """

    offsets: Int64
    items: NDArray[np.int32]

    @classmethod
    def of(cls, pairs: Int64, items: Int64, count: int) -> Bag:
        """From (pair, item) entries in any order, each once."""
        order = np.lexsort((items, pairs))
        offsets = np.zeros(count + 1, dtype=np.int64)
        np.cumsum(np.bincount(pairs, minlength=count), out=offsets[1:])
        return cls(offsets, items[order].astype(np.int32))

    @classmethod
    def concatenate(cls, bags: list[Bag]) -> Bag:
        lengths = [np.diff(bag.offsets) for bag in bags]
        offsets = np.concatenate([[0], np.cumsum(np.concatenate([*lengths, np.zeros(0, dtype=np.int64)]))])
        return cls(offsets.astype(np.int64), np.concatenate([bag.items for bag in bags] or [np.zeros(0, np.int32)]))

    def take(self, pairs: Int64) -> Bag:
        lengths = self.offsets[pairs + 1] - self.offsets[pairs]
        _, place = spread(self.offsets[pairs], lengths)
        return Bag(np.concatenate([[0], np.cumsum(lengths)]), self.items[place])


@dataclass(frozen=True)
class PairIndex:
    """Features of pairs over the training facts.

    bodies: by length 1..3 the packed path bodies that are told apart, (n,) int64 ascending; they are numbered through
    from the shortest on. remove: see :class:`kgray.model.relations_config.RelationsConfig`.
    """

    facts: Facts
    bodies: Mapping[int, Int64]
    remove: str

    @property
    def num_bodies(self) -> int:
        return sum(len(keys) for keys in self.bodies.values())

    @classmethod
    def build(cls, triples: Int64, facts: Facts, *, hops: int, bodies: int, remove: str, seed: int) -> PairIndex:
        """Choose the ``bodies`` kinds of paths that tell the most of the relations of training ``triples`` (n, 3)."""
        chosen = np.sort(np.random.default_rng(seed).permutation(len(triples))[:_SAMPLED])
        sample = triples[chosen]
        whole = cls(facts, {}, remove)
        relation = sample[:, 1]
        keys, gains = [], []
        for length in range(1, hops + 1):
            cells = [np.zeros((3, 0), dtype=np.int64)]
            for pairs, packed in whole._packed(sample[:, 0], sample[:, 2], length, relation):
                cells = [_counted(np.concatenate([*cells, [packed, relation[pairs], np.ones_like(packed)]], axis=1))]
            kinds, gain = _telling(cells[0], relation, facts.num_relations)
            keys.append(kinds)
            gains.append(gain)
        order = np.argsort(-np.concatenate([*gains, np.zeros(0)]), kind="stable")[:bodies]
        kept = np.zeros(sum(map(len, keys)), dtype=bool)
        kept[order] = True
        parts = np.split(kept, np.cumsum([len(kinds) for kinds in keys])[:-1]) if keys else []
        told = {n + 1: kinds[part] for n, (kinds, part) in enumerate(zip(keys, parts, strict=True))}
        return cls(facts, told, remove)

    def context(self, entities: Int64, others: Int64, relations: Int64 | None, *, heads: bool) -> Float32:
        """(B, 2R) log(1 + edges) of each relation around ``entities`` (B,), reciprocal ones from R on.

        relations: (B,) of the facts (entity, r, other), or (other, r, entity) where the entities are no ``heads``,
        that are left out; None where nothing is asked of training facts.
        """
        counts = self._around[entities].toarray()
        rows = np.arange(len(entities))
        if self.remove == "pair":
            pairs, place = self._between(entities, others)
            np.subtract.at(counts, (pairs, self.facts.relations[place]), 1)
        elif relations is not None:
            own = relations if heads else relations + self.facts.num_relations
            there = self.facts.contains(entities, own, others)
            counts[rows[there], own[there]] -= 1
        logs: Float32 = np.log1p(counts).astype(np.float32)
        return logs

    def paths(self, heads: Int64, tails: Int64, relations: Int64 | None = None) -> Bag:
        """Kinds of paths from each head to its tail, but for the fact (head, relation, tail) itself where given."""
        parts = []
        for start in range(0, len(heads), _PIECE):
            stop = min(start + _PIECE, len(heads))
            own = None if relations is None else relations[start:stop]
            parts.append(self._paths(heads[start:stop], tails[start:stop], own))
        return Bag.concatenate(parts)

    def _paths(self, heads: Int64, tails: Int64, relations: Int64 | None) -> Bag:
        pairs, items, first = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)], 0
        for length, keys in self.bodies.items():
            for pair, packed in self._packed(heads, tails, length, relations):
                number = find(keys, packed)
                pairs.append(pair[number >= 0])
                items.append(number[number >= 0] + first)
            first += len(keys)
        return Bag.of(np.concatenate(pairs), np.concatenate(items), len(heads))

    def _packed(
        self, heads: Int64, tails: Int64, length: int, relations: Int64 | None
    ) -> Iterator[tuple[Int64, Int64]]:
        """(pair, packed body) of all paths of a length, each once, but for the facts left out; in pieces, as between
        the pairs of a dense graph there are more than memory holds."""
        if length == 1 and self.remove == "pair":
            return
        cost = work(self.facts, heads, tails, length)
        cheap = np.flatnonzero(cost <= _MOST_STEPS)
        for start, stop in pieces(cost[cheap], most=_STEPS, limit=_PIECE):
            some = cheap[start:stop]
            pairs, body = paths_between(self.facts, heads[some], tails[some], length).bodies(self.facts)
            pairs = some[pairs]
            if length == 1 and relations is not None:
                other = body[:, 0] != relations[pairs]
                pairs, body = pairs[other], body[other]
            yield pairs, pack(self.facts.num_relations, body)

    def _between(self, heads: Int64, tails: Int64) -> tuple[Int64, Int64]:
        """(pair, position) of all facts from each head to its tail."""
        facts = self.facts
        pair = find(facts.pair_keys, heads * facts.num_entities + tails)
        adjacent = np.flatnonzero(pair >= 0)
        start = facts.pair_offsets[pair[adjacent]]
        which, place = spread(start, facts.pair_offsets[pair[adjacent] + 1] - start)
        return adjacent[which], place

    @cached_property
    def _around(self) -> sparse.csr_array:
        """(N, 2R) int32, facts of each relation from each entity."""
        facts = self.facts
        ones = np.ones(len(facts.heads), dtype=np.int32)
        shape = (facts.num_entities, 2 * facts.num_relations)
        return sparse.csr_array((ones, (facts.heads, facts.relations)), shape=shape)

    def to_arrays(self) -> dict[str, Int64]:
        """Its bodies as flat arrays, what :meth:`from_arrays` takes beside the facts."""
        return {f"bodies.{length}": keys for length, keys in self.bodies.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], facts: Facts, remove: str) -> PairIndex:
        """What :meth:`to_arrays` gave."""
        lengths = sorted(int(name.removeprefix("bodies.")) for name in arrays if name.startswith("bodies."))
        return cls(facts, {length: arrays[f"bodies.{length}"] for length in lengths}, remove)


def _counted(cells: Int64) -> Int64:
    """(3, m) bodies, relations and how often they met, each two once."""
    order = np.lexsort(cells[1::-1])
    cells = cells[:, order]
    new = np.ones(cells.shape[1], dtype=bool)
    new[1:] = (cells[:2, 1:] != cells[:2, :-1]).any(axis=0)
    first = np.flatnonzero(new)
    return np.stack([*cells[:2, first], np.add.reduceat(cells[2], first)]) if len(first) else cells


def _telling(cells: Int64, relations: Int64, num_relations: int) -> tuple[Int64, NDArray[np.float64]]:
    """Distinct bodies, and how much each tells of the relation: the G statistic of its pairs' relations against those
    of all pairs. cells: (3, m) bodies, a relation, and how many pairs have both; relations: (n,) of all pairs."""
    prior = np.bincount(relations, minlength=num_relations) / max(len(relations), 1)
    packed, columns, counts = cells
    kinds, rows = np.unique(packed, return_inverse=True)
    total = np.bincount(rows, weights=counts, minlength=len(kinds))
    share = counts / total[rows]
    gain = np.bincount(rows, weights=counts * np.log(share / prior[columns]), minlength=len(kinds))
    return kinds, np.where(total > 1, gain, 0.0)
