"""Scores from computed entity states: what validation, evaluation and serving all rank by."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kgray.artifact import Artifact
from kgray.config import from_dict
from kgray.errors import ArtifactError
from kgray.graph.neighbours import MessageIndex
from kgray.graph.sampler import NeighbourSampler, step_generator
from kgray.model.config import ModelConfig
from kgray.model.decoders import ScaledDecoder
from kgray.model.fused import FusedModel, Neighbourhood, States, View, new_decoder

_STATES = ("heads", "tails", "relations")
DECODER_FILE = "decoders.safetensors"
_DECODER = "decoder."

INFERENCE_SEED = 0
"""Hubs with more neighbours than the inference fan-out are sampled once, the same for every run."""

ENCODED_AT_ONCE = 4096
"""Entities a batch; which neighbours of a hub are drawn depends on it."""


class StateScorer:
    """Scores of triples from states; float32, on the states' device.

    heads, tails: (N, w) states of entities as head of a query and as candidate. relations: (2R, w) vectors, reciprocal
    ones from R on. decoders: one a view; each has w / V of the columns, and a score is the sum of theirs.
    Tails are scored by the real relation, heads by its reciprocal; a whole triple and a relation by the mean of
    both directions, as neither direction is the better one (a reciprocal model has no single triple score).
    """

    def __init__(self, heads: Tensor, tails: Tensor, relations: Tensor, decoders: Sequence[ScaledDecoder]) -> None:
        self.heads = heads
        self.tails = tails
        self.relations = relations
        self.decoders = decoders

    @property
    def tasks(self) -> Sequence[str]:
        return self.decoders[0].decoder.tasks

    @property
    def num_entities(self) -> int:
        return len(self.tails)

    @property
    def num_relations(self) -> int:
        return len(self.relations) // 2

    def _views(self, *parts: Tensor) -> Iterator[tuple[ScaledDecoder, list[Tensor]]]:
        """Each decoder with its columns of (n, w) tensors."""
        columns = [part.chunk(len(self.decoders), dim=1) for part in parts]
        for place, decoder in enumerate(self.decoders):
            yield decoder, [views[place] for views in columns]

    def state_scores(self, heads: Tensor, relations: Tensor, candidates: Tensor) -> Tensor:
        """(q, w) states of heads, (q, w) relation vectors, (u, w) states of tails -> (q, u)."""
        scores = None
        for decoder, (h, r, t) in self._views(heads, relations, candidates):
            own = decoder.scores(decoder.query(h, r), t)
            scores = own if scores is None else scores.add_(own)
        return cast("Tensor", scores)

    def state_relation_scores(self, heads: Tensor, tails: Tensor, relations: Tensor) -> Tensor:
        """(q, w) states of heads and of tails, (k, w) relation vectors -> (q, k)."""
        views = self._views(heads, tails, relations)
        return torch.stack([decoder.relation_scores(h, t, r) for decoder, (h, t, r) in views]).sum(dim=0)

    def score_tails(self, heads: Tensor, relations: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, N)."""
        return self.state_scores(self.heads[heads], self.relations[relations], self.tails)

    def score_heads(self, relations: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, N)."""
        return self.score_tails(tails, relations + self.num_relations)

    def score_range(self, task: str, first: Tensor, second: Tensor, start: int, stop: int) -> Tensor:
        """(B, stop - start) scores of the entities from ``start`` to ``stop`` as the missing ``tail`` or ``head``; of
        no other entity's candidate state a page is read. first, second (B,): the given parts in the order head,
        relation, tail."""
        heads, relations = (first, second) if task == "tail" else (second, first + self.num_relations)
        return self.state_scores(self.heads[heads], self.relations[relations], self.tails[start:stop])

    def score_relations(self, heads: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, R); raises ValueError where "relation" is not among the tasks."""
        r = self.num_relations
        forward = self.state_relation_scores(self.heads[heads], self.tails[tails], self.relations[:r])
        backward = self.state_relation_scores(self.heads[tails], self.tails[heads], self.relations[r:])
        return (forward + backward) * 0.5

    def score_triples(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 3 -> (B,)."""
        return 0.5 * (self._pairs(heads, relations, tails) + self._pairs(tails, relations + self.num_relations, heads))

    def _pairs(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        views = self._views(self.heads[heads], self.relations[relations], self.tails[tails])
        return torch.stack([decoder.pair_scores(decoder.query(h, r), t) for decoder, (h, r, t) in views]).sum(dim=0)


def write_states(folder: Path, scorer: StateScorer) -> None:
    """Write heads.npy, tails.npy, relations.npy and decoders.safetensors: scales and weights by the view's number."""
    for name in _STATES:
        np.save(folder / f"{name}.npy", getattr(scorer, name).cpu().numpy())
    weights = {}
    for view, scaled in enumerate(scorer.decoders):
        weights[f"{view}.scale"] = scaled.scale
        weights |= {f"{view}.{_DECODER}{name}": value for name, value in scaled.decoder.state_dict().items()}
    save_file({name: value.contiguous().cpu() for name, value in weights.items()}, folder / DECODER_FILE)


def load_states(artifact: Artifact, info: Mapping[str, Any]) -> StateScorer:
    """What :func:`write_states` wrote, entity states memory-mapped; ArtifactError where the files contradict."""
    folder = artifact.local_path("")
    if not (folder / DECODER_FILE).exists():
        raise ArtifactError(f"{artifact.uri} has no {DECODER_FILE}: an older kgray wrote it, train it again")
    # Copy-on-write mapping: shared pages as with "r", but torch need not warn of a read-only array.
    heads, tails, relations = (torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in _STATES)
    config = from_dict(ModelConfig, info["model"], where=str(folder / "config.json"))
    try:
        decoders = _load_decoders(config, load_file(folder / DECODER_FILE))
    except (RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{artifact.uri}: {DECODER_FILE} does not hold its decoders: {error}") from None
    width = len(decoders) * config.dim
    if heads.shape != tails.shape or not heads.shape[1] == relations.shape[1] == width:
        shapes = [list(t.shape) for t in (heads, tails, relations)]
        raise ArtifactError(
            f"{artifact.uri}: heads, tails and relations do not fit together and {len(decoders)} x {config.dim} "
            f"columns: {shapes}"
        )
    return StateScorer(heads, tails, relations, decoders)


def _load_decoders(config: ModelConfig, weights: Mapping[str, Tensor]) -> list[ScaledDecoder]:
    decoders: list[ScaledDecoder] = []
    while (scale := weights.get(f"{len(decoders)}.scale")) is not None:
        prefix = f"{len(decoders)}.{_DECODER}"
        decoder = new_decoder(config)
        decoder.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        decoders.append(ScaledDecoder(decoder.eval().requires_grad_(False), scale))
    return decoders


@dataclass(frozen=True)
class EncodedViews:
    """Every entity under every view of a model; lists have one (N, d) or (2R, d) float32 tensor a view."""

    heads: list[Tensor]
    tails: list[Tensor]
    relations: list[Tensor]
    decoders: list[ScaledDecoder]

    def scorer(self, structure_weight: float) -> StateScorer:
        """Scores of the fused view plus ``structure_weight`` times those of the structural one, where there is one."""
        weights = [1.0, structure_weight]
        decoders = [replace(d, scale=d.scale * w) for d, w in zip(self.decoders, weights, strict=False)]
        return StateScorer(join(self.heads), join(self.tails), join(self.relations), decoders)


def encode_all(model: FusedModel, index: MessageIndex, *, batch_size: int = ENCODED_AT_ONCE) -> EncodedViews:
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
                relations=[view.vectors().detach().clone().float() for view, _ in parts[0]],
                decoders=[_frozen(view.scaled()) for view, _ in parts[0]],
            )
    finally:
        model.train(was_training)


def scorer_of(model: FusedModel, index: MessageIndex) -> StateScorer:
    """The model as it is, ready to rank."""
    return encode_all(model, index).scorer(float(model.structure_weight))


def join(parts: Sequence[Tensor]) -> Tensor:
    """Vectors (n, d) of several views as one (n, views * d)."""
    return torch.cat(list(parts), dim=-1)


def _frozen(scaled: ScaledDecoder) -> ScaledDecoder:
    """A copy that training leaves alone."""
    decoder = copy.deepcopy(scaled.decoder).eval().requires_grad_(False)
    return ScaledDecoder(decoder, scaled.scale.detach().float())


def _states(model: FusedModel, index: MessageIndex, batch_size: int) -> Iterator[list[tuple[View, States]]]:
    device = model.structure_weight.device
    sampler = NeighbourSampler(index, model.config.gnn.inference_fanouts) if model.gnn is not None else None
    for start in range(0, index.num_entities, batch_size):
        seeds = np.arange(start, min(start + batch_size, index.num_entities))
        blocks = sampler.sample(seeds, step_generator(INFERENCE_SEED, 0, start, 0)) if sampler else []
        yield model.encode(Neighbourhood.of(torch.from_numpy(seeds), blocks).to(device))
