"""What training asks of the scores. Entity objectives differ only in their candidates and share one softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kgray.model.config import ObjectiveConfig
from kgray.model.fused import FusedModel, Neighbourhood, View


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's queries, forward and reciprocal, with their candidates.

    neighbourhood: of the u seed entities, which are also the candidates.
    head, tail: (q,) positions among the seeds; relation: (q,) int64 in 0..2R-1.
    known_query, known_candidate: (m,) positions of training answers other than the gold one: no negatives.
    log_inclusion: (u,) float32 log probability of an entity to be among the candidates, or None when all are.
    """

    neighbourhood: Neighbourhood
    head: Tensor
    relation: Tensor
    tail: Tensor
    known_query: Tensor
    known_candidate: Tensor
    log_inclusion: Tensor | None

    def to(self, device: torch.device) -> Batch:
        return Batch(
            neighbourhood=self.neighbourhood.to(device),
            head=self.head.to(device),
            relation=self.relation.to(device),
            tail=self.tail.to(device),
            known_query=self.known_query.to(device),
            known_candidate=self.known_candidate.to(device),
            log_inclusion=None if self.log_inclusion is None else self.log_inclusion.to(device),
        )


def batch_loss(model: FusedModel, batch: Batch, config: ObjectiveConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss over the batch's queries, summed over the model's views, and its parts for the log."""
    views = model.encode(batch.neighbourhood)
    total = torch.zeros((), device=batch.head.device)
    parts: dict[str, Tensor] = {}
    for view, states in views:
        name = "structure" if view is model.structure_view else "fused"
        vectors = view.vectors()
        # Rows by F.embedding, not by indexing: see ComposedConv.
        heads = F.embedding(batch.head, states.head)
        tails = F.embedding(batch.tail, states.tail)
        relations = F.embedding(batch.relation, vectors)
        scores = (model.dropout(view.query(heads, relations)) @ states.tail.T).float()
        parts[name] = entity_loss(scores, batch, config.label_smoothing)
        if config.relation_weight:
            parts[f"{name}.relation"] = config.relation_weight * relation_loss(
                view, heads, tails, vectors, batch.relation
            )
    if config.n3 and model.structure is not None:
        view, states = views[-1]
        own = (
            F.embedding(batch.head, states.head),
            F.embedding(batch.relation, view.vectors()),
            F.embedding(batch.tail, states.tail),
        )
        cubes = [view.decoder.moduli(v.float()).pow(3).sum() for v in own]
        parts["n3"] = config.n3 * torch.stack(cubes).sum() / len(batch.head)
    for part in parts.values():
        total = total + part
    return total, {name: part.detach() for name, part in parts.items()}


def entity_loss(scores: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
    """Softmax cross-entropy over (q, u) float32 scores, training answers other than the gold one masked.

    Sampled candidates are corrected for how likely each was to be drawn (Bengio & Senecal 2008): without it, hubs,
    which are often in the batch, would be pushed down below what the full softmax gives them.
    """
    if batch.log_inclusion is not None:
        scores = scores - batch.log_inclusion
    scores = scores.index_put((batch.known_query, batch.known_candidate), scores.new_tensor(float("-inf")))
    log_p = scores.log_softmax(dim=1)
    gold = log_p.gather(1, batch.tail[:, None]).squeeze(1)
    if not label_smoothing:
        return -gold.mean()
    finite = log_p.masked_fill(log_p.isinf(), 0.0)
    spread = finite.sum(dim=1) / log_p.isfinite().sum(dim=1)
    return -((1 - label_smoothing) * gold + label_smoothing * spread).mean()


def relation_loss(view: View, heads: Tensor, tails: Tensor, vectors: Tensor, relation: Tensor) -> Tensor:
    """Cross-entropy of the relation of each pair among those of its direction (Chen et al. 2021)."""
    scores = view.relation_scores(heads, tails, vectors).float()
    reciprocal = torch.arange(len(vectors), device=scores.device) >= view.num_relations
    other_way = reciprocal[None, :] != (relation >= view.num_relations)[:, None]
    return F.cross_entropy(scores.masked_fill(other_way, float("-inf")), relation)
