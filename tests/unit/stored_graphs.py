"""Graph artifacts of given triples and partitions, and their shards answering by a function call."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from kgray.artifact import Artifact, Draft, Recipe, Store
from kgray.data.tasks import in_process
from kgray.graph.partitioned import PartitionedStore, Request
from kgray.graph.shard import DEGREES, Layout, Shard, mapped
from kgray.graph.shard_build import shards_recipe, write_shards
from kgray.graph.store import AHEAD


def stored_graph(
    store: Store,
    triples: Mapping[str, np.ndarray],
    size: tuple[int, int],
    cuts: Sequence[int],
    undirected: bool = False,
) -> Artifact:
    """A ``graph`` artifact. size: entities and relations; cuts: where partitions end, but for the last."""
    entities, relations = size
    bounds = [0, *cuts, entities]

    def make(draft: Draft) -> dict[str, int]:
        for p, (low, high) in enumerate(pairwise(bounds)):
            name = f"part-{p:05d}.parquet"
            draft.write_table(f"entities/{name}", _named(low, high))
            for split in ("train", "valid", "test"):
                rows = np.asarray(triples.get(split, ()), dtype=np.int64).reshape(-1, 3)
                own = rows[(low <= rows[:, 0]) & (rows[:, 0] < high)]
                columns = dict(zip(("head", "relation", "tail"), own.T, strict=True))
                draft.write_table(f"triples/{split}/{name}", pa.table(columns))
        draft.write_table("relations.parquet", _named(0, relations))
        draft.write_json("partitions.json", {"entities": list(pairwise(bounds))})
        counts = {"entities": entities, "relations": relations, "triples_train": len(triples["train"])}
        return {**counts, **({"undirected": 1} if undirected else {})}

    told = {split: np.asarray(rows).tolist() for split, rows in triples.items()}
    recipe = Recipe("graph", 1, (), {"triples": told, "size": size, "cuts": list(cuts), "undirected": undirected})
    return store.build(recipe, make).artifact


def _named(low: int, high: int) -> pa.Table:
    names = pa.array([f"e{i}" for i in range(low, high)], pa.string())
    return pa.table({"id": np.arange(low, high), "external_id": names, "name": names})


def shards_of(store: Store, graph: Artifact) -> Artifact:
    """What :func:`build_shards` writes, without Ray."""
    return store.build(shards_recipe(graph), lambda draft: in_process(write_shards, draft, graph)).artifact


class CallTransport:
    """Every request and answer is pickled, as on its way to an actor. asked: all requests so far."""

    def __init__(self, shards: Artifact) -> None:
        self.shards = [Shard.open(shards, part) for part in range(Layout.read(shards).parts)]
        self.asked: list[Request] = []

    def ask(self, requests: Sequence[Request]) -> list[Any]:
        self.asked += requests
        answers = []
        for part, method, arguments in pickle.loads(pickle.dumps(list(requests))):
            answers.append(pickle.loads(pickle.dumps(getattr(self.shards[part], method)(*arguments))))
        return answers


def partitioned(shards: Artifact, cache_bytes: int = 0, ahead: int = AHEAD) -> PartitionedStore:
    """The shards' graph over a :class:`CallTransport`."""
    degrees = mapped(shards.local_path(DEGREES))
    return PartitionedStore(Layout.read(shards), degrees, CallTransport(shards), cache_bytes, ahead)
