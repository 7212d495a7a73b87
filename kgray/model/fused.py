"""The fused model: text and structure of an entity, messages of its neighbours, a decoder on top.

C_e text tower, R_e structural vector, S_e = fuse(C_e, R_e), H_e = GNN(S, sampled neighbourhood of e). A query (h, r, ?)
and its candidates are both H. Real relations are 0..R-1; reciprocal ones, R..2R-1, turn every head query into a tail
query (Lacroix et al. 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kgray.errors import ConfigError
from kgray.graph.sampler import Block
from kgray.model.config import ModelConfig
from kgray.model.decoders import DECODERS, Decoder, ScaledDecoder, Trilinear
from kgray.model.fusion import FUSIONS
from kgray.model.gnn import GraphNetwork
from kgray.model.towers import FrozenText, StructuralTable, Table


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """Sampled blocks as tensors.

    nodes: (n,) int64 entity ids of the outermost hop, seeds first.
    hops: from the outermost inward (number of targets, source, target, relation), positions int64.
    """

    nodes: Tensor
    hops: list[tuple[int, Tensor, Tensor, Tensor]]

    @property
    def num_seeds(self) -> int:
        return self.hops[-1][0] if self.hops else len(self.nodes)

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
    init_scale: None, or the standard deviation of the initial relation vectors of a model that is nothing but two
    tables (Lacroix et al. 2018): relations then move like entities, and scores have no scale, which would grow where
    N3 shrinks the vectors.
    """

    log_scale: Tensor

    def __init__(
        self,
        decoder: Decoder,
        num_relations: int,
        dim: int,
        text: FrozenText | None,
        init_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.num_relations = num_relations
        self.text = text
        if init_scale is not None:
            self.relations: nn.Embedding = Table(2 * num_relations, dim)
            nn.init.normal_(self.relations.weight, std=init_scale)
            self.register_buffer("log_scale", torch.zeros(()))
            return
        self.relations = nn.Embedding(2 * num_relations, dim)
        nn.init.normal_(self.relations.weight, std=0.5)
        self.log_scale = nn.Parameter(torch.tensor(decoder.log_scale(dim)))

    def vectors(self) -> Tensor:
        """(2R, d) vectors of real and reciprocal relations."""
        own = self.relations.weight
        return own if self.text is None else own + self.text.project(self.text.vectors.to(own.dtype))

    def scaled(self) -> ScaledDecoder:
        """What scores are made with, as the weights are now."""
        return ScaledDecoder(self.decoder, self.log_scale.exp())


def new_decoder(config: ModelConfig) -> Decoder:
    """A decoder for one view, with initial weights."""
    return DECODERS.get(config.decoder)(config.dim, config.decoding, config.objective.relation_weight > 0)


class FusedModel(nn.Module):
    """See the module's text. Shapes: N entities, R real relations, d = config.dim.

    entity_text: (N, width) stored text vectors, or None where config.text.kind is "none".
    relation_text: (2R, width), or None.
    has_edges: (N,) bool, whether an entity has a training triple.

    Two views of an entity can meet in decoders of their own: the fused state H, and the structural vector alone. Each
    has its own loss, because a table of vectors learns the training triples by heart within a few epochs and would
    leave text and neighbours nothing to learn; ranking adds the two scores, ``structure_weight`` times the second.
    Where an entity has neither text nor messages, the structural view stands alone and its weight is one.
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
            # Withholding the one thing that tells entities apart would teach nothing.
            table = replace(config.structure, drop=0.0) if config.structure_alone else config.structure
            sparse = config.objective.kind != "one_vs_all"
            self.structure = StructuralTable(table, has_edges, dim, sparse=sparse)
        if self.text is not None and self.structure is not None:
            self.fusion: nn.Module | None = FUSIONS.get(config.fusion)(dim)
        else:
            self.fusion = None
        self.fused_view: View | None = None
        self.structure_view: View | None = None
        if config.structure_alone:
            self.structure_view = View(self._decoder(), num_relations, dim, None, config.structure.init_scale)
        else:
            self.fused_view = View(self._decoder(), num_relations, dim, self._relation_tower(relation_text))
            if config.late_structure and self.structure is not None:
                self.structure_view = View(self._decoder(), num_relations, dim, None)
        self.register_buffer("structure_weight", torch.tensor(1.0 if config.structure_alone else 0.5))
        self.to_query: nn.Module | None = None
        if config.query_hidden and self.fused_view is not None:
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
        self.norm = nn.LayerNorm(dim) if self.fused_view is not None else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def _decoder(self) -> Decoder:
        config = self.config
        decoder = new_decoder(config)
        if config.objective.n3 and not isinstance(decoder, Trilinear):
            raise ConfigError(
                "model.objective.n3", config.objective.n3, f"0, as the decoder {config.decoder} factorises no tensor"
            )
        return decoder

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
        """The views of the u seeds, the fused one before the structural one, of which there may be one or both; states
        (u, d).

        new_text: (m, width) text vectors of entities the model was not made for, with the ids N to N + m - 1.
        """
        structure = None if self.structure is None else self.structure(neighbourhood.nodes)
        views = []
        num_seeds = neighbourhood.num_seeds
        if self.fused_view is not None:
            x = self.fuse(neighbourhood.nodes, structure, new_text)
            if self.gnn is not None:
                x = self.gnn(x, neighbourhood.hops, self.message_vectors())
            x = self.dropout(self.norm(x))
            views.append((self.fused_view, States(x if self.to_query is None else x + self.to_query(x), x)))
        if self.structure_view is not None and structure is not None:
            own = self.dropout(structure[0][:num_seeds])
            views.append((self.structure_view, States(own, own)))
        return views

    def entity_inputs(self) -> list[nn.Module]:
        """The modules whose outputs (n, d) entities enter the model with."""
        inputs: list[nn.Module] = [] if self.text is None else [self.text]
        return inputs if self.structure is None else [*inputs, self.structure.table]

    def message_vectors(self) -> Tensor | None:
        """(2R, d) vectors of relations in messages, or None where messages have no use for them."""
        if self.message_relations is None:
            return None
        own = self.message_relations.weight
        text = self.message_text
        return own if text is None else own + text.project(text.vectors.to(own.dtype))
