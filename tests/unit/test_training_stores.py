"""A model trained on a mapped or a partitioned graph ends with the weights of one trained on arrays in memory.

python3 -m pytest tests/unit/test_training_stores.py
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from model_graphs import ENTITIES, ONE_VS_ALL, RELATIONS, SMALL, TRAIN, graph, vectors
from stored_graphs import partitioned, shards_of, stored_graph

from kgray.artifact import Store
from kgray.graph.graph import Graph
from kgray.graph.resident import open_resident
from kgray.model.config import ModelConfig
from kgray.training.loop import Fit, fit


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KGRAY_CACHE", str(tmp_path / "cache"))


def trained(data: Graph, model: ModelConfig) -> Fit:
    return fit(data, vectors() if model.text.kind != "none" else None, model, replace(TRAIN, epochs=2))


@pytest.mark.parametrize(
    ("case", "cuts"),
    [
        ("edge", [10, 20, 30]),
        ("edge", [0, 3, 3, 38, 40]),
        ("pair", [10, 20, 30]),
        ("one_vs_all", []),
        ("undirected", [20]),
    ],
)
def test_training_ends_with_the_same_bits(tmp_path: Path, case: str, cuts: list[int]) -> None:
    model = {"one_vs_all": ONE_VS_ALL}.get(case, SMALL)
    model = replace(model, gnn=replace(model.gnn, fanouts=(3, 2), inference_fanouts=(5, -1)))
    if case == "pair":
        model = replace(model, gnn=replace(model.gnn, remove="pair"))
    splits = {split: graph().triples[split] for split in ("train", "valid", "test")}
    store = Store(tmp_path)
    artifact = stored_graph(store, splits, (ENTITIES, RELATIONS), cuts, case == "undirected")
    plain = trained(Graph.load(artifact), model)
    for body in (open_resident(artifact), partitioned(shards_of(store, artifact), 300)):
        other = trained(Graph.for_training(artifact, body), model)
        assert other.history == plain.history
        ours, theirs = other.model.state_dict(), plain.model.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
