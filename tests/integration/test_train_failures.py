"""What a run on Ray does where memory runs out on one of two workers, and where its newest checkpoint is damaged.

    python3 -m pytest -m slow tests/integration/test_train_failures.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_train_kills import REPO, checkpoints, command, finish, model_files, until, write_config

SHORT = """
import importlib.util, sys

class Hook:
    def find_spec(self, name, path=None, target=None):
        if name != "kgray.training.fused_task":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), shorten(module))
        return spec

def shorten(module):
    import torch

    class Short(module.FusedTask):
        def loss(self, batch):
            if len(batch.head) > 64:  # more than half of 64 triples, asked both ways
                torch.empty(1 << 55, dtype=torch.uint8)
            return super().loss(batch)

    module.FusedTask = Short

sys.meta_path.insert(0, Hook())
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_workers_begin_anew_with_halved_batches_where_one_had_no_memory(tmp_path: Path, umls: Path) -> None:
    """An allocation that really fails, in every worker process: Python imports sitecustomize before anything else."""
    config = write_config(tmp_path / "short", umls, epochs=2, workers=2)
    patch = tmp_path / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(SHORT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(patch), str(REPO)])}
    done = subprocess.run(
        command(config), cwd=REPO, capture_output=True, text=True, timeout=800, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "memory had run out (worker" in done.stderr and "batches of 64 are computed as two halves" in done.stderr
    version = json.loads(done.stdout.strip().splitlines()[-1])["version"]
    folder = config.parent / "store" / "model" / version
    assert json.loads((folder / "config.json").read_text())["batch_parts"] == 2
    phases = json.loads((folder / "phases.json").read_text())
    epoch = next(row for row in phases if row["part"] == "epoch 1")
    assert epoch["ranks"] == 2 and epoch["counts"]["exchanged bytes"] > 0
    assert not list((config.parent / "store" / "runs" / "train").glob("*")), "checkpoints outlived their run"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_half_copied_checkpoint_is_named_and_the_one_before_it_gives_the_same_bits(
    tmp_path: Path, umls: Path
) -> None:
    calm = write_config(tmp_path / "calm", umls, epochs=6)
    undisturbed = finish(calm)
    rough = write_config(tmp_path / "rough", umls, epochs=6)
    with (tmp_path / "rough.log").open("w") as log:
        driver = subprocess.Popen(command(rough), cwd=REPO, stdout=log, stderr=log, text=True)
        until(lambda: len(checkpoints(rough)) >= 2, 300, "two checkpoints")
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(timeout=30)
    newest = max((rough.parent / "store" / "runs" / "train").glob("*/epoch-*/checkpoint.pt"))
    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) // 2])
    again = subprocess.run(command(rough), cwd=REPO, capture_output=True, text=True, timeout=500, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"checkpoint.pt has {len(whole) // 2} bytes instead of {len(whole)}" in again.stderr
    assert newest.parent.name in again.stderr
    result = json.loads(again.stdout.strip().splitlines()[-1])
    assert result["metrics"] == undisturbed["metrics"]
    version = str(undisturbed["version"])
    assert model_files(rough, version) == model_files(calm, version)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dry_run_tells_what_training_needs_and_what_does_not_fit_is_refused(tmp_path: Path, umls: Path) -> None:
    config = write_config(tmp_path / "dry", umls, epochs=200)
    early = subprocess.run([*command(config), "--dry-run"], cwd=REPO, capture_output=True, text=True, timeout=300)
    assert early.returncode == 2 and "run python -m jobs.ingest" in early.stderr.strip().splitlines()[-1]
    ingest = [sys.executable, "-m", "jobs.ingest", str(config)]
    subprocess.run(ingest, cwd=REPO, capture_output=True, timeout=300, check=True)
    dry = subprocess.run([*command(config), "--dry-run"], cwd=REPO, capture_output=True, text=True, timeout=300)
    assert dry.returncode == 0, dry.stderr[-3000:]
    result = json.loads(dry.stdout.strip().splitlines()[-1])
    assert result["status"] == "dry run" and result["metrics"]["seconds_a_step"] > 0
    assert "memory of a worker" in dry.stderr and "for train.epochs=200" in dry.stderr
    assert not (config.parent / "store" / "model").exists()
    huge = subprocess.run(
        [*command(config), "--dry-run", "model.dim=200000000"], cwd=REPO, capture_output=True, text=True, timeout=300
    )
    assert huge.returncode == 2 and "lower model.dim" in huge.stderr.strip().splitlines()[-1]
    assert "Traceback" not in huge.stderr
