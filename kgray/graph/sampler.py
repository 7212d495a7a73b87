"""Fan-out sampling of neighbourhoods (Hamilton et al. 2017, "Inductive Representation Learning on Large Graphs").

Vectorised over the index: uniform without replacement, at a cost of O(seeds x fan-out) whatever the degree of a hub.
The generator is made from (seed, epoch, step, rank) alone, so a resumed run draws what the undisturbed one drew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kgray.graph.neighbours import Int64, NeighbourIndex
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
    Not safe for use by several threads at once: it keeps scratch arrays of the graph's size.
    """

    def __init__(self, index: NeighbourIndex, fanouts: Sequence[int]) -> None:
        if any(f == 0 or f < -1 for f in fanouts):
            raise ValueError(f"fan-outs must be positive, or -1 for all; got {list(fanouts)}")
        self.index = index
        self.fanouts = tuple(fanouts)
        self._local = np.full(index.num_entities, -1, dtype=np.int64)
        self._removed = np.zeros(index.num_triples, dtype=bool)

    def sample(self, seeds: Int64, generator: np.random.Generator, exclude: Int64 | None = None) -> list[Block]:
        """Blocks from the outermost hop inward; the last one's targets are ``seeds`` (unique entity ids).

        exclude: positions of triples whose edge and reciprocal carry no message (the targets of the batch).
        """
        blocks: list[Block] = []
        targets = np.ascontiguousarray(seeds, dtype=np.int64)
        for fanout in self.fanouts:
            edges, owner = self._edges(targets, fanout, generator, exclude)
            block = self._block(targets, edges, owner)
            counted("edges", len(edges))
            blocks.append(block)
            targets = block.nodes
        return blocks[::-1]

    def _edges(
        self, targets: Int64, fanout: int, generator: np.random.Generator, exclude: Int64 | None
    ) -> tuple[Int64, Int64]:
        """Positions of the drawn edges and, for each, the position of its target."""
        start = self.index.offsets[targets]
        degree = self.index.offsets[targets + 1] - start
        if fanout == -1:
            edges, owner = _all_edges(start, degree)
        else:
            hub = degree > fanout
            edges, owner = _all_edges(start, np.where(hub, 0, degree))
            hubs = np.flatnonzero(hub)
            if len(hubs):
                drawn = _draw_without_replacement(degree[hubs], fanout, generator) + start[hubs, None]
                edges = np.concatenate([edges, drawn.ravel()])
                owner = np.concatenate([owner, np.repeat(hubs, fanout)])
        if exclude is not None and len(exclude):
            self._removed[exclude] = True
            keep = ~self._removed[self.index.triples[edges]]
            self._removed[exclude] = False
            edges, owner = edges[keep], owner[keep]
        return edges, owner

    def _block(self, targets: Int64, edges: Int64, owner: Int64) -> Block:
        sources = self.index.sources[edges]
        local = self._local
        local[targets] = np.arange(len(targets))
        fresh = np.unique(sources[local[sources] < 0])
        local[fresh] = np.arange(len(targets), len(targets) + len(fresh))
        nodes = np.concatenate([targets, fresh])
        source = local[sources]
        local[nodes] = -1
        return Block(nodes, len(targets), source, owner, self.index.relations[edges])


def _all_edges(start: Int64, degree: Int64) -> tuple[Int64, Int64]:
    owner = np.repeat(np.arange(len(start)), degree)
    first = np.cumsum(degree) - degree
    return np.arange(len(owner)) - first[owner] + start[owner], owner


def _draw_without_replacement(population: Int64, count: int, generator: np.random.Generator) -> Int64:
    """(n, count) distinct positions below each population; every subset equally likely.

    Floyd's algorithm (Bentley & Floyd 1987), one column a round over all rows: O(n * count^2) cheap operations and
    never a look at the whole neighbourhood.
    """
    drawn = np.empty((len(population), count), dtype=np.int64)
    for column in range(count):
        last = population - count + column
        pick = generator.integers(0, last + 1)
        taken = (drawn[:, :column] == pick[:, None]).any(axis=1)
        drawn[:, column] = np.where(taken, last, pick)
    return drawn
