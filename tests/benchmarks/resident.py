"""Memory of two workers on one resident graph against one, by PSS (shared pages counted by their share).

    python tests/benchmarks/resident.py [--triples 2000000] [--entities 200000]

A random graph is written as a node's copy and mapped by one worker, then by two, each of which touches every page and
says what the graph adds to it; then the same of workers that hold the graph's arrays for themselves, as all did before.
Prints one line of JSON, and exits 1 where two workers take more than 1.1 times the memory of one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from kgray.artifact import Draft, Recipe, Store  # noqa: E402
from kgray.graph.graph import Graph  # noqa: E402
from kgray.graph.resident import ResidentStore, map_resident, write_resident  # noqa: E402

RELATIONS = 50
TARGET = 1.1


def pss() -> int:
    """Bytes of this process, shared ones by its share."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) << 10


def touch(store: ResidentStore) -> int:
    """Read every byte; returns how many there are."""
    arrays = [store.triples, *store.known.to_arrays().values()]
    arrays += [getattr(store.messages, name) for name in ("offsets", "sources", "relations", "triples")]
    for array in arrays:
        array.sum()
    return sum(array.nbytes for array in arrays)


def work(folder: str, mapped: bool, ready: Any, answers: Any) -> None:
    """One worker: what it takes with the graph, all of them having it."""
    before = pss()
    store = map_resident(Path(folder))
    if not mapped:
        triples = {"train": np.array(store.triples)}
        store = ResidentStore.of(Graph.from_arrays(triples, store.num_entities, store.num_relations))
    touch(store)
    ready.wait()
    answers.put(pss() - before)
    ready.wait()


def together(folder: Path, workers: int, mapped: bool) -> float:
    """MiB that so many workers take for the graph."""
    context = multiprocessing.get_context("spawn")
    ready, answers = context.Barrier(workers), context.Queue()
    running = [context.Process(target=work, args=(str(folder), mapped, ready, answers)) for _ in range(workers)]
    for one in running:
        one.start()
    total = sum(answers.get() for _ in running)
    for one in running:
        one.join()
    return total / 2**20


def main() -> int:
    """0 when the target is met, 1 when not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triples", type=int, default=2_000_000)
    parser.add_argument("--entities", type=int, default=200_000)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    sizes = [options.entities, RELATIONS, options.entities]
    triples = np.stack([generator.integers(0, size, options.triples) for size in sizes], axis=1)
    with tempfile.TemporaryDirectory(prefix="kgray-resident-") as scratch:

        def make(draft: Draft) -> dict[str, Any]:
            return write_resident(draft, Graph.from_arrays({"train": triples}, options.entities, RELATIONS))

        folder = Store(scratch).build(Recipe("resident", 1), make).artifact.local_path("")
        size = touch(map_resident(folder)) / 2**20
        cases = [(kind, workers) for kind in ("mapped", "held") for workers in (1, 2)]
        found = {f"{kind}_{workers}_mib": together(folder, workers, kind == "mapped") for kind, workers in cases}
    ratio = found["mapped_2_mib"] / found["mapped_1_mib"]
    result = {"triples": options.triples, "files_mib": size, **found, "ratio": ratio, "target": TARGET}
    print(json.dumps({k: round(v, 3) for k, v in result.items()}))
    return 0 if ratio <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
