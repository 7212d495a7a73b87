"""A toy world in artifacts, made without Ray: what an entity points at follows from the word it is described by."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file

from kgray.artifact import Artifact, Draft, Recipe, Store
from kgray.graph.graph import SPLITS, Graph
from kgray.model.bundle import write_common
from kgray.model.config import GnnConfig, ModelConfig, ObjectiveConfig, StructureConfig, TextTowerConfig
from kgray.model.ensemble import describe, write_gates
from kgray.model.gate import ONE, Gate, TrainingFacts
from kgray.model.path_scorer import write_paths
from kgray.model.paths import PathModel
from kgray.model.paths_config import PathsConfig
from kgray.text.config import TextConfig
from kgray.text.encoder import TextEncoder
from kgray.text.places import find_encoder, tuned_place
from kgray.text.template import entity_texts, relation_texts
from kgray.text.vectors import INDEX, RELATIONS, entities_file, load_vectors
from kgray.training.config import OptimiserConfig, TrainConfig
from kgray.training.loop import fit

KINDS, MEMBERS = 3, 10
WORDS = [f"w{n}" for n in range(40)]
TEMPLATE = "{name}: {description} {type}"
CONFIG = ModelConfig(
    dim=16,
    text=TextTowerConfig(hidden=0, dropout=0.0),
    structure=StructureConfig(kind="none"),
    gnn=GnnConfig(fanouts=(4,), inference_fanouts=(16,), heads=2, dropout=0.0),
    dropout=0.0,
    query_hidden=16,
    objective=ObjectiveConfig(kind="one_vs_all"),
)


def columns() -> dict[str, list[str]]:
    """Three hubs, then ten members of each kind, told apart by a word of their description."""
    names = [f"hub {kind}" for kind in range(KINDS)]
    texts = [f"w{30 + kind}" for kind in range(KINDS)]
    for kind in range(KINDS):
        names += [f"w{10 + n}" for n in range(MEMBERS)]
        texts += [f"w{kind} w{20 + n}" for n in range(MEMBERS)]
    ids = [f"x{n:02d}" for n in range(len(names))]
    return {"external_id": ids, "name": names, "description": texts, "type": [""] * len(ids)}


def triples() -> dict[str, np.ndarray]:
    """Each member is in its kind's hub (0); members of a kind are next to each other in turn (1)."""
    rows = []
    for kind in range(KINDS):
        first = KINDS + kind * MEMBERS
        rows += [(first + n, 0, kind) for n in range(MEMBERS)]
        rows += [(first + n, 1, first + (n + 1) % MEMBERS) for n in range(MEMBERS)]
    facts = np.random.default_rng(0).permutation(np.array(rows))
    return {"train": facts[8:], "valid": facts[:4], "test": facts[4:8]}


def save_encoder(folder: Path) -> str:
    """A tiny random BERT with a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "hub", "in", "next", ":", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"initializer_range": 0.3}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return str(folder)


def graph_artifact(store: Store) -> Artifact:
    table = columns()

    def make(draft: Draft) -> dict[str, Any]:
        ids = pa.array(range(len(table["name"])), pa.int64())
        draft.write_table("entities/part-00000.parquet", pa.table({"id": ids, **table}))
        names = ["in", "next"]
        relations = {"id": [0, 1], "external_id": names, "name": names, "description": ["", ""]}
        draft.write_table("relations.parquet", pa.table(relations))
        for split in SPLITS:
            rows = triples()[split]
            draft.write_table(f"triples/{split}/part-00000.parquet", pa.table(dict(zip(_ENDS, rows.T, strict=True))))
        return {"entities": len(table["name"]), "relations": 2}

    return store.build(Recipe("graph", 1, (), {}), make).artifact


_ENDS = ("head", "relation", "tail")


def encoder_artifact(store: Store, graph: Artifact, encoder: str) -> Artifact:
    """The encoder as if it had been tuned."""

    def make(draft: Draft) -> dict[str, Any]:
        folder = draft.local_dir()
        shutil.copytree(encoder, folder, dirs_exist_ok=True)
        file = folder / "model.safetensors"
        save_file({name: value * 1.5 for name, value in load_file(file).items()}, file, {"format": "pt"})
        draft.upload_local()
        draft.drop_local()
        return {}

    return store.build(Recipe("encoder", 1, (graph.source,), {}), make).artifact


def vectors_artifact(store: Store, graph: Artifact, encoder: str, tuned: Artifact | None = None) -> Artifact:
    def make(draft: Draft) -> dict[str, Any]:
        place = find_encoder(TextConfig(encoder=encoder)) if tuned is None else tuned_place(tuned)
        reader = TextEncoder(place.path, max_length=32, precision="float32")
        entities = reader.encode(entity_texts(columns(), TEMPLATE)).vectors.astype(np.float16)
        names = {"name": ["in", "next"], "description": ["", ""]}
        relations = reader.encode(relation_texts(names, "{name}: {description}")).vectors.astype(np.float16)
        folder = draft.local_dir()
        np.save(folder / entities_file(0), entities)
        np.save(folder / RELATIONS, relations)
        draft.upload_local()
        draft.drop_local()
        index = {"dim": 32, "relations": 2, "encoder": encoder, "pooling": "mean", "normalise": True}
        index |= {"encoder_sha256": place.sha256, "precision": "float32"}
        index |= {"max_length": 32, "template": TEMPLATE}
        draft.write_json(INDEX, index | {"parts": [{"file": entities_file(0), "start": 0, "end": len(entities)}]})
        return {}

    inputs = (graph.source,) if tuned is None else (graph.source, tuned.source)
    return store.build(Recipe("vectors", 1, inputs, {}), make).artifact


def model_artifact(store: Store, graph: Artifact, vectors: Artifact | None, config: ModelConfig = CONFIG) -> Artifact:
    """A fused model, trained."""

    def make(draft: Draft) -> dict[str, Any]:
        loaded = Graph.load(graph)
        how = TrainConfig(
            epochs=30, batch_size=16, precision="float32", evaluate_every=10, optimiser=OptimiserConfig(lr=0.02)
        )
        done = fit(loaded, None if vectors is None else load_vectors(vectors), config, how)
        info = {"metrics": {}, "vectors": None if vectors is None else vectors.version}
        done.task.write(draft.local_dir(), done.scorer, loaded, done.history, info)
        draft.upload_local()
        draft.drop_local()
        return {}

    inputs = (graph.source,) if vectors is None else (graph.source, vectors.source)
    return store.build(Recipe("model", 1, inputs, {"kind": config.text.kind, "gnn": config.gnn.kind}), make).artifact


def paths_artifact(store: Store, graph: Artifact) -> Artifact:
    """A path model, untrained: it knows ids only."""

    def make(draft: Draft) -> dict[str, Any]:
        torch.manual_seed(0)
        loaded, folder = Graph.load(graph), draft.local_dir()
        model = PathModel(replace(PathsConfig(), dim=8), loaded.message_index(), loaded.num_relations)
        write_paths(folder, model, loaded, [], {"metrics": {}})
        draft.upload_local()
        draft.drop_local()
        return {}

    return store.build(Recipe("model", 1, (graph.source,), {"family": "paths"}), make).artifact


def ensemble_artifact(store: Store, graph: Artifact, members: dict[str, Artifact]) -> Artifact:
    """Every member with weight 1 on entity queries."""

    def make(draft: Draft) -> dict[str, Any]:
        loaded, folder, count = Graph.load(graph), draft.local_dir(), len(members)
        gate = Gate(tuple(members), torch.ones(3, count), torch.full((3, count), ONE))
        told = {"members": {"entity": list(members)}, "chosen": {}, "second_look": None}
        tasks = {name: ["tail", "head"] for name in members}
        write_common(folder, "ensemble", loaded, {"members": describe(members, tasks), "gate": told, "metrics": {}})
        train = loaded.triples["train"]
        write_gates(folder, {"entity": gate}, TrainingFacts.of(train, loaded.num_entities, loaded.num_relations))
        draft.upload_local()
        draft.drop_local()
        return {}

    inputs = (graph.source, *(member.source for member in members.values()))
    return store.build(Recipe("model", 2, inputs, {"members": list(members)}), make).artifact
