"""The ``model`` artifact: all that evaluation and serving need, without pickle.

config.json       the model's configuration, its graph, vectors and how it was trained
model.safetensors the trained weights
heads.npy, tails.npy  (N, w) float32 states of entities as head and as candidate, memory-mapped on a node
relations.npy     (2R, w) float32 relation vectors of the decoder
entities.parquet, relations.parquet   id, external_id, name in dense-id order
known.safetensors the facts of all splits, to filter or mark known answers
history.json      metrics over the epochs
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from kgray.artifact import Artifact
from kgray.config import from_dict, to_dict
from kgray.errors import ArtifactError
from kgray.graph.filter_index import FilterIndex
from kgray.graph.graph import SPLITS, Graph
from kgray.model.config import ModelConfig
from kgray.model.fused import FusedModel
from kgray.model.states import StateScorer

FORMAT = 1


def write_bundle(
    folder: Path,
    model: FusedModel,
    scorer: StateScorer,
    graph: Graph,
    history: Sequence[Mapping[str, Any]],
    info: Mapping[str, Any],
) -> None:
    """Write every file of a ``model`` artifact into ``folder``."""
    config = {
        "format": FORMAT,
        "model": to_dict(model.config),
        "graph": graph.version,
        **info,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "history.json").write_text(json.dumps(list(history), indent=1) + "\n")
    save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    np.save(folder / "heads.npy", scorer.heads.cpu().numpy())
    np.save(folder / "tails.npy", scorer.tails.cpu().numpy())
    np.save(folder / "relations.npy", scorer.relations.cpu().numpy())
    _write_names(folder / "entities.parquet", graph.entity_ids, graph.entity_names)
    _write_names(folder / "relations.parquet", graph.relation_ids, graph.relation_names)
    known = graph.known(SPLITS).to_arrays()
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
    scorer: StateScorer
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
        # Copy-on-write mapping: shared pages as with "r", but torch need not warn of a read-only array.
        heads, tails = (torch.from_numpy(np.load(folder / f, mmap_mode="c")) for f in ("heads.npy", "tails.npy"))
        relations = torch.from_numpy(np.load(folder / "relations.npy"))
        known = FilterIndex.from_arrays(load_arrays(folder / "known.safetensors"))
        scorer = StateScorer(heads, tails, relations, info["model"]["decoder"])
        if heads.shape != tails.shape or heads.shape[1] != relations.shape[1]:
            shapes = [list(t.shape) for t in (heads, tails, relations)]
            raise ArtifactError(f"{artifact.uri}: heads, tails and relations do not fit together: {shapes}")
        return cls(folder, scorer, known, artifact.version, info["graph"], info)

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
