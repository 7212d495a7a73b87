"""Scores and explanations of the path model, and its ``model`` artifact.

Besides what every family keeps: model.safetensors, the weights, and triples.npy, (T, 3) int32, the training facts that
messages run over, training and support.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kgray.artifact import Artifact
from kgray.config import from_dict, to_dict
from kgray.errors import ArtifactError
from kgray.graph.graph import Graph
from kgray.graph.neighbours import NeighbourIndex
from kgray.model.bundle import write_common
from kgray.model.path_explain import ScoredPath, best_paths
from kgray.model.paths import PathModel, Reached
from kgray.model.paths_config import PathsConfig

QUERIES = 64
"""Queries propagated at once: their edges, some thousands a query, stay in the cache's reach."""


class PathScorer:
    """Scores are log probabilities over all entities: float32, on the model's device.

    Tails are scored by the real relation, heads by its reciprocal, a whole triple by the mean of both. Relations are
    not ranked: that would take as many queries as there are relations.
    """

    tasks = ("tail", "head")

    def __init__(self, model: PathModel) -> None:
        self.model = model

    @property
    def num_entities(self) -> int:
        return self.model.num_entities

    @property
    def num_relations(self) -> int:
        return self.model.num_relations

    def score_tails(self, heads: Tensor, relations: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, N)."""
        parts = [reached.log_probabilities() for reached, _ in self._reach(heads, relations)]
        return torch.cat(parts) if parts else torch.empty(0, self.num_entities)

    def score_heads(self, relations: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, N)."""
        return self.score_tails(tails, relations + self.num_relations)

    def score_relations(self, heads: Tensor, tails: Tensor) -> Tensor:
        """Raises ValueError: see the class."""
        raise ValueError("the path model ranks tails and heads, not relations")

    def score_triples(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 3 -> (B,)."""
        forward = self._single(heads, relations, tails)
        return 0.5 * (forward + self._single(tails, relations + self.num_relations, heads))

    def _single(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        parts = [
            reached.log_probabilities().gather(1, tails[rows, None].to(reached.rest.device)).squeeze(1)
            for reached, rows in self._reach(heads, relations)
        ]
        return torch.cat(parts) if parts else torch.empty(0)

    @torch.no_grad()
    def _reach(self, heads: Tensor, relations: Tensor) -> list[tuple[Reached, slice]]:
        """What is reached by each part of the queries, parts near-equal in size, and which rows they are."""
        device = next(self.model.parameters()).device
        was_training = self.model.training
        self.model.eval()
        try:
            parts = -(-len(heads) // QUERIES)
            rows = [slice(len(heads) * i // parts, len(heads) * (i + 1) // parts) for i in range(parts)]
            return [(self.model(heads[r].to(device), relations[r].to(device)), r) for r in rows]
        finally:
            self.model.train(was_training)

    def paths(self, head: int, relation: int, tail: int, limit: int = 5) -> list[ScoredPath]:
        """The paths from head to tail that speak most for (head, relation, tail), best first; none if none speaks.

        relation: in 0..2R-1, a reciprocal one explains the answer ``tail`` to a head query. Raises ValueError for an
        id out of range.
        """
        return best_paths(self.model, head, relation, tail, limit)


def write_paths(
    folder: Path,
    model: PathModel,
    graph: Graph,
    history: Sequence[Mapping[str, Any]],
    info: Mapping[str, Any],
) -> None:
    """Write every file of a path model's artifact into ``folder``."""
    size = {"entities": graph.num_entities, "relations": graph.num_relations}
    write_common(folder, "paths", graph, {"paths": to_dict(model.config), **size, **info}, history)
    save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    np.save(folder / "triples.npy", graph.context.astype(np.int32))


def load_paths(artifact: Artifact, info: Mapping[str, Any]) -> PathScorer:
    """What :func:`write_paths` wrote; raises ArtifactError where the files contradict each other."""
    folder = artifact.local_path("")
    config = from_dict(PathsConfig, info["paths"], where=str(folder / "config.json"))
    weights = load_file(folder / "model.safetensors")
    num_entities, num_relations = int(info["entities"]), int(info["relations"])
    try:
        index = NeighbourIndex.build(np.load(folder / "triples.npy"), num_entities, num_relations)
        model = PathModel(config, index, num_relations)
        model.load_state_dict(weights)
    except (ValueError, RuntimeError) as error:
        raise ArtifactError(f"{artifact.uri}: weights, facts and configuration do not fit together: {error}") from None
    return PathScorer(model.eval())
