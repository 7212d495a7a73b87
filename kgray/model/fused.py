"""The fused model: text and structure of an entity, messages of its neighbours, a decoder on top.

C_e text tower, R_e structural vector, S_e = fuse(C_e, R_e), H_e = GNN(S, sampled neighbourhood of e). A query (h, r, ?)
and its candidates are both H. Real relations are 0..R-1; reciprocal ones, R..2R-1, turn every head query into a tail
query (Lacroix et al. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kgray.graph.sampler import Block
from kgray.model.config import ModelConfig
from kgray.model.decoders import DECODERS, Decoder
from kgray.model.fusion import FUSIONS
from kgray.model.gnn import GraphNetwork
from kgray.model.towers import FrozenText, StructuralTable


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """Sampled blocks as tensors.

    nodes: (n,) int64 entity ids of the outermost hop, seeds first.
    hops: from the outermost inward (number of targets, source, target, relation), positions int64.
    """

    nodes: Tensor
    hops: list[tuple[int, Tensor, Tensor, Tensor]]

    @classmethod
    def of(cls, seeds: Tensor, blocks: Sequence[Block]) -> Neighbourhood:
        """From the sampler's blocks; no blocks means no messages."""
        if not blocks:
            return cls(seeds, [])
        hops = [
            (
                b.num_targets,
                torch.from_numpy(b.source),
                torch.from_numpy(b.target),
                torch.from_numpy(b.relation),
            )
            for b in blocks
        ]
        return cls(torch.from_numpy(blocks[0].nodes), hops)

    def to(self, device: torch.device) -> Neighbourhood:
        hops = [(n, s.to(device), t.to(device), r.to(device)) for n, s, t, r in self.hops]
        return Neighbourhood(self.nodes.to(device), hops)


class States(NamedTuple):
    """What an entity is as the head of a query and as a candidate tail; both (n, d)."""

    head: Tensor
    tail: Tensor


class View(nn.Module):
    """A decoder with relation vectors and a scale of its own, over one kind of states.

    text: (2R, width) stored vectors of relation texts, or None.
    """

    def __init__(self, decoder: Decoder, num_relations: int, dim: int, text: FrozenText | None) -> None:
        super().__init__()
        self.decoder = decoder
        self.num_relations = num_relations
        self.text = text
        self.relations = nn.Embedding(2 * num_relations, dim)
        nn.init.normal_(self.relations.weight, std=0.5)
        # Scores start on the scale of one: d terms of order one are summed.
        self.log_scale = nn.Parameter(torch.tensor(-0.5 * math.log(dim)))

    def vectors(self) -> Tensor:
        """(2R, d) vectors of real and reciprocal relations."""
        own = self.relations.weight
        return own if self.text is None else own + self.text.project(self.text.vectors.to(own.dtype))

    def query(self, heads: Tensor, relations: Tensor) -> Tensor:
        """(q, d) head states, (q, d) relation vectors -> (q, d); inner products with tail states are scores."""
        return self.decoder.query(heads, relations) * self.log_scale.exp()

    def relation_scores(self, heads: Tensor, tails: Tensor, relations: Tensor) -> Tensor:
        """(q, d) head and tail states, (k, d) relation vectors -> (q, k) scores of the triples."""
        return (self.decoder.relation_query(heads, tails) * self.log_scale.exp()) @ relations.T


class FusedModel(nn.Module):
    """See the module's text. Shapes: N entities, R real relations, d = config.dim.

    entity_text: (N, width) stored text vectors, or None where config.text.kind is "none".
    relation_text: (2R, width), or None.
    has_edges: (N,) bool, whether an entity has a training triple.

    Two views of an entity can meet in decoders of their own: the fused state H, and the structural vector alone. Each
    has its own loss, because a table of vectors learns the training triples by heart within a few epochs and would
    leave text and neighbours nothing to learn; ranking adds the two scores, ``structure_weight`` times the second.
    """

    structure_weight: Tensor

    def __init__(
        self,
        config: ModelConfig,
        num_relations: int,
        has_edges: Tensor,
        entity_text: Tensor | None,
        relation_text: Tensor | None,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_relations = num_relations
        dim = config.dim
        self.text: FrozenText | None = None
        if config.text.kind == "frozen":
            if entity_text is None or relation_text is None:
                raise ValueError("a text tower needs text vectors of entities and relations")
            self.text = FrozenText(config.text, entity_text, dim)
        self.structure: StructuralTable | None = None
        if config.structure.kind == "embedding":
            self.structure = StructuralTable(config.structure, has_edges, dim, sparse=True)
        if self.text is not None and self.structure is not None:
            self.fusion: nn.Module | None = FUSIONS.get(config.fusion)(dim)
        else:
            self.fusion = None
        decoder = DECODERS.get(config.decoder)()
        self.fused_view = View(decoder, num_relations, dim, self._relation_tower(relation_text))
        self.structure_view: View | None = None
        if config.late_structure and self.structure is not None:
            self.structure_view = View(decoder, num_relations, dim, None)
        self.register_buffer("structure_weight", torch.tensor(0.5))
        self.to_query: nn.Module | None = None
        if config.query_hidden:
            self.to_query = nn.Sequential(
                nn.Linear(dim, config.query_hidden), nn.GELU(), nn.Linear(config.query_hidden, dim)
            )
        self.gnn: GraphNetwork | None = None
        if config.gnn.kind != "none":
            self.gnn = GraphNetwork(config.gnn, dim, 2 * num_relations)
        self.message_relations: nn.Embedding | None = None
        if self.gnn is not None and self.gnn.reads_relations:
            # Relations speak differently in a message than in a query: vectors of their own.
            self.message_relations = nn.Embedding(2 * num_relations, dim)
            nn.init.normal_(self.message_relations.weight, std=0.5)
            self.message_text = self._relation_tower(relation_text)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)

    def _relation_tower(self, relation_text: Tensor | None) -> FrozenText | None:
        if self.text is None or relation_text is None:
            return None
        return FrozenText(self.config.text, relation_text, self.config.dim)

    def fuse(
        self, nodes: Tensor, structure: tuple[Tensor, Tensor] | None, new_text: Tensor | None = None
    ) -> Tensor:
        """S: (n,) ids and their structural vectors -> (n, d)."""
        text = None if self.text is None else self.text(nodes, new_text)
        if structure is None:
            return text  # type: ignore[return-value]  # ModelConfig refuses a model with neither
        vectors, has = structure
        if text is None or self.fusion is None:
            return vectors
        return self.fusion(text, vectors, has)  # type: ignore[no-any-return]

    def encode(self, neighbourhood: Neighbourhood, new_text: Tensor | None = None) -> list[tuple[View, States]]:
        """The views of the u seeds: the fused one, and the structural one where there is one; states (u, d).

        new_text: (m, width) text vectors of entities the model was not made for, with the ids N to N + m - 1.
        """
        structure = None if self.structure is None else self.structure(neighbourhood.nodes)
        x = self.fuse(neighbourhood.nodes, structure, new_text)
        if self.gnn is not None:
            x = self.gnn(x, neighbourhood.hops, self.message_vectors())
        x = self.dropout(self.norm(x))
        views = [(self.fused_view, States(x if self.to_query is None else x + self.to_query(x), x))]
        if self.structure_view is not None and structure is not None:
            own = self.dropout(structure[0][: len(x)])
            views.append((self.structure_view, States(own, own)))
        return views

    def message_vectors(self) -> Tensor | None:
        """(2R, d) vectors of relations in messages, or None where messages have no use for them."""
        if self.message_relations is None:
            return None
        own = self.message_relations.weight
        text = self.message_text
        return own if text is None else own + text.project(text.vectors.to(own.dtype))
