"""The estimate of memory against what a training really takes, at two sizes.

    python3 -m pytest -m slow tests/integration/test_preflight_memory.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

FACTOR = 2.0
"""By how much what a training adds to its process may lie above or below the estimate of it."""

TRAINING = """
import json, resource, sys
import numpy as np
from dataclasses import replace
from kgray.graph.graph import Graph
from kgray.machine import resident_memory
from kgray.model.config import GnnConfig, ModelConfig, ObjectiveConfig, TextTowerConfig
from kgray.training.config import TrainConfig
from kgray.training.estimate import Sizes, estimate
from kgray.training.loop import fit
from kgray.training.worker import Worker

entities, triples, dim, batch, kind = json.loads(sys.argv[1])
model = ModelConfig(
    dim=dim, text=TextTowerConfig(kind="none"), gnn=GnnConfig(kind=kind, fanouts=(10,)),
    objective=ObjectiveConfig(kind="sampled_softmax", negatives=1024),
)
train = TrainConfig(epochs=1, batch_size=batch, precision="float32", preflight="off", valid_triples=200)
sizes = Sizes(entities, 20, {"train": triples, "valid": 1000, "test": 0})
draw = np.random.default_rng(0)

def facts(count):
    return draw.integers(0, [entities, 20, entities], (count, 3))

# Everything is imported, and torch's threads and kernels are there, before what training adds is measured.
small = Graph.from_arrays({"train": facts(64), "valid": facts(8)}, entities, 20)
fit(small, None, replace(model, dim=8), replace(train, batch_size=16))
graph = Graph.from_arrays({"train": facts(triples), "valid": facts(1000)}, entities, 20)
before = resident_memory()
needs = estimate(sizes, model, train)
fit(graph, None, model, train)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
base = next(n.bytes for n in needs.memory if n.name.startswith("Python"))
parts = [[need.name, need.bytes] for need in needs.memory]
print(json.dumps({"estimated": needs.total - base, "used": peak - before, "needs": parts}))
"""


def measured(entities: int, triples: int, dim: int, batch: int, kind: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, json.dumps([entities, triples, dim, batch, kind])],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kind", "smaller", "larger"),
    [
        ("none", (50_000, 20_000, 64, 512), (200_000, 20_000, 128, 1024)),
        ("attention", (20_000, 40_000, 64, 1024), (60_000, 40_000, 128, 2048)),
    ],
)
def test_the_estimate_is_within_a_factor_of_what_is_used(
    kind: str, smaller: tuple[int, int, int, int], larger: tuple[int, int, int, int]
) -> None:
    small, large = (measured(*sizes, kind) for sizes in (smaller, larger))
    for found in (small, large):
        assert found["estimated"] / FACTOR < found["used"] < found["estimated"] * FACTOR, found
    assert large["used"] > 2 * small["used"], "sizes apart enough to tell an estimate from a constant"
