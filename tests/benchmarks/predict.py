"""Queries a second of batch prediction on Ray beside a bare loop over the same predictor in one process.

    python tests/benchmarks/predict.py [fb15k-237|wn18rr] [--queries 20000] [--workers 1 2] [--dim 256]

Both answer the same completions of test triples (10 answers each, known ones left out) by the same model: random
vectors of a fused model over the graph of the data set, which lies under $KGRAY_DATA or ../shared/data. The bare loop
is ``Predictor.predict`` by batches of 256, its answers thrown away, the model loaded before the clock starts; the batch
also reads and checks the file, starts its actors, loads the model in each and writes Parquet. Prints one line of JSON
with rates, CPU time of the loop, and the ratios, and exits 1 where one worker is slower than the loop without what
starting costs (``steady``: from the first shard that is done to the last).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import torch  # noqa: E402
from rules import read  # noqa: E402

from kgray.artifact import Artifact, Draft, Recipe, Store  # noqa: E402
from kgray.graph.graph import Graph  # noqa: E402
from kgray.model.bundle import Bundle, write_bundle  # noqa: E402
from kgray.model.config import GnnConfig, ModelConfig, TextTowerConfig  # noqa: E402
from kgray.model.fused import FusedModel  # noqa: E402
from kgray.model.states import scorer_of  # noqa: E402
from kgray.prediction.config import PredictConfig  # noqa: E402
from kgray.prediction.pool import Pool  # noqa: E402
from kgray.prediction.predict import predict, predict_recipe  # noqa: E402
from kgray.runtime import RayConfig, ray_session  # noqa: E402
from kgray.serving.predictor import Predictor, Query  # noqa: E402

BATCH, TOP = 256, 10
TARGET = 1.0


def graph_of(folder: Path) -> Graph:
    """The data set with names made of its ids."""
    triples, entities, relations = read(folder)
    bare = Graph.from_arrays(triples, entities, relations)

    def names(letter: str, count: int) -> pa.ChunkedArray:
        return pa.chunked_array([pa.array([f"{letter}{i}" for i in range(count)], pa.string())])

    e, r = names("e", entities), names("r", relations)
    return replace(bare, entity_ids=e, entity_names=e, relation_ids=r, relation_names=r, version="0" * 16)


def model_of(store: Store, graph: Graph, dim: int) -> Artifact:
    """An untrained model: as fast as a trained one."""

    def make(draft: Draft) -> dict[str, Any]:
        torch.manual_seed(0)
        config = ModelConfig(dim=dim, text=TextTowerConfig(kind="none"), gnn=GnnConfig(kind="none"))
        seen = torch.ones(graph.num_entities, dtype=torch.bool)
        model = FusedModel(config, graph.num_relations, seen, None, None)
        index = graph.message_index()
        with torch.no_grad():
            write_bundle(draft.local_dir(), model, scorer_of(model, index), graph, [], {})
        return {}

    return store.build(Recipe("model", 1, (), {"dim": dim}), make).artifact


def queries_of(graph: Graph, count: int) -> list[tuple[str, str, str]]:
    """Tail and head queries of test triples, no two the same."""
    test = graph.triples["test"]
    found = sorted(
        {(f"e{h}", f"r{r}", "?") for h, r, _ in test.tolist()} | {("?", f"r{r}", f"e{t}") for _, r, t in test.tolist()}
    )
    np.random.default_rng(0).shuffle(found)
    return found[:count]


def bare_loop(model: Artifact, queries: list[tuple[str, str, str]]) -> dict[str, float]:
    predictor = Predictor(Bundle.load(model))
    asked = [
        Query(*(None if part == "?" else part for part in query), top_k=TOP, filter_known=True) for query in queries
    ]
    predictor.predict(asked[:BATCH])
    begun, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(asked), BATCH):
        predictor.predict(asked[start : start + BATCH])
    return {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - cpu}


def batch(store: Store, model: Artifact, path: Path, workers: int, rows: int) -> dict[str, float]:
    """Seconds of the whole, and queries a second from the first shard that was done to the last."""
    config = PredictConfig(queries=str(path), top_k=TOP, filter_known=True, workers=workers, shard_rows=rows)
    times: list[float] = []
    run = Pool.run

    def watched(self: Any, items: Any) -> Any:
        for one in run(self, items):
            times.append(time.perf_counter())
            yield one

    Pool.run = watched  # type: ignore[method-assign]
    try:
        begun = time.perf_counter()
        recipe = predict_recipe(store, config, model)
        built = store.build(recipe, lambda draft: predict(draft, store, config, model))
        seconds = time.perf_counter() - begun
    finally:
        Pool.run = run  # type: ignore[method-assign]
    steady = (len(times) - workers) * rows / max(times[-1] - times[workers - 1], 1e-9)
    return {"seconds": seconds, "steady": steady, "answers": float(built.artifact.counts["answers"])}


def main() -> int:
    """0 when a worker is as fast as the loop, 1 when not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="fb15k-237")
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--shard-rows", type=int, default=1024)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(os.environ.get("KGRAY_DATA") or ROOT.parent / "shared" / "data") / options.data
    result: dict[str, Any] = {"data": options.data, "processor": platform.processor() or platform.machine()}
    with tempfile.TemporaryDirectory() as place:
        graph = graph_of(folder)
        queries = queries_of(graph, options.queries)
        path = Path(place) / "queries.tsv"
        path.write_text("".join("\t".join(query) + "\n" for query in queries))
        model = model_of(Store(place), graph, options.dim)
        bare = bare_loop(model, queries)
        rate = len(queries) / bare["seconds"]
        result |= {"entities": graph.num_entities, "queries": len(queries), "loop_per_s": rate, "loop_cpu": bare["cpu"]}
        with ray_session(RayConfig(address="local", num_cpus=max(4, *options.workers), progress=False)):
            for workers in options.workers:
                found = batch(Store(f"{place}/{workers}"), model, path, workers, options.shard_rows)
                result[f"workers_{workers}"] = found | {
                    "per_s": len(queries) / found["seconds"],
                    "ratio": found["steady"] / rate,
                }
    print(json.dumps(result, default=float))
    first = result[f"workers_{options.workers[0]}"]["ratio"]
    return 0 if first >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
