"""Scores of the relation classifier, and its ``model`` artifact.

Besides what every family keeps:

model.safetensors   the weights
bodies.safetensors  the kinds of paths that are told apart, see :meth:`PairIndex.to_arrays`
facts.npy           (T, 3) int64 triples of ``Graph.context``, which contexts and paths are looked up in, memory-mapped
texts.npy           (N, w) float16 text vectors, memory-mapped; only where texts are read
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from kgray.artifact import Artifact
from kgray.config import from_dict, to_dict
from kgray.errors import ArtifactError
from kgray.graph.graph import Graph
from kgray.graph.neighbours import Int64
from kgray.model.bundle import write_common
from kgray.model.pair_features import PairIndex
from kgray.model.relations import PairBatch, RelationModel
from kgray.model.relations_config import RelationsConfig
from kgray.reasoning.facts import Facts

_PAIRS = 1024


class RelationScorer:
    """Implements the Scorer protocol for relation queries; scores are log probabilities over the R relations.

    texts: (N, w) float16, or None where the model reads none.
    """

    tasks = ("relation",)

    def __init__(self, model: RelationModel, index: PairIndex, texts: NDArray[np.float16] | None) -> None:
        self.model, self.index, self.texts = model, index, texts

    @property
    def num_entities(self) -> int:
        return self.model.num_entities

    @property
    def num_relations(self) -> int:
        return self.model.num_relations

    @torch.no_grad()
    def score_relations(self, heads: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, R) float32."""
        device = self.model.out.weight.device
        was_training = self.model.training
        self.model.eval()
        try:
            out = torch.empty(len(heads), self.num_relations)
            for start in range(0, len(heads), _PAIRS):
                rows = slice(start, start + _PAIRS)
                batch = PairBatch.of(self.index, _ids(heads[rows]), _ids(tails[rows]), None, self.texts)
                out[rows] = self.model(batch.to(device)).log_softmax(dim=1).cpu()
            return out
        finally:
            self.model.train(was_training)

    def score_triples(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 3 -> (B,) float32: the log probability of the relation, given the pair."""
        return self.score_relations(heads, tails).gather(1, relations[:, None]).squeeze(1)

    def score_tails(self, heads: Tensor, relations: Tensor) -> Tensor:
        """Raises ValueError: a relation's probability given the pair says nothing of which pair is likely."""
        raise ValueError("the relation classifier ranks relations, not tails")

    def score_heads(self, relations: Tensor, tails: Tensor) -> Tensor:
        """Raises ValueError: see :meth:`score_tails`."""
        raise ValueError("the relation classifier ranks relations, not heads")


def _ids(tensor: Tensor) -> Int64:
    return tensor.detach().cpu().numpy().astype(np.int64)


def write_relations(
    folder: Path,
    scorer: RelationScorer,
    graph: Graph,
    history: Sequence[Mapping[str, Any]],
    info: Mapping[str, Any],
) -> None:
    """Write every file of a relation classifier's artifact into ``folder``."""
    model = scorer.model
    size = {"entities": graph.num_entities, "relations": graph.num_relations, "bodies": model.num_bodies}
    section = {"relations_model": to_dict(model.config), "text_dim": model.text_dim}
    write_common(folder, "relations", graph, {**section, **size, **info}, history)
    save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    save_arrays(scorer.index.to_arrays(), folder / "bodies.safetensors")
    np.save(folder / "facts.npy", graph.context)
    if scorer.texts is not None:
        np.save(folder / "texts.npy", scorer.texts)


def load_relations(artifact: Artifact, info: Mapping[str, Any]) -> RelationScorer:
    """What :func:`write_relations` wrote; raises ArtifactError where the files contradict each other."""
    folder = artifact.local_path("")
    config = from_dict(RelationsConfig, info["relations_model"], where=str(folder / "config.json"))
    size = (int(info["entities"]), int(info["relations"]))
    try:
        facts = Facts.build(np.load(folder / "facts.npy", mmap_mode="r"), *size)
        index = PairIndex.from_arrays(load_arrays(folder / "bodies.safetensors"), facts, config.remove)
        if index.num_bodies != int(info["bodies"]):
            raise ValueError(f"{index.num_bodies} kinds of paths instead of {info['bodies']}")
        texts = np.load(folder / "texts.npy", mmap_mode="r") if info["text_dim"] else None
        if texts is not None and texts.shape != (size[0], info["text_dim"]):
            raise ValueError(f"text vectors of shape {list(texts.shape)}")
        model = RelationModel(config, *size, index.num_bodies, int(info["text_dim"]))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (ValueError, RuntimeError) as error:
        raise ArtifactError(f"{artifact.uri}: weights, facts and configuration do not fit together: {error}") from None
    return RelationScorer(model.eval(), index, texts)
