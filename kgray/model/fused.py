"""The fused model: text and structure of an entity, messages of its neighbours, a decoder on top.

C_e text tower, R_e structural vector, S_e = fuse(C_e, R_e), H_e = GNN(S, sampled neighbourhood of e). A query (h, r, ?)
and its candidates are both H. Real relations are 0..R-1; reciprocal ones, R..2R-1, turn every head query into a tail
query (Lacroix et al. 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kgray.graph.sampler import Block
from kgray.model.config import ModelConfig
from kgray.model.decoders import DECODERS
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
    """What an entity is as the head of a query and as a candidate tail; both (n, w)."""

    head: Tensor
    tail: Tensor


class StructuralSkip(nn.Module):
    """Relation vectors by which structural vectors meet on their own (late fusion inside one decoder)."""

    def __init__(self, num_relations: int, dim: int) -> None:
        super().__init__()
        self.relations = nn.Embedding(num_relations, dim)
        nn.init.normal_(self.relations.weight, std=0.5)


def join(a: Tensor, b: Tensor) -> Tensor:
    """Two (n, d) as one (n, 2d) whose score is the sum of theirs: halves are joined with halves, so that a decoder
    that reads real and imaginary parts finds them where it looks."""
    (a_re, a_im), (b_re, b_im) = a.chunk(2, dim=-1), b.chunk(2, dim=-1)
    return torch.cat([a_re, b_re, a_im, b_im], dim=-1)


class FusedModel(nn.Module):
    """See the module's text. Shapes: N entities, R real relations, d = config.dim.

    entity_text: (N, width) stored text vectors, or None where config.text.kind is "none".
    relation_text: (2R, width), or None.
    has_edges: (N,) bool, whether an entity has a training triple.
    """

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
        self.decoder = DECODERS.get(config.decoder)()
        self.text: FrozenText | None = None
        self.relation_text: FrozenText | None = None
        if config.text.kind == "frozen":
            if entity_text is None or relation_text is None:
                raise ValueError("a text tower needs text vectors of entities and relations")
            self.text = FrozenText(config.text, entity_text, dim)
            self.relation_text = FrozenText(config.text, relation_text, dim)
        self.structure: StructuralTable | None = None
        if config.structure.kind == "embedding":
            self.structure = StructuralTable(config.structure, has_edges, dim, sparse=True)
        if self.text is not None and self.structure is not None:
            self.fusion: nn.Module | None = FUSIONS.get(config.fusion)(dim)
        else:
            self.fusion = None
        self.relations = nn.Embedding(2 * num_relations, dim)
        nn.init.normal_(self.relations.weight, std=0.5)
        self.skip: StructuralSkip | None = None
        if config.skip_structure and self.structure is not None:
            self.skip = StructuralSkip(2 * num_relations, dim)
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
            # Relations speak differently in a message than in a query: a vector of their own, text shared.
            self.message_relations = nn.Embedding(2 * num_relations, dim)
            nn.init.normal_(self.message_relations.weight, std=0.5)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)
        # Scores start on the scale of one: d terms of order one are summed.
        self.log_scale = nn.Parameter(torch.tensor(-0.5 * torch.log(torch.tensor(float(dim))).item()))

    def fuse(self, nodes: Tensor, structure: tuple[Tensor, Tensor] | None) -> Tensor:
        """S: (n,) ids and their structural vectors -> (n, d)."""
        text = None if self.text is None else self.text(nodes)
        if structure is None:
            return text  # type: ignore[return-value]  # ModelConfig refuses a model with neither
        vectors, has = structure
        if text is None or self.fusion is None:
            return vectors
        return self.fusion(text, vectors, has)  # type: ignore[no-any-return]

    def encode(self, neighbourhood: Neighbourhood) -> States:
        """States of the seeds, (u, w) in each of their two parts; w = d, or 2d with the structural skip."""
        structure = None if self.structure is None else self.structure(neighbourhood.nodes)
        x = self.fuse(neighbourhood.nodes, structure)
        if self.gnn is not None:
            x = self.gnn(x, neighbourhood.hops, self.message_vectors())
        x = self.dropout(self.norm(x))
        head = x if self.to_query is None else x + self.to_query(x)
        if self.skip is None or structure is None:
            return States(head, x)
        own = self.dropout(structure[0][: len(x)])
        return States(join(head, own), join(x, own))

    def _with_text(self, own: Tensor) -> Tensor:
        if self.relation_text is None:
            return own
        return own + self.relation_text.project(self.relation_text.vectors.to(own.dtype))

    def relation_vectors(self) -> Tensor:
        """(2R, w) vectors of real and reciprocal relations in the decoder."""
        own = self._with_text(self.relations.weight)
        return own if self.skip is None else join(own, self.skip.relations.weight)

    def message_vectors(self) -> Tensor | None:
        """(2R, d) vectors of relations in messages, or None where messages have no use for them."""
        return None if self.message_relations is None else self._with_text(self.message_relations.weight)

    def query(self, heads: Tensor, relations: Tensor) -> Tensor:
        """(q, w) head states, (q, w) relation vectors -> (q, w); inner products with tail states are scores."""
        return self.decoder.query(heads, relations) * self.log_scale.exp()

    def relation_scores(self, heads: Tensor, tails: Tensor, relations: Tensor) -> Tensor:
        """(q, w) head and tail states, (k, w) relation vectors -> (q, k) scores of the triples."""
        return (self.decoder.relation_query(heads, tails) * self.log_scale.exp()) @ relations.T
