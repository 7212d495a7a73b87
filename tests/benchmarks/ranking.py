"""Seconds of the full filtered ranking of FB15k-237's test triples by kgray beside PyKEEN's RankBasedEvaluator.

    python tests/benchmarks/ranking.py --pykeen-python /tmp/pykeen/bin/python [--rank 256] [--triples 4000]

Both rank heads and tails of the same ComplEx vectors among all entities, known answers of all splits left out; the
vectors are those of some steps of training, a reciprocal relation being the conjugate. They take turns on parts of the
test triples, on the same threads, and must find the same MRR. pykeen_peer.py says how PyKEEN is installed. FB15k-237
lies under $KGRAY_DATA or ../shared/data. Prints one line of JSON, and exits 1 when kgray was not five times as fast,
its memory grew by more than 64 MiB after the first part, or the two MRR differ.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from kge_training import last_steps, trainer_of  # noqa: E402
from pykeen_peer import Peer, timed  # noqa: E402
from rules import read  # noqa: E402

from kgray.evaluation.ranking import filter_splits, rank_triples  # noqa: E402
from kgray.graph.graph import SPLITS, Graph  # noqa: E402
from kgray.model.states import StateScorer  # noqa: E402

TARGET, GROWTH, AGREEMENT = 5.0, 64.0, 1e-4


def vectors(graph: Graph, rank: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 2 rank) and (R, 2 rank), first halves real: of a model trained for some steps."""
    trainer = trainer_of(graph, rank, 500, "auto")
    last_steps(trainer, steps)
    scorer = trainer.task.scorer()
    return scorer.tails, scorer.relations[: graph.num_relations]


def interleaved(rows: torch.Tensor) -> np.ndarray[Any, Any]:
    """(n, rank, 2) from (n, 2 rank): the order of PyKEEN's complex numbers."""
    return torch.stack(rows.chunk(2, dim=1), dim=2).numpy()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    folder = Path(os.environ.get("KGRAY_DATA") or ROOT.parent / "shared" / "data") / "fb15k-237"
    triples, num_entities, num_relations = read(folder)
    if options.triples is not None:
        drawn = np.random.default_rng(0).choice(len(triples["test"]), options.triples, replace=False)
    else:
        drawn = np.arange(len(triples["test"]))
    graph = Graph.from_arrays(triples, num_entities, num_relations)
    entities, relations = vectors(graph, options.rank, options.steps)
    real, imaginary = relations.chunk(2, dim=1)
    both = torch.cat([relations, torch.cat([real, -imaginary], dim=1)])
    scorer = StateScorer(entities, entities, both, "complex")
    test = triples["test"][drawn]
    known = graph.known(filter_splits("test"))
    peer = Peer(options.pykeen_python, options.threads)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "graph.npz"
        saved = {"entity_vectors": interleaved(entities), "relation_vectors": interleaved(relations)}
        # The filter is of all test triples, in whatever order: the drawn ones come first.
        others = np.delete(triples["test"], drawn, axis=0)
        splits = {split: triples[split] for split in SPLITS} | {"test": np.concatenate([test, others])}
        np.savez(path, **splits, **saved)  # type: ignore[arg-type]
        peer.ask(do="start", path=str(path), entities=num_entities, relations=num_relations, rank=options.rank)
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    rank_triples(scorer, test[:64], known, split="test", tasks=("tail", "head"))
    peer.ask(do="rank", start=0, stop=64, batch=options.pykeen_batch)
    bounds = [len(test) * turn // options.turns for turn in range(options.turns + 1)]
    for turn, (start, stop) in enumerate(pairwise(bounds)):

        def we(start: int = start, stop: int = stop) -> None:
            counts, spent = timed(
                lambda: rank_triples(scorer, test[start:stop], known, split="test", tasks=("tail", "head"))
            )
            mrr = float(counts.metrics()["test.both.realistic.filtered.full.mrr"])
            ours.append({**spent, "mrr": mrr * (stop - start)})

        def they(start: int = start, stop: int = stop) -> None:
            answer = peer.ask(do="rank", start=start, stop=stop, batch=options.pykeen_batch)
            theirs.append({**answer, "mrr": answer["mrr"] * (stop - start)})

        for work in (we, they) if turn % 2 else (they, we):
            work()
    peer.close()
    fast, slow = ({k: sum(turn[k] for turn in side) for k in ("wall", "cpu", "mrr")} for side in (ours, theirs))
    return {
        "data": "fb15k-237",
        "processor": platform.processor() or platform.machine(),
        "threads": options.threads,
        "rank": options.rank,
        "triples": len(test),
        "kgray_seconds": fast["wall"],
        "pykeen_seconds": slow["wall"],
        "ratio": slow["wall"] / fast["wall"],
        "ratio_cpu_time": slow["cpu"] / fast["cpu"],
        "kgray_mrr": fast["mrr"] / len(test),
        "pykeen_mrr": slow["mrr"] / len(test),
        "kgray_growth_mib": max(turn["peak_mib"] for turn in ours) - ours[0]["peak_mib"],
        "pykeen_growth_mib": max(turn["peak_mib"] for turn in theirs) - theirs[0]["peak_mib"],
        "kgray_peak_mib": max(turn["peak_mib"] for turn in ours),
        "pykeen_peak_mib": max(turn["peak_mib"] for turn in theirs),
        "target": TARGET,
    }


def main() -> int:
    """0 when the targets are met, 1 when not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pykeen-python", required=True)
    parser.add_argument("--pykeen-batch", type=int, default=256, help="triples PyKEEN ranks at once; left alone, 32")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60, help="training steps the vectors come from")
    parser.add_argument("--triples", type=int, help="as many test triples, drawn at random; all by default")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options)
    print(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in result.items()}))
    same = abs(result["kgray_mrr"] - result["pykeen_mrr"]) <= AGREEMENT
    return 0 if result["ratio"] >= TARGET and result["kgray_growth_mib"] <= GROWTH and same else 1


if __name__ == "__main__":
    sys.exit(main())
