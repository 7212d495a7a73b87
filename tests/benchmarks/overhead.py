"""What Ray, artifacts and MLflow add to the bare training loop, on the same training.

    python tests/benchmarks/overhead.py configs/wn18rr.yaml [--epochs 2] [--turns 1] [key=value ...]

The inputs (graph, vectors) are built first and count for neither. Then two processes take turns: one opens the
artifacts and calls ``kgray.training.loop.fit``, the other is ``python -m jobs.train``. Each is timed from its start to
its end, imports and all, by the clock and by the processor (user and system time of all its processes: on a busy
machine believe that one). Prints one line of JSON, and exits 1 when the job took 10% more of the clock than the bare
loop.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = 1.10

INPUTS = """
import json, sys
from kgray.config import load_config
from kgray.pipeline import steps
from kgray.pipeline.plan import Work, needed
from kgray.pipeline.settings import Settings

settings = load_config(Settings, sys.argv[1], sys.argv[2:])
work = Work(settings, "overhead")
*inputs, _ = needed(steps.steps_of(settings), ["train"])
"""

PREPARE = """
with work:
    for step in inputs:
        work.run(step)
print("{}")
"""

BARE = """
from kgray.graph.graph import Graph
from kgray.text.vectors import load_vectors
from kgray.training.loop import fit

for step in inputs:
    work.artifacts[step.name] = work.store.find(step.recipe(work))
vectors = work.artifacts.get("embed")
read = None if vectors is None else load_vectors(vectors)
done = fit(Graph.load(work.artifacts["ingest"]), read, settings.model, settings.train)
print(json.dumps({"best": done.best}))
"""


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, float, dict[str, object]]:
    """Seconds by the clock and by the processor, and the last line, which is JSON; exits where the command fails."""
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command[:4])} failed:\n{done.stderr[-3000:]}")
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - begin, spent, json.loads(done.stdout.strip().splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--turns", type=int, default=1)
    given = parser.parse_args()
    clock: dict[str, list[float]] = {"bare": [], "job": []}
    processor: dict[str, list[float]] = {"bare": [], "job": []}
    best = set()
    with tempfile.TemporaryDirectory(prefix="kgray-overhead-") as folder:
        environment = os.environ | {"KGRAY_STORAGE": folder, "PYTHONPATH": str(ROOT)}
        common = [f"train.epochs={given.epochs}", "train.device=cpu", "members.snapshots=0", *given.overrides]
        timed([sys.executable, "-c", INPUTS + PREPARE, given.config, *common], environment)
        for turn in range(given.turns):
            # Another seed is another model: the same one would be up to date the second time.
            arguments = [given.config, *common, f"train.seed={turn}"]
            runs = {
                "bare": [sys.executable, "-c", INPUTS + BARE, *arguments],
                "job": [sys.executable, "-m", "jobs.train", *arguments],
            }
            for name, command in runs.items():
                seconds, spent, line = timed(command, environment)
                clock[name].append(seconds)
                processor[name].append(spent)
                metrics = line.get("metrics")
                found = metrics if isinstance(metrics, dict) else {"best": line["best"]}
                best.add(next(round(v, 6) for k, v in found.items() if k == "best" or k.endswith(".mrr")))
    ratio = sum(clock["job"]) / sum(clock["bare"])
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "config": given.config,
        "epochs": given.epochs,
        "seconds": clock,
        "processor_seconds": processor,
        "ratio": round(ratio, 3),
        "processor_ratio": round(sum(processor["job"]) / sum(processor["bare"]), 3),
        "same_results": len(best) == given.turns,
        "target": TARGET,
    }
    print(json.dumps(result))
    return 0 if ratio <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
