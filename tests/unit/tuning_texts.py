"""A graph whose texts name its entities, read by a tiny encoder: what the tests of tuning the encoder share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tiny_encoders import save_encoder, tiny_bert

from kgray.graph.graph import Graph
from kgray.model.text_encoder import TunedEncoder
from kgray.text.config import TextConfig
from kgray.text.tokens import Texts, texts_of
from kgray.text.tuning_config import TuningConfig
from kgray.training.config import OptimiserConfig, TrainConfig

N, R = 30, 2
TRAIN = TrainConfig(epochs=2, batch_size=8, precision="float32", optimiser=OptimiserConfig(lr=3e-3, schedule="linear"))
LAST = TuningConfig(layers=1, valid_triples=None)
TEXT = TextConfig(max_length=20)


def entities() -> list[str]:
    """Texts of 2 to 9 words; entity 3 has none."""
    generator = np.random.default_rng(0)
    texts = [" ".join(f"w{w}" for w in generator.integers(0, 30, generator.integers(2, 10))) for _ in range(N)]
    return [*texts[:3], "", *texts[4:]]


RELATION_TEXTS = ["w30 w31", "w32", "w33 w30 w31", "w33 w32"]


def graph(seed: int = 0) -> Graph:
    facts = np.unique(np.random.default_rng(seed).integers(0, [N, R, N], (90, 3)), axis=0)
    facts = np.random.default_rng(seed).permutation(facts)
    return Graph.from_arrays({"train": facts[10:], "valid": facts[:10]}, N, R)


def encoder_in(folder: Path) -> str:
    """A tiny encoder saved there."""
    torch.manual_seed(0)
    return save_encoder(folder, tiny_bert())


def texts_of_graph(folder: str) -> Texts:
    """What the encoder in a folder reads of the graph."""
    return texts_of(entities(), RELATION_TEXTS, TEXT, folder, [text.split(" ")[0] for text in entities()])


def changed(before: dict[str, torch.Tensor], model: TunedEncoder) -> set[str]:
    after = model.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}
