"""The query-conditioned path model: one score for all paths from the entity a query names to each candidate.

A query (h, r, ?) starts as a vector of r on h and runs L hops over the message graph (NBFNet, Zhu et al. 2021, "Neural
Bellman-Ford networks"). A message is the state of its source times a vector of the relation (DistMult), weighed by an
attention that depends on source, relation and query (RED-GNN, Zhang & Yao 2022); messages are summed, the query's
vector is added on h at every hop, and a state takes in the sum by a residual layer. A learned priority both scales
each state and says which K of a query's states live on (A*Net, Zhu et al. 2023; AdaProp, Zhang et al. 2023).

The attention of RED-GNN is kept in a factorised form, sum_k g_k(state, query) s_k(relation): a product of small
matrices, which lets small graphs propagate by dense products (path_dense.py) where edges would be many times slower.

Head queries are tail queries of the reciprocal relation. An entity that no path reaches has no state: all those share
the score of a zero state, so that a softmax over all entities stays exact without holding them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kgray.graph.neighbours import NeighbourIndex
from kgray.model import path_dense
from kgray.model.path_graph import (
    Frontier,
    Hop,
    MessageGraph,
    Removal,
    carry,
    gather_in,
    speak,
    strongest,
    take_hop,
)
from kgray.model.paths_config import PathsConfig


@dataclass(frozen=True, slots=True)
class Reached:
    """Scores of B queries: of the pairs that were reached, and one a query for all other entities.

    query, entity: (P,) int64, ascending. scores: (P,) float32. rest: (B,) float32.
    """

    query: Tensor
    entity: Tensor
    scores: Tensor
    rest: Tensor
    num_entities: int

    def matrix(self) -> Tensor:
        """(B, N) float32 scores of every entity."""
        whole = self.rest[:, None].repeat(1, self.num_entities)
        return whole.index_put((self.query, self.entity), self.scores)

    def log_probabilities(self) -> Tensor:
        """(B, N) float32: log softmax over all entities, comparable between queries."""
        return self.matrix().log_softmax(1)

    def find(self, query: Tensor, entity: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of (m,) pairs among those reached, and whether they are there; a position of 0 where not."""
        keys = self.query * self.num_entities + self.entity
        wanted = query * self.num_entities + entity
        place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        there = keys[place] == wanted
        return torch.where(there, place, 0), there


class Priority(nn.Module):
    """How much a state matters to its query."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.own = nn.Linear(dim, 1)
        self.query = nn.Linear(dim, 1, bias=False)
        # Near one at first: nothing is forgotten before it is known what is worth keeping.
        nn.init.constant_(self.own.bias, 2.0)

    def forward(self, hidden: Tensor, queries: Tensor, query: Tensor) -> Tensor:
        """(P, d) states, (B, d) query vectors, (P,) whose -> (P,) logits: above 0 a state counts by more than half."""
        return (self.own(hidden) + F.embedding(query, self.query(queries))).squeeze(1)  # type: ignore[no-any-return]


class PathLayer(nn.Module):
    """One hop. relations: (2R, d) what a relation makes of a state; speech: (2R, K) its place in each pattern."""

    def __init__(self, config: PathsConfig, num_relations: int, *, last: bool) -> None:
        super().__init__()
        dim, patterns = config.dim, config.patterns
        self.relations = nn.Parameter(torch.empty(2 * num_relations, dim))
        nn.init.normal_(self.relations, mean=0.0, std=1.0)
        self.patterns = patterns
        if patterns:
            self.speech = nn.Parameter(torch.full((2 * num_relations, patterns), 2.0 / patterns))
            nn.init.normal_(self.speech, mean=2.0 / patterns, std=0.5 / patterns)
            self.gate = nn.Linear(dim, patterns)
            self.gate_query = nn.Linear(dim, patterns, bias=False)
        self.own = nn.Linear(dim, dim, bias=False)
        self.incoming = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)
        # What the last hop reaches are answers: all are kept, as they are.
        self.priority = None if last else Priority(dim)

    def gates(self, hidden: Tensor, queries: Tensor, query: Tensor) -> Tensor:
        """(P, d) states, (B, d) query vectors, (P,) whose -> (P, K)."""
        return torch.sigmoid(self.gate(hidden) + F.embedding(query, self.gate_query(queries)))

    def forward(self, hidden: Tensor, queries: Tensor, at: Frontier, hop: Hop, weight: Tensor | None = None) -> Tensor:
        """(P, d) states before the hop -> (P', d) after it, not yet scaled by their priority."""
        message = speak(hidden, hop) * F.embedding(hop.row_relation, self.relations)
        if self.patterns:
            spoken = speak(self.gates(hidden, queries, at.query), hop)
            message = message * (spoken * F.embedding(hop.row_relation, self.speech)).sum(1, keepdim=True)
        incoming = gather_in(message, hop, weight)
        incoming = incoming.index_add(0, hop.after.source, queries)
        update = self.incoming(incoming) + carry(self.own(hidden), hop)
        added: Tensor = self.dropout(torch.relu(self.norm(update)))
        return carry(hidden, hop) + added


class PathModel(nn.Module):
    """See the module's text. Everything it learns is about relations: entities are known by their paths alone.

    index: the message graph, training triples only. num_relations: R real relations.
    """

    def __init__(self, config: PathsConfig, index: NeighbourIndex, num_relations: int) -> None:
        super().__init__()
        self.config = config
        self.num_relations = num_relations
        self.graph = MessageGraph(index, num_relations)
        self.queries = nn.Embedding(2 * num_relations, config.dim)
        self.layers = nn.ModuleList(
            PathLayer(config, num_relations, last=hop == config.layers - 1) for hop in range(config.layers)
        )
        self.hidden = nn.Linear(config.dim, config.dim)
        self.hidden_query = nn.Linear(config.dim, config.dim, bias=False)
        self.out = nn.Linear(config.dim, 1)

    @property
    def num_entities(self) -> int:
        return self.graph.num_entities

    @property
    def hops(self) -> list[PathLayer]:
        """The layers, typed."""
        return cast("list[PathLayer]", list(self.layers))

    def forward(
        self, heads: Tensor, relations: Tensor, removal: Removal | None = None, *, sparse: bool | None = None
    ) -> Reached:
        """Scores of (B,) int64 queries (head, relation in 0..2R-1, ?).

        sparse: whether to go edge by edge; None takes what is quicker for this graph. The result is the same.
        """
        dense = path_dense.fits(self) if sparse is None else not sparse
        kind = heads.device.type
        # Products of whole adjacency matrices gain by bfloat16; sums over edges and products of this width do not.
        coarse = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        with torch.autocast(kind, enabled=False):
            if dense:
                return path_dense.reach(self, heads, relations, removal, coarse)
            at, hidden, queries = self.start(heads, relations)
            for layer in self.hops:
                hop = take_hop(self.graph, at, removal)
                hidden = layer(hidden, queries, at, hop)
                at, hidden = self.prune(layer.priority, hidden, queries, hop.after)
            return self.reached(at, hidden, queries)

    def start(self, heads: Tensor, relations: Tensor) -> tuple[Frontier, Tensor, Tensor]:
        """The pairs, states (B, d) and query vectors (B, d) before the first hop."""
        queries = self.queries(relations)
        place = torch.arange(len(heads), device=heads.device)
        return Frontier(place, heads, place), queries, queries

    def prune(
        self, judge: Priority | None, hidden: Tensor, queries: Tensor, at: Frontier
    ) -> tuple[Frontier, Tensor]:
        """Scale states by their priority and keep the strongest of each query; no judge keeps all as they are."""
        if judge is None:
            return at, hidden
        priority = judge(hidden, queries, at.query)
        if self.config.keep is not None:
            kept = strongest(priority, at, self.config.keep, len(queries))
            if len(kept) < len(priority):
                at = at.take(kept)
                hidden, priority = hidden.index_select(0, kept), priority.index_select(0, kept)
        return at, hidden * torch.sigmoid(priority)[:, None]

    def reached(self, at: Frontier, hidden: Tensor, queries: Tensor) -> Reached:
        """Scores of the final states."""
        bias = self.hidden_query(queries)
        scores = self.out(torch.relu(self.hidden(hidden) + F.embedding(at.query, bias))).squeeze(1)
        rest = self.out(torch.relu(self.hidden.bias + bias)).squeeze(1)
        return Reached(at.query, at.entity, scores, rest, self.num_entities)


@dataclass(frozen=True, slots=True)
class PathBatch:
    """One step's queries, forward and reciprocal; all (B,) int64 but what is said otherwise.

    relation: in 0..2R-1. triple: position of the training triple a query was made from.
    known_query, known_entity: (m,) training answers other than the gold one: no negatives.
    withheld: (T,) bool, triples that no query of the step may use, or None.
    """

    head: Tensor
    relation: Tensor
    tail: Tensor
    triple: Tensor
    known_query: Tensor
    known_entity: Tensor
    withheld: Tensor | None

    def to(self, device: torch.device) -> PathBatch:
        return PathBatch(
            head=self.head.to(device),
            relation=self.relation.to(device),
            tail=self.tail.to(device),
            triple=self.triple.to(device),
            known_query=self.known_query.to(device),
            known_entity=self.known_entity.to(device),
            withheld=None if self.withheld is None else self.withheld.to(device),
        )


def path_loss(model: PathModel, batch: PathBatch) -> Tensor:
    """Mean softmax cross-entropy over all entities, other training answers left out.

    The target edge of a query and its reciprocal carry no message in that query: with them, every training answer
    would be one hop away, and the model would learn nothing but to look it up.
    """
    removal = Removal(batch.head, batch.tail, batch.triple, model.config.remove == "pair", batch.withheld)
    return entity_loss(model(batch.head, batch.relation, removal), batch)


def entity_loss(reached: Reached, batch: PathBatch) -> Tensor:
    """See :func:`path_loss`: entities without a path enter the sum as their number times exp of their one score."""
    queries = len(batch.head)
    place, there = reached.find(batch.known_query, batch.known_entity)
    left_out = torch.zeros_like(reached.scores, dtype=torch.bool)
    left_out[place[there]] = True
    scores = reached.scores.masked_fill(left_out, float("-inf"))
    without = reached.num_entities - torch.bincount(reached.query, minlength=queries)
    without = without - torch.bincount(batch.known_query[~there], minlength=queries)
    top = reached.rest.detach().scatter_reduce(0, reached.query, scores.detach(), "amax", include_self=True)
    total = torch.zeros_like(reached.rest).index_add(0, reached.query, torch.exp(scores - top[reached.query]))
    total = total + without * torch.exp(reached.rest - top)
    place, there = reached.find(torch.arange(queries, device=place.device), batch.tail)
    gold = torch.where(there, reached.scores[place], reached.rest)
    return (top + torch.log(total) - gold).mean()
