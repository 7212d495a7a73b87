"""The message graph of the path model: who is reached from where, a hop at a time, over flat sorted tensors.

A state lives on a pair (query, entity). Pairs are kept sorted by query, then entity. What a pair says along a relation
is the same to every neighbour of that relation, so edges are grouped: a *row* is (entity, relation) with its tails, a
message is computed a row and added up an edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kgray.graph.neighbours import NeighbourIndex


class MessageGraph(nn.Module):
    """Outgoing edges of every entity, reciprocal ones among them, grouped by relation; it follows its model's device.

    N entities, R real relations, E = 2T edges of T triples, G rows. All int64:
    row_offsets (N + 1,): rows of entity e are ``row_offsets[e]:row_offsets[e + 1]``, relations ascending.
    row_relation (G,) in 0..2R-1. edge_offsets (G + 1,): edges of a row. tail (E,). triple (E,): position of the
    edge's triple in what the index was built from, the same for an edge and its reciprocal.
    """

    row_offsets: Tensor
    row_relation: Tensor
    edge_offsets: Tensor
    tail: Tensor
    triple: Tensor

    def __init__(self, index: NeighbourIndex, num_relations: int) -> None:
        super().__init__()
        self.num_entities, self.num_relations, self.num_triples = index.num_entities, num_relations, index.num_triples
        # An edge into e along r is, the other way round, an edge out of e along the reciprocal of r.
        source = np.repeat(np.arange(index.num_entities), index.degrees)
        relation = (index.relations + num_relations) % max(2 * num_relations, 1)
        order = np.lexsort((index.triples, index.sources, relation, source))
        source, relation = source[order], relation[order]
        fresh = np.ones(len(order), dtype=bool)
        fresh[1:] = (source[1:] != source[:-1]) | (relation[1:] != relation[:-1])
        first = np.flatnonzero(fresh)
        rows = np.bincount(source[first], minlength=index.num_entities)
        self._keep("row_offsets", np.concatenate([[0], np.cumsum(rows)]))
        self._keep("row_relation", relation[first])
        self._keep("edge_offsets", np.append(first, len(order)))
        self._keep("tail", index.sources[order])
        self._keep("triple", index.triples[order])

    def _keep(self, name: str, values: Any) -> None:
        self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)), persistent=False)

    def edges_of(self, entities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All edges out of (n,) entities: position in ``entities``, row and edge of each, (m,) int64, in that order."""
        start = self.row_offsets[entities]
        owner, row = ragged(start, self.row_offsets[entities + 1] - start)
        begin = self.edge_offsets[row]
        place, edge = ragged(begin, self.edge_offsets[row + 1] - begin)
        return owner[place], row[place], edge


@dataclass(frozen=True, slots=True)
class Removal:
    """Edges that training queries may not run over.

    head, tail, triple: (B,) int64, what each query was made from. pair: withhold all triples between head and tail
    instead of the one. everywhere: (T,) bool, triples withheld from all queries, or None.
    """

    head: Tensor
    tail: Tensor
    triple: Tensor
    pair: bool
    everywhere: Tensor | None

    def allows(self, graph: MessageGraph, query: Tensor, source: Tensor, edge: Tensor) -> Tensor:
        """(m,) bool for m edges, each out of ``source`` in ``query``."""
        head, tail, triple = self.head[query], self.tail[query], graph.triple[edge]
        if self.pair:
            target = graph.tail[edge]
            gone = ((source == head) & (target == tail)) | ((source == tail) & (target == head))
        else:
            gone = triple == self.triple[query]
        if self.everywhere is not None:
            gone = gone | self.everywhere[triple]
        return ~gone


@dataclass(frozen=True, slots=True)
class Frontier:
    """Pairs (query, entity) in ascending order: query, entity (P,) int64; source: (B,) position of each query's
    own entity."""

    query: Tensor
    entity: Tensor
    source: Tensor

    def keys(self, num_entities: int) -> Tensor:
        """(P,) int64, ascending."""
        return self.query * num_entities + self.entity

    def take(self, kept: Tensor) -> Frontier:
        """The pairs at positions ``kept`` (ascending, sources among them)."""
        return Frontier(self.query[kept], self.entity[kept], torch.searchsorted(kept, self.source))


@dataclass(frozen=True, slots=True)
class Hop:
    """From P pairs over G rows and E edges to P' pairs: those reached and, besides, all that were there.

    row_pair, row_relation: (G,); pair_rows: (P + 1,) offsets of each pair's rows.
    edge_row: (E,) row of each edge, by destination; into: (P' + 1,) offsets of each destination's edges.
    edge_into: (E,) destination of each edge, by row; row_edges: (G + 1,) offsets of each row's edges.
    edge: (E,) the graph's edge, in the order of edge_into; order: (E,) from the order of edge_row to that.
    stayed: (P,) position of each former pair among the new ones; before: (P' + 1,) offsets, 1 long where there was one.
    """

    after: Frontier
    row_pair: Tensor
    row_relation: Tensor
    pair_rows: Tensor
    edge_row: Tensor
    into: Tensor
    edge_into: Tensor
    row_edges: Tensor
    edge: Tensor
    order: Tensor
    stayed: Tensor
    before: Tensor


def take_hop(graph: MessageGraph, at: Frontier, removal: Removal | None) -> Hop:
    """Expand every pair of ``at`` over its edges, but those ``removal`` withholds."""
    pairs = len(at.query)
    start = graph.row_offsets[at.entity]
    counts = graph.row_offsets[at.entity + 1] - start
    row_pair, row = ragged(start, counts)
    begin = graph.edge_offsets[row]
    edge_row, edge = ragged(begin, graph.edge_offsets[row + 1] - begin)
    query = at.query[row_pair[edge_row]]
    if removal is not None:
        allowed = removal.allows(graph, query, at.entity[row_pair[edge_row]], edge)
        edge_row, edge, query = edge_row[allowed], edge[allowed], query[allowed]
    reached = query * graph.num_entities + graph.tail[edge]
    keys, order = torch.sort(torch.cat([reached, at.keys(graph.num_entities)]), stable=True)
    fresh = torch.ones_like(keys, dtype=torch.bool)
    fresh[1:] = keys[1:] != keys[:-1]
    place = torch.cumsum(fresh, 0) - 1
    is_edge = order < len(edge)
    order_in, destination = order[is_edge], place[is_edge]
    stayed = torch.empty(pairs, dtype=torch.int64, device=keys.device)
    stayed[order[~is_edge] - len(edge)] = place[~is_edge]
    edge_into = torch.empty_like(edge)
    edge_into[order_in] = destination
    keys = keys[fresh]
    was = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
    was[stayed] = 1
    after = Frontier(keys // graph.num_entities, keys % graph.num_entities, stayed[at.source])
    return Hop(
        after=after,
        row_pair=row_pair,
        row_relation=graph.row_relation[row],
        pair_rows=offsets_of(counts),
        edge_row=edge_row[order_in],
        into=offsets_of(torch.bincount(destination, minlength=len(keys))),
        edge_into=edge_into,
        row_edges=offsets_of(torch.bincount(edge_row, minlength=len(row))),
        edge=edge,
        order=order_in,
        stayed=stayed,
        before=offsets_of(was),
    )


def strongest(priority: Tensor, at: Frontier, keep: int, queries: int) -> Tensor:
    """Positions, ascending, of the ``keep`` pairs of highest (P,) priority of each of B queries, its own entity among
    them; of equal ones those of lower id."""
    counts = torch.bincount(at.query, minlength=queries)
    widest = int(counts.max())
    if widest <= keep:
        return torch.arange(len(priority), device=priority.device)
    priority = priority.detach().clone()
    priority[at.source] = float("inf")
    first = offsets_of(counts)
    columns = torch.arange(len(priority), device=priority.device) - first[at.query]
    table = priority.new_full((queries, widest), float("-inf"))
    table[at.query, columns] = priority
    least = table.topk(keep, dim=1).values[:, -1][at.query]
    above, level = priority > least, priority == least
    room = keep - torch.bincount(at.query[above], minlength=queries)
    turn = torch.cumsum(level, 0)
    earlier = torch.cat([turn.new_zeros(1), turn])[first[at.query]]
    return torch.nonzero(above | (level & (turn - earlier <= room[at.query]))).squeeze(1)


def ragged(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The ranges ``start[i]:start[i] + count[i]`` one after another: owner i and value of each entry."""
    owner = torch.repeat_interleave(count)
    first = torch.cumsum(count, 0) - count
    return owner, torch.arange(len(owner), device=count.device) + (start - first)[owner]


def offsets_of(counts: Tensor) -> Tensor:
    """(n,) lengths -> (n + 1,) offsets."""
    offsets = counts.new_zeros(len(counts) + 1)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


class _Segments(torch.autograd.Function):
    """Sums of rows of x, and in the gradient sums of rows of the gradient: both ways are known as sorted segments, so
    neither scatters, and both add up in a fixed order."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, offsets: Tensor | None, back: Tensor, back_offsets: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(back, back_offsets)
        return _sums(x, index, offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        back, back_offsets = ctx.saved_tensors
        return _sums(grads[0].contiguous(), back, back_offsets), None, None, None, None


def _sums(x: Tensor, index: Tensor, offsets: Tensor | None) -> Tensor:
    if offsets is None:
        return F.embedding(index, x)
    return F.embedding_bag(index, x, offsets, mode="sum", include_last_offset=True)


def speak(x: Tensor, hop: Hop) -> Tensor:
    """(P, d) of pairs -> (G, d) of their rows."""
    rows = torch.arange(len(hop.row_pair), device=x.device)
    return _Segments.apply(x, hop.row_pair, None, rows, hop.pair_rows)  # type: ignore[no-any-return, no-untyped-call]


def gather_in(x: Tensor, hop: Hop, weight: Tensor | None = None) -> Tensor:
    """(G, d) of rows -> (P', d), sums over the edges into each new pair.

    weight: (E,) of edges in the order of ``hop.edge``, to differentiate by; None is ones, and quicker.
    """
    if weight is None:
        return _Segments.apply(  # type: ignore[no-any-return, no-untyped-call]
            x, hop.edge_row, hop.into, hop.edge_into, hop.row_edges
        )
    messages = x[hop.edge_row] * weight[hop.order][:, None]
    return x.new_zeros(len(hop.after.query), x.shape[1]).index_add(0, hop.edge_into[hop.order], messages)


def carry(x: Tensor, hop: Hop) -> Tensor:
    """(P, d) of pairs -> (P', d), zero where a pair is new."""
    pairs = torch.arange(len(hop.stayed), device=x.device)
    return _Segments.apply(x, pairs, hop.before, hop.stayed, None)  # type: ignore[no-any-return, no-untyped-call]
