"""The relation classifier: which relation holds from one entity to another.

Views of the pair, each a vector, meet in one hidden layer: the relations around either end, vectors of the two
entities, the bag of paths between them weighed by a learned attention, and the
products of their texts. Counts and paths: :mod:`kgray.model.pair_features`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from kgray.graph.neighbours import Int64
from kgray.model.pair_features import Bag, PairIndex
from kgray.model.relations_config import RelationsConfig
from kgray.model.towers import Table
from kgray.phases import counted, phase

UNLIKELY = -1e4
"""Instead of minus infinity, which has no gradient under bfloat16."""


@dataclass(frozen=True)
class PairBatch:
    """B pairs and what is known of them.

    head, tail: (B,) int64. around_head, around_tail: (B, 2R) float32. paths: (n,) int64 bodies of all pairs, starts:
    (B,) where those of each pair begin. text_head, text_tail: (B, w) float32, None where texts are not read.
    relation: (B,) int64 gold, None where it is asked. known: (B, R) bool, other true relations of the pair, or None.
    """

    head: Tensor
    tail: Tensor
    around_head: Tensor
    around_tail: Tensor
    paths: Tensor
    starts: Tensor
    text_head: Tensor | None = None
    text_tail: Tensor | None = None
    relation: Tensor | None = None
    known: Tensor | None = None

    @classmethod
    def of(
        cls,
        index: PairIndex,
        heads: Int64,
        tails: Int64,
        relations: Int64 | None,
        texts: NDArray[np.float16] | None,
        paths: Bag | None = None,
    ) -> PairBatch:
        """Pairs (B,), training facts by ``relations`` (B,) left out where given. paths: those of the pairs, where they
        have been looked up already."""
        found = index.paths(heads, tails, relations) if paths is None else paths
        return cls(
            head=torch.from_numpy(heads),
            tail=torch.from_numpy(tails),
            around_head=torch.from_numpy(index.context(heads, tails, relations, heads=True)),
            around_tail=torch.from_numpy(index.context(tails, heads, relations, heads=False)),
            paths=torch.from_numpy(found.items.astype(np.int64)),
            starts=torch.from_numpy(found.offsets[:-1]),
            text_head=None if texts is None else torch.from_numpy(texts[heads].astype(np.float32)),
            text_tail=None if texts is None else torch.from_numpy(texts[tails].astype(np.float32)),
        )

    def to(self, device: torch.device) -> PairBatch:
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)


class RelationModel(nn.Module):
    """Logits over R relations for pairs of N entities.

    text_dim: width of text vectors, 0 where there are none.
    """

    def __init__(
        self, config: RelationsConfig, num_entities: int, num_relations: int, num_bodies: int, text_dim: int
    ) -> None:
        super().__init__()
        self.config = config
        self.num_entities, self.num_relations, self.num_bodies = num_entities, num_relations, num_bodies
        self.text_dim = text_dim
        d = config.dim
        self.around = nn.ModuleList([nn.Linear(2 * num_relations, d) for _ in range(2)])
        views = 2
        if config.identity:
            self.entities = Table(num_entities, d, sparse=True)
            nn.init.normal_(self.entities.weight, std=0.1)
            views += 3
        if num_bodies:
            # The last one stands for "no path at all", so that no pair is without.
            self.bodies = Table(num_bodies + 1, d, sparse=True)
            nn.init.normal_(self.bodies.weight, std=0.1)
            self.attention = Table(num_bodies + 1, 1, sparse=True)
            nn.init.zeros_(self.attention.weight)
            views += 1
        if text_dim:
            self.text = nn.ModuleList([nn.Linear(text_dim, d) for _ in range(2)])
            views += 3
        self.norms = nn.ModuleList([nn.LayerNorm(d) for _ in range(views)])
        self.drop = nn.Dropout(config.dropout)
        self.hidden = nn.Linear(views * d, config.hidden)
        self.out = nn.Linear(config.hidden, num_relations)

    def forward(self, pairs: PairBatch) -> Tensor:
        """(B, R) float32."""
        views = [layer(x) for layer, x in zip(self.around, (pairs.around_head, pairs.around_tail), strict=True)]
        if self.config.identity:
            views += _meeting(self._own(pairs.head), self._own(pairs.tail))
        if self.num_bodies:
            views.append(self._paths(pairs))
        if self.text_dim and pairs.text_head is not None and pairs.text_tail is not None:
            with phase("encoding"):
                read = self.text[0](pairs.text_head), self.text[1](pairs.text_tail)
            views += _meeting(*read)
        together = torch.cat([norm(view) for norm, view in zip(self.norms, views, strict=True)], dim=1)
        hidden = self.drop(torch.relu(self.hidden(self.drop(together))))
        logits: Tensor = self.out(hidden)
        return logits.float()

    def _own(self, entities: Tensor) -> Tensor:
        with phase("fetching"):
            counted("rows", len(entities))
            vectors: Tensor = self.entities(entities)
        if self.training and self.config.drop:
            kept = torch.rand(len(entities), 1, device=vectors.device) >= self.config.drop
            vectors = vectors * kept
        return vectors

    def _paths(self, pairs: PairBatch) -> Tensor:
        """(B, d): the sum of the bodies' vectors, each times exp(attention); that of no path at all is always one of
        them. The norm that follows takes the scale away."""
        weight = self.attention(pairs.paths).exp().squeeze(1)
        none = torch.full_like(pairs.head, self.num_bodies)
        found = embedding_bag(
            pairs.paths, self.bodies.weight, pairs.starts, mode="sum", sparse=True, per_sample_weights=weight
        )
        total: Tensor = found + self.attention(none).exp() * self.bodies(none)
        return total


def _meeting(head: Tensor, tail: Tensor) -> list[Tensor]:
    return [head, tail, head * tail]


def relation_loss(model: RelationModel, batch: PairBatch) -> Tensor:
    """Cross entropy of the gold relation against those not known to hold of the pair as well."""
    if batch.relation is None:
        raise ValueError("a batch without gold relations has no loss")
    logits = model(batch)
    if batch.known is not None:
        logits = logits.masked_fill(batch.known, UNLIKELY)
    return nn.functional.cross_entropy(logits, batch.relation)
