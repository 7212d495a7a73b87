"""The path model's hops as dense products, for graphs of a few hundred entities.

There every entity is reached within two hops and edges outnumber entities by far: summing messages edge by edge costs
E * d a query and hop. Here all relations between two entities are first made one matrix a channel (and pattern), once
for all queries, and a hop is N * N * d a query of plain matrix products: ten times less time on UMLS. States are
channel first, (d, B, N), so that no step needs a transposed copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kgray.model.path_graph import MessageGraph, Removal

if TYPE_CHECKING:
    from kgray.model.paths import PathLayer, PathModel, Reached

LIMIT = 4_000_000
"""Most numbers in the (2R, N, N) tensor of a graph that is propagated densely: 16 MB."""


def fits(model: PathModel) -> bool:
    """Whether the graph is small and nothing is pruned, so that dense products give the same result sooner."""
    size, keep = model.num_entities, model.config.keep
    return 2 * model.num_relations * size * size <= LIMIT and (keep is None or keep >= size)


def reach(
    model: PathModel, heads: Tensor, relations: Tensor, removal: Removal | None, coarse: torch.dtype | None
) -> Reached:
    """What ``model.forward`` says, for every pair of query and entity. coarse: the type that the products of whole
    adjacency matrices are computed in, or None for that of the states."""
    from kgray.model.paths import Reached

    size, count = model.num_entities, len(heads)
    vectors = model.queries(relations)
    queries = vectors.T
    edges = adjacency(model.graph, None if removal is None else removal.everywhere)
    near = edges.sum(0)
    edges = edges if coarse is None else edges.to(coarse)
    gone = _withheld(model.graph, removal, count)
    source = torch.arange(count, device=heads.device) * size + heads
    here = torch.zeros(count * size, device=heads.device)
    here[source] = 1.0
    hidden = queries.new_zeros(model.config.dim, count * size).index_copy(1, source, queries)
    for layer in model.hops:
        incoming = _incoming(layer, hidden, queries, edges, gone, size, coarse)
        incoming = incoming.index_add(1, source, queries)
        update = layer.incoming.weight @ incoming + layer.own.weight @ hidden + layer.incoming.bias[:, None]
        update = torch.relu(_norm(layer, update))
        hidden = hidden + layer.dropout(update)
        here = _spread(here, near, gone, size)
        hidden = hidden * here
        if layer.priority is not None:
            own = (layer.priority.own.weight @ hidden).view(count, size) + layer.priority.own.bias
            priority = own + layer.priority.query(vectors)
            hidden = hidden * torch.sigmoid(priority).view(1, -1)
    bias = (model.hidden_query.weight @ queries)[:, :, None]
    last = (model.hidden.weight @ hidden + model.hidden.bias[:, None]).view(-1, count, size)
    scores = (model.out.weight @ torch.relu(last + bias).view(-1, count * size)).view(-1) + model.out.bias
    rest = (model.out.weight @ torch.relu(bias[:, :, 0] + model.hidden.bias[:, None])).view(-1) + model.out.bias
    place = torch.arange(count * size, device=heads.device)
    return Reached(place // size, place % size, scores, rest, size)


def adjacency(graph: MessageGraph, withheld: Tensor | None) -> Tensor:
    """(2R, N * N) float32, how many edges of a relation run from one entity to another."""
    every = torch.arange(graph.num_entities, device=graph.tail.device)
    source, row, edge = graph.edges_of(every)
    if withheld is not None:
        kept = ~withheld[graph.triple[edge]]
        source, row, edge = source[kept], row[kept], edge[kept]
    size = graph.num_entities
    flat = (graph.row_relation[row] * size + source) * size + graph.tail[edge]
    edges = torch.zeros(2 * graph.num_relations * size * size, device=flat.device)
    return edges.index_add_(0, flat, torch.ones_like(flat, dtype=edges.dtype)).view(2 * graph.num_relations, -1)


def _withheld(graph: MessageGraph, removal: Removal | None, count: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Edges a query may not use though ``adjacency`` has them: from and to, as flat pairs, and relation."""
    if removal is None:
        return None
    query = torch.arange(count, device=removal.head.device)
    ends, owners = torch.cat([removal.head, removal.tail]), torch.cat([query, query])
    owner, row, edge = graph.edges_of(ends)
    query, source = owners[owner], ends[owner]
    gone = ~removal.allows(graph, query, source, edge)
    # A loop's edges are found from both ends.
    gone &= ~((owner >= count) & (removal.head[query] == removal.tail[query]))
    if removal.everywhere is not None:
        gone &= ~removal.everywhere[graph.triple[edge]]
    query, source, row, edge = query[gone], source[gone], row[gone], edge[gone]
    base = query * graph.num_entities
    return base + source, base + graph.tail[edge], graph.row_relation[row]


def _incoming(
    layer: PathLayer,
    hidden: Tensor,
    queries: Tensor,
    edges: Tensor,
    gone: tuple[Tensor, Tensor, Tensor] | None,
    size: int,
    coarse: torch.dtype | None,
) -> Tensor:
    """(d, B * N) states -> (d, B * N) sums of messages."""
    dim, count = queries.shape
    vectors = layer.relations.T
    states = hidden.view(dim, count, size)
    if layer.patterns:
        gates = (layer.gate.weight @ hidden + layer.gate.bias[:, None]).view(-1, count, size)
        gates = torch.sigmoid(gates + (layer.gate_query.weight @ queries)[:, :, None])
        total = torch.zeros_like(states)
        for k in range(layer.patterns):
            total = total + _heard(states * gates[k], vectors * layer.speech[:, k], edges, coarse)
    else:
        total = _heard(states, vectors, edges, coarse)
    total = total.view(dim, -1)
    if gone is None:
        return total
    source, target, relation = gone
    messages = hidden.index_select(1, source) * vectors.index_select(1, relation)
    if layer.patterns:
        spoken = gates.view(layer.patterns, -1).index_select(1, source) * layer.speech.T.index_select(1, relation)
        messages = messages * spoken.sum(0)
    return total.index_add(1, target, -messages)


def _heard(states: Tensor, vectors: Tensor, edges: Tensor, coarse: torch.dtype | None) -> Tensor:
    """(d, B, N) states, (d, 2R) relation vectors, (2R, N * N) edges -> (d, B, N) sums of messages, unweighed."""
    size = states.shape[2]
    if coarse is None:
        return torch.bmm(states, (vectors @ edges).view(-1, size, size))
    return torch.bmm(states.to(coarse), (vectors.to(coarse) @ edges).view(-1, size, size)).float()


def _norm(layer: PathLayer, x: Tensor) -> Tensor:
    """Layer norm over the first dimension of (d, n)."""
    centred = x - x.mean(0)
    scale = torch.rsqrt((centred * centred).mean(0) + layer.norm.eps)
    return centred * scale * layer.norm.weight[:, None] + layer.norm.bias[:, None]


def _spread(here: Tensor, near: Tensor, gone: tuple[Tensor, Tensor, Tensor] | None, size: int) -> Tensor:
    """(B * N,) 0 or 1, which pairs are reached -> the same one hop later."""
    ways = (here.view(-1, size) @ near.view(size, size)).view(-1)
    if gone is not None:
        ways = ways.index_add(0, gone[1], -here[gone[0]])
    return ((here > 0) | (ways > 0.5)).to(here.dtype)
