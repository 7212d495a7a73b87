"""A small graph with learnable regularities, and small configurations, for tests of model and training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kgray.graph.graph import Graph
from kgray.model.config import GnnConfig, ModelConfig, ObjectiveConfig, TextTowerConfig
from kgray.text.vectors import Vectors
from kgray.training.config import TrainConfig

ENTITIES, RELATIONS, WIDTH = 40, 3, 8


def graph(seed: int = 0) -> Graph:
    """A ring with three relations: next (0), its inverse (1), and two steps on (2); a tenth of it held out."""
    n = np.arange(ENTITIES)
    facts = np.concatenate(
        [
            np.stack([n, np.zeros_like(n), (n + 1) % ENTITIES], 1),
            np.stack([(n + 1) % ENTITIES, np.ones_like(n), n], 1),
            np.stack([n, np.full_like(n, 2), (n + 2) % ENTITIES], 1),
        ]
    )
    facts = np.random.default_rng(seed).permutation(facts)
    return Graph.from_arrays({"train": facts[24:], "valid": facts[:12], "test": facts[12:24]}, ENTITIES, RELATIONS)


def vectors(seed: int = 0) -> Vectors:
    """Text vectors that say where on the ring an entity is; entity 7 has no text."""
    generator = np.random.default_rng(seed)
    angle = 2 * np.pi * np.arange(ENTITIES) / ENTITIES
    places = np.stack([np.cos(angle), np.sin(angle), np.cos(2 * angle), np.sin(2 * angle)], 1)
    rows = np.concatenate([places, generator.normal(size=(ENTITIES, WIDTH - 4)) * 0.1], 1).astype(np.float16)
    rows[7] = 0
    relations = generator.normal(size=(2 * RELATIONS, WIDTH)).astype(np.float16)
    return Vectors((rows,), np.array([0, ENTITIES]), relations, {})


SMALL = ModelConfig(
    dim=16,
    text=TextTowerConfig(hidden=0),
    gnn=GnnConfig(fanouts=(3,), inference_fanouts=(-1,), heads=2),
    query_hidden=16,
    objective=ObjectiveConfig(kind="sampled_softmax", negatives=16),
)
ONE_VS_ALL = replace(SMALL, objective=ObjectiveConfig(kind="one_vs_all"))
TRAIN = TrainConfig(epochs=3, batch_size=16, precision="float32", patience=10)
