"""A training worker killed in the middle of an epoch, then the driver: the rerun ends with the same bits.

    python3 -m pytest -m slow tests/integration/test_train_kills.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

REPO = Path(__file__).resolve().parents[2]

CONFIG = """
storage: {{root: {root}}}
data:
  triples: {{train: {umls}/train.tsv, valid: {umls}/valid.tsv, test: {umls}/test.tsv}}
  entities: {umls}/entities.tsv
  relations: {umls}/relations.tsv
graph: {{partitions: 1}}
text: null
model: {{dim: 32, text: {{kind: none}}, objective: {{kind: one_vs_all}}}}
train: {{epochs: {epochs}, batch_size: 64, checkpoint_steps: 20, patience: 100, workers: {workers}}}
lineage: {{enabled: false}}
ray: {{address: local, object_store_memory: 200000000}}
"""


def command(config: Path) -> list[str]:
    return [sys.executable, "-m", "jobs.train", str(config)]


def write_config(folder: Path, umls: Path, *, epochs: int, workers: int = 1) -> Path:
    folder.mkdir()
    path = folder / "kills.yaml"
    path.write_text(CONFIG.format(root=folder / "store", umls=umls, epochs=epochs, workers=workers))
    return path


def finish(config: Path, *overrides: str) -> dict[str, object]:
    done = subprocess.run([*command(config), *overrides], cwd=REPO, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def model_files(config: Path, version: str) -> dict[str, str]:
    """sha256 of every file of the model, as its manifest has them, but of how long it took."""
    manifest = json.loads((config.parent / "store" / "model" / version / "manifest.json").read_text())
    return {f["path"]: f["sha256"] for f in manifest["files"] if f["path"] != "phases.json"}


def until(what: Callable[[], object], seconds: float, why: str) -> object:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.2)
    pytest.fail(f"{why}: not within {seconds:.0f} s")


def checkpoints(config: Path) -> set[str]:
    return {p.parent.name for p in (config.parent / "store" / "runs" / "train").glob("*/epoch-*/checkpoint.pt")}


def train_workers(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "TrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_worker_then_killed_driver_end_with_the_same_bits(tmp_path: Path, umls: Path) -> None:
    calm = write_config(tmp_path / "calm", umls, epochs=8)
    undisturbed = finish(calm)
    version = str(undisturbed["version"])

    rough = write_config(tmp_path / "rough", umls, epochs=8)
    log = (tmp_path / "rough.log").open("w")
    driver = subprocess.Popen(command(rough), cwd=REPO, stdout=log, stderr=log, text=True)
    try:
        until(lambda: checkpoints(rough), 240, "the first checkpoint")
        (worker,) = until(lambda: train_workers(driver), 10, "the training worker")  # type: ignore[misc]
        worker.kill()
        before = checkpoints(rough)
        until(lambda: checkpoints(rough) - before, 240, "a checkpoint after the worker's death")
        family = psutil.Process(driver.pid).children(recursive=True)
        assert train_workers(driver)[0].pid != worker.pid
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(timeout=30)
        assert not (rough.parent / "store" / "model" / version).exists(), "killed too late to prove anything"
        _, alive = psutil.wait_procs(family, timeout=90)
        assert not alive, f"left running after the driver's death: {alive}"
    finally:
        driver.kill()
        log.close()
    resumed = finish(rough)
    assert resumed["version"] == version
    assert resumed["metrics"] == undisturbed["metrics"]
    assert model_files(rough, version) == model_files(calm, version)
    assert not list((rough.parent / "store" / "runs" / "train").glob("*")), "checkpoints outlived their run"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_train_one_model_and_a_broken_loss_ends_at_once(tmp_path: Path, umls: Path) -> None:
    config = write_config(tmp_path / "two", umls, epochs=4, workers=2)
    done = finish(config)
    assert done["status"] == "done"
    metrics = done["metrics"]
    assert isinstance(metrics, dict) and metrics["valid.both.realistic.filtered.full.mrr"] > 0.2
    broken = [*command(config), "train.optimiser.lr=1e30", "train.optimiser.clip_norm=null", "train.epochs=3"]
    failed = subprocess.run(broken, cwd=REPO, capture_output=True, text=True, timeout=400)
    assert failed.returncode == 2, failed.stderr[-3000:]
    assert "the loss became non-finite at epoch 0" in failed.stderr.strip().splitlines()[-1]
    assert "Traceback" not in failed.stderr
    assert list((config.parent / "store" / "model").glob("*/manifest.json")) != []
