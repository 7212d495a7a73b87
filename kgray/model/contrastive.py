"""Contrastive link prediction by text: queries against entities (Wang et al. 2022, "SimKGC")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from kgray.model.text_encoder import TunedEncoder
from kgray.text.tokens import Packed


@dataclass(frozen=True)
class ContrastiveBatch:
    """b triples of one worker, as 2b queries: (head, relation, ?) and then (tail, inverse relation, ?).

    packed: the 2b query texts and then this worker's candidates; shares: candidates of each worker, in rank order.
    gold: (2b,) int64 columns of the answers among all workers' candidates. known_query, known_candidate: (k,) int64
    rows and columns of training answers other than the gold one.
    """

    packed: Packed
    shares: Sequence[int]
    gold: Tensor
    known_query: Tensor
    known_candidate: Tensor

    def to(self, device: torch.device) -> Self:
        moved = (part.to(device) for part in (self.gold, self.known_query, self.known_candidate))
        return type(self)(self.packed, self.shares, *moved)


def contrastive_loss(
    queries: Tensor,
    candidates: Tensor,
    gold: Tensor,
    known: tuple[Tensor, Tensor],
    scale: Tensor,
    margin: float,
) -> Tensor:
    """Mean cross-entropy of ``scale`` x (cosine, less ``margin`` for the gold one) over the candidates.

    queries: (B, d), candidates: (C, d), float32, length 1; gold: (B,) columns; known: (rows, columns) that are no
    negatives, as they are true as well; scale: () inverse temperature.
    """
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries @ candidates.T
        less = torch.zeros_like(scores)
        less[torch.arange(len(gold), device=gold.device), gold] = margin
        # Left out after scaling: an infinite score times a gradient of zero would make the scale's gradient NaN.
        left_out = torch.zeros_like(scores, dtype=torch.bool)
        left_out[known] = True
        return F.cross_entropy(((scores - less) * scale).masked_fill(left_out, -torch.inf), gold)


class TextScorer:
    """What the encoder alone answers: cosines of query and entity texts; float32 on the CPU.

    entities: (N, d) vectors, zero where there is no text.
    """

    tasks = ("tail", "head")

    def __init__(self, encoder: TunedEncoder, entities: Tensor) -> None:
        self.encoder, self.entities = encoder, entities

    @property
    def num_entities(self) -> int:
        return len(self.entities)

    @property
    def num_relations(self) -> int:
        return (len(self.encoder.texts.tokens) - self.num_entities) // 2

    def _queries(self, entities: Tensor, relations: Tensor) -> Tensor:
        return self.encoder.encode(entities.numpy(), self.num_entities + relations.numpy())

    def score_tails(self, heads: Tensor, relations: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, N)."""
        return self._queries(heads, relations) @ self.entities.T

    def score_heads(self, relations: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, N)."""
        return self._queries(tails, relations + self.num_relations) @ self.entities.T

    def score_relations(self, heads: Tensor, tails: Tensor) -> Tensor:
        """Raises ValueError: a text for each relation and head would have to be read."""
        raise ValueError("the text encoder alone ranks entities, not relations")

    def score_triples(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 3 -> (B,): the mean of both directions."""
        forward = (self._queries(heads, relations) * self.entities[tails]).sum(dim=1)
        backward = (self._queries(tails, relations + self.num_relations) * self.entities[heads]).sum(dim=1)
        return 0.5 * (forward + backward)
