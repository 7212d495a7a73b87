"""Graph and model artifacts of synthetic triples, laid out as ingest and train write them, for tests here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from kgray.artifact import Artifact, Draft, Recipe, Store
from kgray.graph.graph import Graph
from kgray.model.bundle import write_bundle
from kgray.model.config import GnnConfig, ModelConfig, TextTowerConfig
from kgray.model.fused import FusedModel
from kgray.model.states import scorer_of

SPLITS = ("train", "valid", "test")


def random_splits(seed: int, entities: int, relations: int, counts: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """(n, 3) int64 triples by split; the last tenth of the entities is never in train."""
    draw = np.random.default_rng(seed)
    splits = {}
    for split, count in zip(SPLITS, counts, strict=True):
        limit = max(2, entities * 9 // 10) if split == "train" else entities
        # Squared uniform numbers make some entities and relations frequent, as in real graphs.
        columns = [(draw.random(count) ** 2 * size).astype(np.int64) for size in (limit, relations, limit)]
        splits[split] = np.stack(columns, axis=1)
    return splits


def graph_artifact(
    store: Store,
    splits: dict[str, np.ndarray],
    entities: int,
    relations: int,
    *,
    partitions: int = 3,
    relation_ids: list[str] | None = None,
    entity_ids: list[str] | None = None,
    row_group: int = 300,
) -> Artifact:
    """A ``graph`` artifact; triples lie in the partition of their head, in row groups of ``row_group``."""
    names = relation_ids or [f"_relation_{i}" for i in range(relations)]
    keys = entity_ids or [f"e{i}" for i in range(entities)]
    bounds = [entities * i // partitions for i in range(partitions + 1)]

    def make(draft: Draft) -> dict[str, Any]:
        for number in range(partitions):
            low, high = bounds[number], bounds[number + 1]
            ids = pa.array(keys[low:high], pa.string())
            table = {"id": pa.array(range(low, high), pa.int64()), "external_id": ids, "name": ids}
            table["description"] = pa.array([""] * (high - low), pa.string())
            draft.write_table(f"entities/part-{number:05d}.parquet", pa.table(table))
            for split in SPLITS:
                rows = splits[split][(splits[split][:, 0] >= low) & (splits[split][:, 0] < high)]
                columns = {
                    "head": pa.array(rows[:, 0]),
                    "relation": pa.array(rows[:, 1].astype(np.int32)),
                    "tail": pa.array(rows[:, 2]),
                }
                path = f"triples/{split}/part-{number:05d}.parquet"
                draft.write_table(path, pa.table(columns), row_group_size=row_group)
        ids = pa.array(names, pa.string())
        table = {"id": pa.array(range(relations), pa.int64()), "external_id": ids, "name": ids}
        draft.write_table("relations.parquet", pa.table(table))
        counts = {f"triples_{split}": len(splits[split]) for split in SPLITS}
        return {"entities": entities, "relations": relations, **counts}

    content = {split: rows.tolist()[:2000] for split, rows in splits.items()}
    recipe = Recipe("graph", 1, (), {"entities": entities, "names": names, "splits": content})
    return store.build(recipe, make).artifact


def model_artifact(
    store: Store, graph: Artifact, *, dim: int = 16, history: int = 12, poison: bool = False
) -> Artifact:
    """A ``model`` artifact of random structural vectors; ``poison`` puts a NaN into entity 1."""

    def make(draft: Draft) -> dict[str, Any]:
        loaded = Graph.load(graph)
        torch.manual_seed(7)
        config = ModelConfig(dim=dim, text=TextTowerConfig(kind="none"), gnn=GnnConfig(kind="none"))
        index = loaded.message_index()
        model = FusedModel(config, loaded.num_relations, torch.from_numpy(index.degrees > 0), None, None)
        scorer = scorer_of(model, index)
        if poison:
            scorer.tails[1] = torch.nan
        key = "valid.both.realistic.filtered.full.mrr"
        rows = [{"epoch": i, "train.loss": 6 / (i + 1), key: 0.5 - 0.4 / (i + 1)} for i in range(history)]
        write_bundle(Path(draft.local_dir()), model, scorer, loaded, rows, {})
        return {}

    return store.build(Recipe("model", 1, (graph.source,), {"dim": dim, "poison": poison}), make).artifact
