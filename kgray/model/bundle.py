"""The ``model`` artifact: all that evaluation and serving need, without pickle.

Of every family of model:

config.json       the family, its configuration, its graph and how it was made
entities.parquet, relations.parquet   id, external_id, name in dense-id order
known.safetensors the facts of all splits, to filter or mark known answers
history.json      metrics over the epochs

and what the family itself keeps; the fused model:

model.safetensors the trained weights
heads.npy, tails.npy  (N, w) float32 states of entities as head and as candidate, memory-mapped on a node
relations.npy     (2R, w) float32 relation vectors of the decoders
decoders.safetensors  scale and weights of each view's decoder
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from kgray.artifact import Artifact
from kgray.config import from_dict, to_dict
from kgray.errors import ArtifactError
from kgray.evaluation.calibration import Calibration
from kgray.graph.filter_index import FilterIndex
from kgray.graph.graph import SPLITS, SUPPORT, Graph
from kgray.model.config import ModelConfig
from kgray.model.fused import FusedModel
from kgray.model.states import StateScorer, write_states

FORMAT = 1

FAMILIES: Mapping[str, str] = {
    "fused": "kgray.model.states:load_states",
    "ensemble": "kgray.model.ensemble:load_ensemble",
    "rules": "kgray.reasoning.artifact:load_rules",
    "paths": "kgray.model.path_scorer:load_paths",
    "relations": "kgray.model.relation_scorer:load_relations",
}
"""Where each family of model is opened: ``module:function``, called with the artifact and its config.json. Named, not
imported, so that a family costs nothing where it is not used."""


CALIBRATION = "calibration.json"


class Scorer(Protocol):
    """What a family answers with; ids in and scores out as torch tensors on the CPU, float32, higher is better.

    tasks: which of "tail", "head", "relation" it can rank; the methods of the others raise ValueError.
    """

    @property
    def num_entities(self) -> int: ...
    @property
    def num_relations(self) -> int: ...
    @property
    def tasks(self) -> Sequence[str]: ...
    def score_tails(self, heads: Tensor, relations: Tensor) -> Tensor: ...
    def score_heads(self, relations: Tensor, tails: Tensor) -> Tensor: ...
    def score_relations(self, heads: Tensor, tails: Tensor) -> Tensor: ...
    def score_triples(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor: ...


def write_bundle(
    folder: Path,
    model: FusedModel,
    scorer: StateScorer,
    graph: Graph,
    history: Sequence[Mapping[str, Any]],
    info: Mapping[str, Any],
) -> None:
    """Write every file of a fused model's artifact into ``folder``."""
    write_common(folder, "fused", graph, {"model": to_dict(model.config), **info}, history)
    save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    write_states(folder, scorer)


def write_common(
    folder: Path, family: str, graph: Graph, info: Mapping[str, Any], history: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write what every family has: config.json with ``info``, names, known facts, history."""
    config = {"format": FORMAT, "family": family, "graph": graph.version, **info}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "history.json").write_text(json.dumps(list(history), indent=1) + "\n")
    _write_names(folder / "entities.parquet", graph.entity_ids, graph.entity_names)
    _write_names(folder / "relations.parquet", graph.relation_ids, graph.relation_names)
    known = graph.known((*SPLITS, SUPPORT)).to_arrays()
    save_arrays({k: np.ascontiguousarray(v) for k, v in known.items()}, folder / "known.safetensors")


def _write_names(path: Path, ids: pa.ChunkedArray, names: pa.ChunkedArray) -> None:
    table = pa.table({"id": pa.array(np.arange(len(ids))), "external_id": ids, "name": names})
    pq.write_table(table, path)


@dataclass(frozen=True)
class Bundle:
    """A model artifact opened for answering; implements the evaluator's Scorer.

    known: facts of all splits. info: config.json as read.
    """

    folder: Path
    scorer: Scorer
    known: FilterIndex
    model_version: str
    graph_version: str
    info: Mapping[str, Any]

    @classmethod
    def load(cls, artifact: Artifact) -> Bundle:
        """Open a ``model`` artifact, entity states memory-mapped.

        Raises ArtifactError when it is of another kind or format, or its files contradict each other.
        """
        if artifact.kind != "model":
            raise ArtifactError(f"{artifact.uri} is a {artifact.kind}, not a model")
        folder = artifact.local_path("")
        info = json.loads((folder / "config.json").read_text())
        if info.get("format") != FORMAT:
            raise ArtifactError(f"{artifact.uri} has model format {info.get('format')}, this kgray reads {FORMAT}")
        family = info.get("family", "fused")
        if family not in FAMILIES:
            raise ArtifactError(f"{artifact.uri} is of family {family}, this kgray knows {', '.join(FAMILIES)}")
        module, _, function = FAMILIES[family].partition(":")
        scorer: Scorer = getattr(importlib.import_module(module), function)(artifact, info)
        known = FilterIndex.from_arrays(load_arrays(folder / "known.safetensors"))
        return cls(folder, scorer, known, artifact.version, info["graph"], info)

    @property
    def tasks(self) -> Sequence[str]:
        return self.scorer.tasks

    @property
    def num_entities(self) -> int:
        return self.scorer.num_entities

    @property
    def num_relations(self) -> int:
        return self.scorer.num_relations

    def score_tails(self, heads: Tensor, relations: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, N) float32."""
        return self.scorer.score_tails(heads, relations)

    def score_heads(self, relations: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, N) float32."""
        return self.scorer.score_heads(relations, tails)

    def score_relations(self, heads: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, R) float32."""
        return self.scorer.score_relations(heads, tails)

    def score_triples(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 3 -> (B,) float32."""
        return self.scorer.score_triples(heads, relations, tails)

    @cached_property
    def calibration(self) -> Calibration | None:
        """What makes its scores probabilities and answer sets; None where it was not calibrated."""
        path = self.folder / CALIBRATION
        return Calibration.from_json(json.loads(path.read_text())) if path.exists() else None

    def _column(self, table: str, column: str) -> list[str]:
        return pq.read_table(self.folder / table, columns=[column])[column].to_pylist()  # type: ignore[no-any-return]

    @cached_property
    def entity_ids(self) -> list[str]:
        return self._column("entities.parquet", "external_id")

    @cached_property
    def entity_names(self) -> list[str]:
        return self._column("entities.parquet", "name")

    @cached_property
    def relation_ids(self) -> list[str]:
        return self._column("relations.parquet", "external_id")

    @cached_property
    def relation_names(self) -> list[str]:
        return self._column("relations.parquet", "name")

    def restore(self, has_edges: Tensor, entity_text: Tensor | None, relation_text: Tensor | None) -> FusedModel:
        """The trained model itself, given what the bundle leaves out: text vectors of the ``vectors`` artifact."""
        config = from_dict(ModelConfig, self.info["model"], where=str(self.folder / "config.json"))
        model = FusedModel(config, self.num_relations, has_edges, entity_text, relation_text)
        model.load_state_dict(load_file(self.folder / "model.safetensors"))
        return model.eval()
