"""Which paths carried an answer of the path model (NBFNet, Zhu et al. 2021, section 3.4).

Every edge of every hop gets a weight of one; the gradient of the answer's score by these weights says how much the
score hangs on each edge at each hop. A path's weight is the mean of its edges'; the best are found by beam search over
the hops, on each of which a path either goes on or stays where it is. A weight near zero or below says that the model
is sure of the answer without more of this path, not that the path is wrong.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from kgray.model.path_graph import take_hop
from kgray.model.paths import PathModel

BEAM = 16
"""Partial paths kept an entity and hop, at least."""

Edge = tuple[int, int, int]
"""Source, relation in 0..2R-1, target."""


@dataclass(frozen=True, slots=True)
class PathStep:
    """A training fact (head, relation, tail), real relation, and whether the path runs along it or against it."""

    head: int
    relation: int
    tail: int
    forward: bool


@dataclass(frozen=True, slots=True)
class ScoredPath:
    """A path from a query's entity to an answer. weight: the mean of its edges', by which the score would grow."""

    steps: tuple[PathStep, ...]
    weight: float


def best_paths(model: PathModel, head: int, relation: int, tail: int, limit: int) -> list[ScoredPath]:
    """See ``PathScorer.paths``."""
    for what, value, size in (
        ("entity", head, model.num_entities),
        ("relation", relation, 2 * model.num_relations),
        ("entity", tail, model.num_entities),
    ):
        if not 0 <= value < size:
            raise ValueError(f"{what} id {value} outside 0..{size - 1}")
    hops = _towards(_edge_weights(model, head, relation, tail), tail)
    found = _beam(hops, head, tail, max(limit, BEAM))
    return [ScoredPath(tuple(_step(edge, model.num_relations) for edge in path), w) for path, w in found[:limit]]


def _edge_weights(model: PathModel, head: int, relation: int, tail: int) -> list[dict[int, list[tuple[Edge, float]]]]:
    """For each hop, by source entity, the edges and how much the score grows with the weight of each; [] where no
    path reaches the tail."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            query = torch.tensor([head], device=device), torch.tensor([relation], device=device)
            at, hidden, queries = model.start(*query)
            taken: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
            for layer in model.hops:
                hop = take_hop(model.graph, at, None)
                weight = torch.ones(len(hop.edge), device=device, requires_grad=True)
                hidden = layer(hidden, queries, at, hop, weight)
                row = torch.empty_like(hop.edge_row)
                row[hop.order] = hop.edge_row
                taken.append((weight, at.entity[hop.row_pair[row]], hop.row_relation[row], model.graph.tail[hop.edge]))
                at, hidden = model.prune(layer.priority, hidden, queries, hop.after)
            reached = model.reached(at, hidden, queries)
            place, there = reached.find(torch.zeros_like(query[0]), torch.tensor([tail], device=device))
            if not bool(there):
                return []
            weights = [weight for weight, *_ in taken]
            gradients = torch.autograd.grad(reached.scores[place].sum(), weights, allow_unused=True)
    finally:
        model.train(was_training)
    return [_by_source(gradient, *ids) for gradient, (_, *ids) in zip(gradients, taken, strict=True)]


def _by_source(
    gradient: Tensor | None, source: Tensor, relation: Tensor, target: Tensor
) -> dict[int, list[tuple[Edge, float]]]:
    edges: dict[int, list[tuple[Edge, float]]] = defaultdict(list)
    values = torch.zeros(len(source)) if gradient is None else gradient
    columns = [part.tolist() for part in (source, relation, target, values)]
    for s, r, t, value in zip(*columns, strict=True):
        edges[s].append(((s, r, t), value))
    return edges


def _towards(hops: list[dict[int, list[tuple[Edge, float]]]], tail: int) -> list[dict[int, list[tuple[Edge, float]]]]:
    """The edges from which the tail can still be reached in the hops that are left."""
    kept: list[dict[int, list[tuple[Edge, float]]]] = []
    ahead = {tail}
    for edges in reversed(hops):
        useful = {s: [item for item in items if item[0][2] in ahead] for s, items in edges.items()}
        kept.append({s: items for s, items in useful.items() if items})
        ahead = ahead | kept[-1].keys()
    return kept[::-1]


def _beam(
    hops: list[dict[int, list[tuple[Edge, float]]]], head: int, tail: int, width: int
) -> list[tuple[tuple[Edge, ...], float]]:
    """Paths head -> tail that visit no entity twice (but may close a loop), with the mean of their weights, best first;
    ties by length, then ids.

    Partial paths are kept by entity, ``width`` of the best at each.
    """
    states: dict[int, dict[tuple[Edge, ...], float]] = {head: {(): 0.0}}
    for edges in hops:
        # Staying is free: a path of two edges may take them at any two hops, the best placing counts.
        after = {entity: dict(paths) for entity, paths in states.items()}
        for entity, paths in states.items():
            for path, weight in paths.items():
                seen = {head, *(edge[2] for edge in path)}
                for edge, value in edges.get(entity, ()):
                    if edge[2] in seen and edge[2] != tail:
                        continue
                    if path and path[-1][2] == tail:
                        continue
                    longer = (*path, edge)
                    into = after.setdefault(edge[2], {})
                    into[longer] = max(into.get(longer, float("-inf")), weight + value)
        states = {entity: _best(paths, width) for entity, paths in after.items()}
    done = {path: weight / len(path) for path, weight in states.get(tail, {}).items() if path}
    return sorted(done.items(), key=lambda item: (-item[1], len(item[0]), item[0]))


def _best(paths: dict[tuple[Edge, ...], float], width: int) -> dict[tuple[Edge, ...], float]:
    if len(paths) <= width:
        return paths
    order = sorted(paths, key=lambda path: (-paths[path] / max(len(path), 1), len(path), path))
    kept = order[:width]
    return {path: paths[path] for path in (kept if () in kept or () not in paths else [(), *kept])}


def _step(edge: Edge, num_relations: int) -> PathStep:
    source, relation, target = edge
    if relation < num_relations:
        return PathStep(source, relation, target, forward=True)
    return PathStep(target, relation - num_relations, source, forward=False)
