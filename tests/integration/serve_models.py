"""Model artifacts for the tests of serving: real bundles over UMLS, untrained."""

from __future__ import annotations

import contextlib
import csv
import random
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from kgray.artifact import Artifact, Draft, Recipe, Store
from kgray.graph.graph import SPLITS, Graph
from kgray.model.bundle import write_bundle
from kgray.model.config import ModelConfig, ablation
from kgray.model.fused import FusedModel
from kgray.model.states import scorer_of

UMLS = Path(__file__).parents[2] / "configs" / "data" / "umls"


def umls_graph() -> Graph:
    """UMLS as it lies in the repository."""

    def read(name: str) -> list[list[str]]:
        with (UMLS / name).open(newline="") as file:
            return list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))

    entities, relations = read("entities.tsv")[1:], read("relations.tsv")[1:]
    entity = {row[0]: i for i, row in enumerate(entities)}
    relation = {row[0]: i for i, row in enumerate(relations)}
    triples = {
        split: np.array([(entity[h], relation[r], entity[t]) for h, r, t in read(f"{split}.tsv")]) for split in SPLITS
    }
    triples["support"] = np.empty((0, 3), dtype=np.int64)

    def column(rows: list[list[str]], place: int) -> pa.ChunkedArray:
        return pa.chunked_array([pa.array([row[place] for row in rows], pa.string())])

    return Graph(
        num_entities=len(entities),
        num_relations=len(relations),
        triples=triples,
        entity_ids=column(entities, 0),
        entity_names=column(entities, 1),
        relation_ids=column(relations, 0),
        relation_names=column(relations, 1),
        version="0" * 16,
    )


def make_model(store: Store, graph: Graph, seed: int) -> Artifact:
    """An untrained model: its answers are nonsense, but its very own."""

    def make(draft: Draft) -> dict[str, Any]:
        torch.manual_seed(seed)
        config = replace(ablation(ModelConfig(), "graph_only"), dim=32)
        has_edges = torch.ones(graph.num_entities, dtype=torch.bool)
        model = FusedModel(config, graph.num_relations, has_edges, None, None)
        with torch.no_grad():
            scorer = scorer_of(model, graph.message_index())
        info = {"metrics": {"valid.both.realistic.filtered.full.mrr": 0.01 * seed}}
        write_bundle(draft.local_dir(), model, scorer, graph, [], info)
        return {}

    return store.build(Recipe("model", 1, (), {"seed": seed}), make).artifact


def free_port() -> int:
    """A port that nobody has now, where Ray takes none."""
    for port in random.Random().sample(range(20000, 30000), 50):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port")
