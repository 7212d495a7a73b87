"""Triples a second of ComplEx training by kgray's loop beside PyKEEN's, on FB15k-237.

    python tests/benchmarks/kge_training.py --pykeen-python /tmp/pykeen/bin/python [--rank 256] [--batch 1000]

Both train the same rank (complex numbers a vector) and batch with Adagrad on the softmax over all entities as tail and
as head, without a regulariser; kgray leaves known answers out of it, PyKEEN (its SymmetricLCWATrainingLoop) does not.
kgray runs the steps of its Trainer, in the precision that is its default here unless told; PyKEEN runs in float32, the
only one its complex numbers have. They take turns of some steps on the same threads. pykeen_peer.py says how PyKEEN is
installed. FB15k-237 lies under $KGRAY_DATA or ../shared/data. Prints one line of JSON, and exits 1 when kgray was not
three times as fast.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from pykeen_peer import Peer, timed  # noqa: E402
from rules import read  # noqa: E402

from kgray.graph.graph import Graph  # noqa: E402
from kgray.model.config import GnnConfig, ModelConfig, ObjectiveConfig, StructureConfig, TextTowerConfig  # noqa: E402
from kgray.training.config import OptimiserConfig, TrainConfig  # noqa: E402
from kgray.training.loop import Trainer  # noqa: E402
from kgray.training.worker import Worker  # noqa: E402

TARGET = 3.0


def trainer_of(graph: Graph, rank: int, batch: int, precision: str) -> Trainer:
    """kgray's side: two tables, one softmax, Adagrad."""
    model = ModelConfig(
        dim=2 * rank,
        text=TextTowerConfig(kind="none"),
        gnn=GnnConfig(kind="none"),
        structure=StructureConfig(init_scale=1e-3),
        dropout=0.0,
        objective=ObjectiveConfig(kind="one_vs_all", relation_weight=0.0),
    )
    optimiser = OptimiserConfig(table_lr=0.1, warmup=0.0, schedule="constant")
    train = TrainConfig(batch_size=batch, optimiser=optimiser, precision=precision)  # type: ignore[arg-type]
    return Trainer(graph, None, model, train, Worker("cpu"))


def last_steps(trainer: Trainer, steps: int) -> None:
    """The last steps of one epoch, which start at the place a checkpoint would have kept."""
    at = trainer.position
    at.epoch, at.step = at.epoch + 1, trainer.batches.steps - steps
    trainer._epoch()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    folder = Path(os.environ.get("KGRAY_DATA") or ROOT.parent / "shared" / "data") / "fb15k-237"
    triples, entities, relations = read(folder)
    graph = Graph.from_arrays(triples, entities, relations)
    trainer = trainer_of(graph, options.rank, options.batch, options.precision)
    rest = len(triples["train"]) - (trainer.batches.steps - 1) * options.batch
    count = (options.steps - 1) * options.batch + rest
    peer = Peer(options.pykeen_python, options.threads)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "triples.npz"
        np.savez(path, **triples)
        peer.ask(do="start", path=str(path), entities=entities, relations=relations, rank=options.rank)
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    for turn in range(options.turns + 1):  # the first one warms both up

        def we(turn: int = turn) -> None:
            ours.append(timed(lambda: last_steps(trainer, options.steps))[1])

        def they(turn: int = turn) -> None:
            start = turn * count % (len(triples["train"]) - count)
            theirs.append(peer.ask(do="train", start=start, stop=start + count, batch=options.batch))

        for work in (we, they) if turn % 2 else (they, we):
            work()
    peer.close()
    total = {
        name: {key: sum(turn[key] for turn in side[1:]) for key in ("wall", "cpu")}
        for name, side in (("kgray", ours), ("pykeen", theirs))
    }
    done = count * options.turns
    return {
        "data": "fb15k-237",
        "processor": platform.processor() or platform.machine(),
        "threads": options.threads,
        "rank": options.rank,
        "batch": options.batch,
        "precision": "bfloat16" if trainer.autocast else "float32",
        "triples": done,
        "kgray_triples_per_s": done / total["kgray"]["wall"],
        "pykeen_triples_per_s": done / total["pykeen"]["wall"],
        "ratio": total["pykeen"]["wall"] / total["kgray"]["wall"],
        "ratio_cpu_time": total["pykeen"]["cpu"] / total["kgray"]["cpu"],
        "kgray_peak_mib": ours[-1]["peak_mib"],
        "pykeen_peak_mib": theirs[-1]["peak_mib"],
        "target": TARGET,
    }


def main() -> int:
    """0 when the target is met, 1 when not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pykeen-python", required=True)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10, help="steps a turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options)
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}))
    return 0 if result["ratio"] >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
