"""Scores from computed entity states: what validation, evaluation and serving all rank by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kgray.artifact import Artifact
from kgray.errors import ArtifactError
from kgray.graph.neighbours import NeighbourIndex
from kgray.graph.sampler import NeighbourSampler, step_generator
from kgray.model.decoders import DECODERS
from kgray.model.fused import FusedModel, Neighbourhood, States, View

_STATES = ("heads", "tails", "relations")

INFERENCE_SEED = 0
"""Hubs with more neighbours than the inference fan-out are sampled once, the same for every run."""

ENCODED_AT_ONCE = 4096
"""Entities a batch; which neighbours of a hub are drawn depends on it."""


class StateScorer:
    """Scores of triples from states; float32, on the states' device.

    heads, tails: (N, w) states of entities as head of a query and as candidate (one tensor where they are the same).
    relations: (2R, w) vectors, reciprocal ones from R on.
    Tails are scored by the real relation, heads by its reciprocal; a whole triple and a relation by the mean of
    both directions, as neither direction is the better one (a reciprocal model has no single triple score).
    """

    tasks = ("tail", "head", "relation")

    def __init__(self, heads: Tensor, tails: Tensor, relations: Tensor, decoder: str) -> None:
        self.heads = heads
        self.tails = tails
        self.relations = relations
        self.decoder = DECODERS.get(decoder)()

    @property
    def num_entities(self) -> int:
        return len(self.tails)

    @property
    def num_relations(self) -> int:
        return len(self.relations) // 2

    def _query(self, entities: Tensor, relations: Tensor) -> Tensor:
        return self.decoder.query(self.heads[entities], self.relations[relations])

    def score_tails(self, heads: Tensor, relations: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, N)."""
        return self._query(heads, relations) @ self.tails.T

    def score_heads(self, relations: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, N)."""
        return self._query(tails, relations + self.num_relations) @ self.tails.T

    def score_relations(self, heads: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, R)."""
        forward = self.decoder.relation_query(self.heads[heads], self.tails[tails])
        backward = self.decoder.relation_query(self.heads[tails], self.tails[heads])
        r = self.num_relations
        return (forward @ self.relations[:r].T + backward @ self.relations[r:].T) * 0.5

    def score_triples(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 3 -> (B,)."""
        forward = (self._query(heads, relations) * self.tails[tails]).sum(dim=1)
        backward = (self._query(tails, relations + self.num_relations) * self.tails[heads]).sum(dim=1)
        return 0.5 * (forward + backward)


def write_states(folder: Path, scorer: StateScorer) -> None:
    """Write heads.npy, tails.npy and relations.npy."""
    for name in _STATES:
        np.save(folder / f"{name}.npy", getattr(scorer, name).cpu().numpy())


def load_states(artifact: Artifact, info: Mapping[str, Any]) -> StateScorer:
    """What :func:`write_states` wrote, entity states memory-mapped; ArtifactError where the files contradict."""
    folder = artifact.local_path("")
    # Copy-on-write mapping: shared pages as with "r", but torch need not warn of a read-only array.
    heads, tails, relations = (torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in _STATES)
    if heads.shape != tails.shape or heads.shape[1] != relations.shape[1]:
        shapes = [list(t.shape) for t in (heads, tails, relations)]
        raise ArtifactError(f"{artifact.uri}: heads, tails and relations do not fit together: {shapes}")
    return StateScorer(heads, tails, relations, info["model"]["decoder"])


@dataclass(frozen=True)
class EncodedViews:
    """Every entity under every view of a model; lists have one (N, d) or (2R, d) float32 tensor a view."""

    heads: list[Tensor]
    tails: list[Tensor]
    relations: list[Tensor]
    decoder: str

    def scorer(self, structure_weight: float) -> StateScorer:
        """Scores of the fused view plus ``structure_weight`` times those of the structural one, where there is one."""
        weights = [1.0, structure_weight]
        relations = [vectors * weight for vectors, weight in zip(self.relations, weights, strict=False)]
        return StateScorer(join(self.heads), join(self.tails), join(relations), self.decoder)


def encode_all(model: FusedModel, index: NeighbourIndex, *, batch_size: int = ENCODED_AT_ONCE) -> EncodedViews:
    """All entities under the model as it is, over the message graph ``index``; dropout off."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = list(_states(model, index, batch_size))
            views = range(len(parts[0]))
            return EncodedViews(
                heads=[torch.cat([part[i][1].head for part in parts]).float() for i in views],
                tails=[torch.cat([part[i][1].tail for part in parts]).float() for i in views],
                relations=[view.vectors().float() * view.log_scale.exp() for view, _ in parts[0]],
                decoder=model.config.decoder,
            )
    finally:
        model.train(was_training)


def scorer_of(model: FusedModel, index: NeighbourIndex) -> StateScorer:
    """The model as it is, ready to rank."""
    return encode_all(model, index).scorer(float(model.structure_weight))


def join(parts: Sequence[Tensor]) -> Tensor:
    """Vectors (n, d) of several views as one (n, views * d) whose score is the sum of theirs: first halves go with
    first halves, so that a decoder that reads real and imaginary parts finds them where it looks."""
    halves = [part.chunk(2, dim=-1) for part in parts]
    return torch.cat([first for first, _ in halves] + [second for _, second in halves], dim=-1)


def _states(model: FusedModel, index: NeighbourIndex, batch_size: int) -> Iterator[list[tuple[View, States]]]:
    device = model.structure_weight.device
    sampler = NeighbourSampler(index, model.config.gnn.inference_fanouts) if model.gnn is not None else None
    for start in range(0, index.num_entities, batch_size):
        seeds = np.arange(start, min(start + batch_size, index.num_entities))
        blocks = sampler.sample(seeds, step_generator(INFERENCE_SEED, 0, start, 0)) if sampler else []
        yield model.encode(Neighbourhood.of(torch.from_numpy(seeds), blocks).to(device))
