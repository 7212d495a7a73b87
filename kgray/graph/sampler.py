"""Fan-out sampling of neighbourhoods (Hamilton et al. 2017, "Inductive Representation Learning on Large Graphs").

Vectorised over the index: uniform without replacement, at a cost of O(seeds x fan-out) whatever the degree of a hub.
The generator is made from (seed, epoch, step, rank) alone, so a resumed run draws what the undisturbed one drew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kgray.graph.members import Members
from kgray.graph.neighbours import Edges, Int64, Ints, MessageIndex
from kgray.phases import counted


@dataclass(frozen=True, slots=True)
class Block:
    """One hop: messages from ``nodes`` into the first ``num_targets`` of them.

    nodes: (n,) int64 entity ids, targets first.
    source, target: (E,) int64 positions in ``nodes``; target < num_targets.
    relation: (E,) int64 in 0..2R-1.
    """

    nodes: Int64
    num_targets: int
    source: Int64
    target: Int64
    relation: Int64


def step_generator(seed: int, epoch: int, step: int, rank: int) -> np.random.Generator:
    """The random source of one training step of one worker."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, step, rank])))


class NeighbourSampler:
    """Samples nested neighbourhoods of seed entities, target triples left out.

    fanouts: neighbours drawn an entity and hop, nearest hop first; -1 takes all.
    What is drawn are positions in rows, here and from the rows' lengths alone: it does not depend on where they lie.
    Not safe for use by several threads at once: it keeps a scratch array with a number an entity.
    """

    def __init__(self, index: MessageIndex, fanouts: Sequence[int]) -> None:
        if any(f == 0 or f < -1 for f in fanouts):
            raise ValueError(f"fan-outs must be positive, or -1 for all; got {list(fanouts)}")
        self.index = index
        self.fanouts = tuple(fanouts)
        self._local: Ints = np.full(index.num_entities, -1, dtype=np.int32 if index.num_entities < 2**31 else np.int64)

    def sample(self, seeds: Int64, generator: np.random.Generator, exclude: Int64 | None = None) -> list[Block]:
        """Blocks from the outermost hop inward; the last one's targets are ``seeds`` (unique entity ids).

        exclude: positions of triples whose edge and reciprocal carry no message (the targets of the batch).
        """
        blocks: list[Block] = []
        removed = Members(exclude) if exclude is not None and len(exclude) else None
        targets = np.ascontiguousarray(seeds, dtype=np.int64)
        for hop, fanout in enumerate(self.fanouts):
            edges, owner = self._edges(targets, fanout, generator, hop)
            if removed is not None:
                keep = ~removed(edges.triples)
                edges, owner = Edges(*(part[keep] for part in edges)), owner[keep]
            block = self._block(targets, edges, owner)
            counted("edges", len(edges))
            blocks.append(block)
            targets = block.nodes
        return blocks[::-1]

    def _edges(
        self, targets: Int64, fanout: int, generator: np.random.Generator, hop: int
    ) -> tuple[Edges, Int64]:
        """The drawn edges and, for each, the position of its target."""
        degree = self.index.degrees_of(targets)
        everybody = np.arange(len(targets))
        if fanout == -1:
            few, many = everybody, everybody[:0]
        else:
            hub = degree > fanout
            few, many = np.flatnonzero(~hub), np.flatnonzero(hub)
        drawn = _draw_without_replacement(degree[many], max(fanout, 0), generator)
        edges = self.index.edges(targets[few], targets[many], drawn, hop)
        return edges, np.concatenate([np.repeat(few, degree[few]), np.repeat(many, max(fanout, 0))])

    def _block(self, targets: Int64, edges: Edges, owner: Int64) -> Block:
        sources, local = edges.sources, self._local
        local[targets] = np.arange(len(targets))
        source: Ints = local[sources]
        missing = np.flatnonzero(source < 0)
        unknown = sources[missing]
        fresh = _distinct(unknown)
        local[fresh] = np.arange(len(targets), len(targets) + len(fresh))
        source[missing] = local[unknown]
        local[targets] = -1
        local[fresh] = -1
        nodes = np.concatenate([targets, fresh])
        return Block(nodes, len(targets), source.astype(np.int64), owner, edges.relations.astype(np.int64))


def _distinct(numbers: Ints) -> Int64:
    """The distinct ones, ascending; numpy's own unique hashes first, ten times slower than its sort alone."""
    ordered = np.sort(numbers)
    first = np.empty(len(ordered), dtype=bool)
    first[:1] = True
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return ordered[first].astype(np.int64)


def _draw_without_replacement(population: Int64, count: int, generator: np.random.Generator) -> Int64:
    """(n, count) distinct positions below each population; every subset equally likely.

    Floyd's algorithm (Bentley & Floyd 1987), one column a round over all rows: O(n * count^2) cheap operations and
    never a look at the whole neighbourhood.
    """
    drawn = np.empty((count, len(population)), dtype=np.int64)
    for column in range(count):
        last = population - count + column
        pick = generator.integers(0, last + 1)
        taken = np.zeros(len(population), dtype=bool)
        for earlier in drawn[:column]:
            taken |= earlier == pick
        drawn[column] = np.where(taken, last, pick)
    return np.ascontiguousarray(drawn.T)
