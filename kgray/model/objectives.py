"""What training asks of the scores: a loss of the entities, whatever the candidates, and one of the relations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kgray.model.config import ObjectiveConfig
from kgray.model.decoders import Trilinear
from kgray.model.fused import FusedModel, Neighbourhood
from kgray.model.registry import Registry
from kgray.model.softmax import product_softmax_loss


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's queries, forward and reciprocal, with their candidates.

    neighbourhood: of the u seed entities, which are also the candidates.
    head, tail: (q,) positions among the seeds; relation: (q,) int64 in 0..2R-1.
    known_query, known_candidate: (m,) positions of training answers other than the gold one: no negatives. By
    ascending query, each pair once.
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
        decoder = view.scaled()
        query = decoder.query(heads, relations)
        if view.decoder.inner:
            query = model.dropout(query)
        if view.decoder.inner and config.loss == "softmax":
            known = (batch.known_query, batch.known_candidate)
            smoothing = config.label_smoothing
            parts[name] = product_softmax_loss(query, states.tail, batch.tail, known, batch.log_inclusion, smoothing)
        else:
            parts[name] = entity_loss(decoder.scores(query, states.tail).float(), batch, config)
        if config.relation_weight:
            # Scaled anew: one exp for both would add up its gradients in another order, to other last bits.
            by_relation = view.scaled().relation_scores(heads, tails, vectors).float()
            parts[f"{name}.relation"] = config.relation_weight * relation_loss(by_relation, batch.relation)
    view, states = views[-1]
    if config.n3 and model.structure is not None and isinstance(view.decoder, Trilinear):
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


EntityLoss = Callable[[Tensor, Batch, ObjectiveConfig], Tensor]
"""(q, u) float32 scores of the batch's candidates -> the mean over queries."""

LOSSES: Registry[EntityLoss] = Registry("model.objective.loss")


def entity_loss(scores: Tensor, batch: Batch, config: ObjectiveConfig) -> Tensor:
    """The loss the configuration names, of (q, u) float32 scores."""
    return LOSSES.get(config.loss)(scores, batch, config)


@LOSSES.register("softmax")
def softmax_loss(scores: Tensor, batch: Batch, config: ObjectiveConfig) -> Tensor:
    """Softmax cross-entropy, training answers other than the gold one masked.

    Sampled candidates are corrected for how likely each was to be drawn (Bengio & Senecal 2008): without it, hubs,
    which are often in the batch, would be pushed down below what the full softmax gives them.
    """
    if batch.log_inclusion is not None:
        scores = scores - batch.log_inclusion
    scores = scores.index_put((batch.known_query, batch.known_candidate), scores.new_tensor(float("-inf")))
    log_p = scores.log_softmax(dim=1)
    gold = log_p.gather(1, batch.tail[:, None]).squeeze(1)
    if not config.label_smoothing:
        return -gold.mean()
    finite = log_p.masked_fill(log_p.isinf(), 0.0)
    spread = finite.sum(dim=1) / log_p.isfinite().sum(dim=1)
    return -((1 - config.label_smoothing) * gold + config.label_smoothing * spread).mean()


@LOSSES.register("bce")
def bce_loss(scores: Tensor, batch: Batch, config: ObjectiveConfig) -> Tensor:
    """Binary cross-entropy, the mean over a query's candidates (Dettmers et al. 2018).

    Other training answers are true as well (``all_answers``) or left out. Smoothed labels are (1 - s) y + s / u.
    """
    known = _known(scores, batch)
    true = torch.zeros_like(known).scatter(1, batch.tail[:, None], True)
    labels = (true | known if config.all_answers else true).to(scores.dtype)
    labels = (1 - config.label_smoothing) * labels + config.label_smoothing / scores.shape[1]
    each = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
    if config.all_answers:
        return each.mean()
    return (each.masked_fill(known, 0.0).sum(dim=1) / (~known).sum(dim=1)).mean()


@LOSSES.register("self_adversarial")
def self_adversarial_loss(scores: Tensor, batch: Batch, config: ObjectiveConfig) -> Tensor:
    """-log sigmoid(margin + s+) - sum_i p_i log sigmoid(-margin - s_i) over the negatives, p the softmax of
    temperature * s_i, through which no gradient flows (Sun et al. 2019; a distance is a negative score)."""
    gold, negative = _apart(scores, batch)
    weight = (scores.detach() * config.temperature).masked_fill(~negative, float("-inf")).softmax(dim=1)
    # A query all of whose candidates are answers has no negatives.
    pushed = (weight.nan_to_num() * F.logsigmoid(-config.margin - scores)).sum(dim=1)
    return -(F.logsigmoid(config.margin + gold) + pushed).mean()


@LOSSES.register("margin")
def margin_loss(scores: Tensor, batch: Batch, config: ObjectiveConfig) -> Tensor:
    """max(0, margin - s+ + s_i), the mean over a query's negatives (Bordes et al. 2013)."""
    gold, negative = _apart(scores, batch)
    short = (config.margin - gold[:, None] + scores).clamp(min=0).masked_fill(~negative, 0.0)
    return (short.sum(dim=1) / negative.sum(dim=1).clamp(min=1)).mean()


def _known(scores: Tensor, batch: Batch) -> Tensor:
    """(q, u) bool, training answers other than the gold one."""
    known = torch.zeros_like(scores, dtype=torch.bool)
    return known.index_put((batch.known_query, batch.known_candidate), known.new_tensor(True))


def _apart(scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(q,) scores of the gold answers and (q, u) bool, which candidates are negatives."""
    gold = batch.tail[:, None]
    return scores.gather(1, gold).squeeze(1), ~_known(scores, batch).scatter(1, gold, True)


def relation_loss(scores: Tensor, relation: Tensor) -> Tensor:
    """Cross-entropy of each pair's relation among those of its direction (Chen et al. 2021).

    scores: (q, 2R) float32, real relations and then reciprocal ones. relation: (q,) int64.
    """
    both = scores.shape[1]
    reciprocal = torch.arange(both, device=scores.device) >= both // 2
    other_way = reciprocal[None, :] != (relation >= both // 2)[:, None]
    return F.cross_entropy(scores.masked_fill(other_way, float("-inf")), relation)
