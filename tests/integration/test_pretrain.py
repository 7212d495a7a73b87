"""The pretrain job on a real Ray: an encoder artifact, vectors that are its own, a lineage that says so."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from text_graphs import graph_artifact

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from tiny_encoders import save_encoder, tiny_bert

from kgray.artifact import Artifact, Store
from kgray.errors import ConfigError
from kgray.lineage.chain import trace
from kgray.text.config import TextConfig
from kgray.text.embed import embed, embed_recipe
from kgray.text.encoder import TextEncoder
from kgray.text.tuning_config import TuningConfig
from kgray.text.vectors import load_vectors
from kgray.training.config import TrainConfig
from kgray.training.loop import METRIC
from kgray.training.pretrain import pretrain, pretrain_recipe

TUNING = TuningConfig(layers=1, epochs=2, batch_size=8, lr=5e-3, valid_triples=None)
TRAIN = TrainConfig(device="cpu", cpus_per_worker=1)


def embedded(store: Store, text: TextConfig, graph: Artifact, tuned: Artifact | None = None) -> Artifact:
    recipe = embed_recipe(store, text, graph, tuned)
    return store.build(recipe, lambda draft: embed(draft, text, graph, store, tuned)).artifact


def test_vectors_are_those_of_the_tuned_encoder_and_say_so(ray_cluster: object, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save_encoder(tmp_path / "base", tiny_bert())
    store = Store(tmp_path / "store")
    rows = [{"external_id": f"e{n}", "name": f"w{n % 30} w{n // 30}", "description": f"w{n % 7}"} for n in range(60)]
    facts = [(n, 0, (n + 7) % 60) for n in range(60)]
    triples = {"train": facts[10:], "valid": facts[:10], "test": []}
    graph = graph_artifact(store, rows, triples=triples)
    text = TextConfig(encoder=folder, max_length=16, precision="float32", tuning=TUNING)

    recipe = pretrain_recipe(store, text, TUNING, TRAIN, graph)
    encoder = store.build(recipe, lambda draft: pretrain(draft, store, text, TUNING, TRAIN, graph)).artifact
    encoder.verify(hashes=True)
    assert encoder.kind == "encoder" and {"config.json", "model.safetensors", "tokenizer.json"} <= set(encoder.files())
    assert METRIC in encoder.counts
    elsewhere = replace(TRAIN, max_failures=7, device="auto")
    assert pretrain_recipe(store, text, TUNING, elsewhere, graph).version == encoder.version
    assert pretrain_recipe(store, text, replace(TUNING, lr=1e-3), TRAIN, graph).version != encoder.version

    base, tuned = embedded(store, text, graph), embedded(store, text, graph, encoder)
    assert base.version != tuned.version
    assert tuned.counts["reused"] == 0, "vectors of the same texts by another encoder"
    before, after = load_vectors(base), load_vectors(tuned)
    expected = TextEncoder(str(encoder.local_path("")), precision="float32", max_length=16)
    named = [f"{row['name']}: {row['description']}" for row in rows]
    np.testing.assert_allclose(after.entities, expected.encode(named).vectors, atol=2e-3)
    assert np.abs(before.entities - after.entities).max() > 1e-2

    # A row more: only it is read, by the same encoder.
    more = graph_artifact(store, [*rows, {"external_id": "new", "name": "w39"}], triples=triples)
    again = embedded(store, text, more, encoder)
    assert (again.counts["reused"], again.counts["texts"]) == (60, 3)

    chain = trace(tuned.version, [store], verify=True)
    assert [node.kind for node in chain.inputs] == ["graph", "encoder"]
    below = {node.kind for node in chain.inputs[1].walk()}
    assert below == {"encoder", "graph", "file"}
    assert any(node.uri.endswith("base/model.safetensors") for node in chain.files())
    assert not [node.uri for node in chain.walk() if node.problem]


def test_a_wrong_mode_reaches_the_user_as_itself(ray_cluster: object, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    triples = {"train": [(0, 0, 1)], "valid": [(1, 0, 0)], "test": []}
    graph = graph_artifact(store, [{"external_id": "a"}, {"external_id": "b"}], triples=triples)
    tuning = replace(TUNING, layers=3)
    text = TextConfig(encoder=save_encoder(tmp_path / "base", tiny_bert()), max_length=16, tuning=tuning)
    recipe = pretrain_recipe(store, text, tuning, TRAIN, graph)
    with pytest.raises(ConfigError, match=r"text\.tuning\.layers.*at most 2"):
        store.build(recipe, lambda draft: pretrain(draft, store, text, tuning, TRAIN, graph))
    with pytest.raises(ConfigError, match=r"text\.template.*columns of the entities"):
        wrong = replace(text, template="{title}")
        store.build(
            pretrain_recipe(store, wrong, tuning, TRAIN, graph),
            lambda draft: pretrain(draft, store, wrong, tuning, TRAIN, graph),
        )
