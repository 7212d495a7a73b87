"""An epoch's time over a partitioned graph against a resident one, on one machine, with the cache on and off.

    python tests/benchmarks/store.py [--data wn18rr] [--partitions 4] [--steps 30] [--cache-mib 64]

WN18RR (or another graph under $KGRAY_DATA or ../shared/data) is ingested into partitions, its shards held by an actor
each, and one trainer of the fused model without text (fan-outs --fanouts) takes the first steps of an epoch over each
body in turn: the resident graph, the partitioned one without a cache, with one. All end with the same weights, which is
checked. Wall clock and CPU time are told, the latter of the trainer alone and of the actors, with requests and bytes by
hop. Prints one line of JSON, and exits 1 where the partitioned graph with a cache takes more than 1.5 times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402

from kgray.artifact import Artifact, Store  # noqa: E402
from kgray.config import from_dict  # noqa: E402
from kgray.data.config import DataConfig  # noqa: E402
from kgray.data.ingest import ingest, ingest_recipe  # noqa: E402
from kgray.data.partition import GraphConfig  # noqa: E402
from kgray.graph.actors import owners  # noqa: E402
from kgray.graph.graph import Graph  # noqa: E402
from kgray.graph.resident import open_resident  # noqa: E402
from kgray.graph.shard_build import build_shards  # noqa: E402
from kgray.graph.store import GraphStore  # noqa: E402
from kgray.model.config import GnnConfig, ModelConfig, ObjectiveConfig, TextTowerConfig  # noqa: E402
from kgray.runtime import RayConfig, ray_session  # noqa: E402
from kgray.training.config import TrainConfig  # noqa: E402
from kgray.training.loop import Trainer  # noqa: E402
from kgray.training.worker import Worker  # noqa: E402

TARGET = 1.5


def graph_artifact(store: Store, folder: Path, partitions: int) -> Artifact:
    """The graph of a folder of triples, ingested."""
    triples = {split: str(folder / f"{split}.tsv.gz") for split in ("train", "valid", "test")}
    data, graph = from_dict(DataConfig, {"triples": triples}), GraphConfig(partitions=partitions)
    return store.build(ingest_recipe(store, data, graph), lambda draft: ingest(draft, data, graph)).artifact


def trainer_over(artifact: Artifact, store: GraphStore, options: argparse.Namespace) -> Trainer:
    """A trainer whose batches come from this body."""
    fanouts = tuple(options.fanouts)
    model = ModelConfig(
        dim=options.dim,
        text=TextTowerConfig(kind="none"),
        gnn=GnnConfig(kind="attention", fanouts=fanouts, inference_fanouts=fanouts),
        objective=ObjectiveConfig(kind="sampled_softmax", negatives=1024),
    )
    train = TrainConfig(batch_size=options.batch, precision="float32", valid_triples=100)
    return Trainer(Graph.for_training(artifact, store), None, model, train, Worker("cpu"))


def take(trainer: Trainer, steps: int) -> None:
    """The next steps of an epoch, through the loop's own batches, made ahead of their use."""
    trainer.model.train()
    at = trainer.position
    batches = trainer.batches.epoch(at.epoch, at.step)
    for _, batch in zip(range(steps), batches, strict=False):
        trainer._gradients(batch)
        trainer.optimisers.step()
        at.step += 1
    batches.close()  # type: ignore[attr-defined]


def cpu_of_actors() -> float:
    """Seconds of CPU of the owners' processes."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith("ray::Owner"):
                total += sum(process.cpu_times()[:2])
        except psutil.Error:
            continue
    return total


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    os.environ["KGRAY_CACHE"] = str(scratch / "cache")
    folder = Path(os.environ.get("KGRAY_DATA") or ROOT.parent / "shared" / "data") / options.data
    store = Store(scratch / "store")
    with ray_session(RayConfig(address="local", object_store_memory=200 << 20)):
        artifact = graph_artifact(store, folder, options.partitions)
        shards = build_shards(store, artifact)
        config = GraphConfig(store="partitioned", partitions=options.partitions)
        with owners(shards, GraphConfig(store="partitioned", cache_mib=0)) as held:
            cached = type(held)(shards, held.actors, GraphConfig(store="partitioned", cache_mib=options.cache_mib))
            bodies: dict[str, GraphStore] = {
                "resident": open_resident(artifact),
                "partitioned": held.connect(0),
                "cached": cached.connect(0),
            }
            return {"partitions": config.partitions, **compare(artifact, bodies, options)}


def compare(artifact: Artifact, bodies: dict[str, GraphStore], options: argparse.Namespace) -> dict[str, Any]:
    trainers = {name: trainer_over(artifact, body, options) for name, body in bodies.items()}
    told: dict[str, dict[str, float]] = {name: {"wall": 0.0, "cpu": 0.0, "actors_cpu": 0.0} for name in bodies}
    for turn in range(options.turns + 1):  # the first one warms all up
        for name in sorted(bodies, reverse=bool(turn % 2)):
            torch.manual_seed(turn)  # dropout
            began = time.monotonic(), time.process_time(), cpu_of_actors()
            take(trainers[name], options.steps)
            if turn:
                ended = time.monotonic(), time.process_time(), cpu_of_actors()
                for key, before, after in zip(("wall", "cpu", "actors_cpu"), began, ended, strict=True):
                    told[name][key] += after - before
    wanted = trainers["resident"].model.state_dict()
    for name, trainer in trainers.items():
        weights = trainer.model.state_dict()
        if not all(torch.equal(weights[key], wanted[key]) for key in wanted):
            raise AssertionError(f"the weights over the {name} graph differ")
    base = told["resident"]
    return {
        "processor": platform.processor() or platform.machine(),
        "data": options.data,
        "fanouts": options.fanouts,
        "batch": options.batch,
        "steps": options.steps * options.turns,
        **{f"{name}_{key}_s": value for name, row in told.items() for key, value in row.items()},
        **{f"{name}_ratio": told[name]["wall"] / base["wall"] for name in ("partitioned", "cached")},
        **{
            f"{name}_ratio_cpu": (told[name]["cpu"] + told[name]["actors_cpu"]) / base["cpu"]
            for name in ("partitioned", "cached")
        },
        **{f"{name}_traffic": bodies[name].traffic.table() for name in ("partitioned", "cached")},  # type: ignore[attr-defined]
        "target": TARGET,
    }


def rounded(value: Any) -> Any:
    """Floats to four digits."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def main() -> int:
    """0 when the target is met, 1 when not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="wn18rr")
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--fanouts", type=int, nargs="+", default=[15, 10])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10, help="steps a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cache-mib", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="kgray-store-") as scratch:
        result = measure(options, Path(scratch))
    print(json.dumps(rounded(result)))
    return 0 if result["cached_ratio"] <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
