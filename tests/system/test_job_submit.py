"""`ray job submit` against a local head, as a user types it.

python3 -m pytest -m slow tests/system/test_job_submit.py
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

REPO = Path(__file__).resolve().parents[2]
QUESTION = {"head": "virus", "relation": "causes", "top_k": 5}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, outside those of Ray's workers (10002-19999) and of outgoing connections."""
    found: list[int] = []
    while len(found) < count:
        port = random.randint(20000, 32000)
        with socket.socket() as probe:
            if port not in found and probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
    return found


@dataclass
class Head:
    """A Ray head of our own: cluster/local.sh in a folder and on ports of its own."""

    url: str
    environment: dict[str, str]

    def submit(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``ray job submit``, waiting for the end of the job."""
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", self.url),
            *("--submission-id", name, "--working-dir", ".", "--", "python", "-m", *arguments),
        ]
        return subprocess.run(
            command, cwd=REPO, env=self.environment, capture_output=True, text=True, timeout=800, check=False
        )

    def api(self, path: str) -> Any:
        """What the Jobs API says."""
        return httpx.get(f"{self.url}/api/jobs/{path}", timeout=30, trust_env=False).raise_for_status().json()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = tempfile.mkdtemp(prefix="kgh", dir="/tmp")
    names = (
        "KGRAY_RAY_PORT",
        "KGRAY_DASHBOARD_PORT",
        "KGRAY_AGENT_PORT",
        "KGRAY_CLIENT_PORT",
        "KGRAY_METRICS_PORT",
    )
    ports = dict(zip(names, map(str, free_ports(len(names))), strict=True))
    environment = os.environ | ports
    environment |= {
        "KGRAY_RAY_DIR": folder,
        "KGRAY_RAY_OBJECT_STORE": str(200 << 20),
        "PYTHON": sys.executable,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
    }
    script = [str(REPO / "cluster" / "local.sh")]
    subprocess.run([*script, "start"], env=environment, check=True, timeout=200)
    try:
        yield Head(f"http://127.0.0.1:{ports['KGRAY_DASHBOARD_PORT']}", environment)
    finally:
        subprocess.run([*script, "stop"], env=environment, check=False, timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def storage() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kgray-system-") as folder:
        yield Path(folder)


def overrides(storage: Path, port: int) -> list[str]:
    return [f"storage.root={storage}", f"serve.port={port}", "train.epochs=2", "train.evaluate_every=1"]


def last_line(logs: str) -> dict[str, Any]:
    """The line of JSON in a job's logs, where stdout and stderr stand together."""
    line = [text for text in logs.splitlines() if text.startswith('{"job"')][-1]
    return json.loads(line)  # type: ignore[no-any-return]


def test_the_submitted_quickstart_leaves_a_traced_answer_behind(head: Head, storage: Path) -> None:
    (port,) = free_ports(1)
    command = ("jobs.pipeline", "configs/quickstart.yaml", *overrides(storage, port))
    submitted = head.submit("kgray-system-1", *command)
    assert submitted.returncode == 0, submitted.stdout[-5000:] + submitted.stderr[-2000:]
    job = head.api("kgray-system-1")
    assert (job["status"], job["driver_exit_code"]) == ("SUCCEEDED", 0)
    logs = head.api("kgray-system-1/logs")["logs"]
    result = last_line(logs)
    assert result["status"] == "done" and result["url"] == f"http://127.0.0.1:{port}"
    assert "test.both.realistic.filtered.full" in logs and "POST http://127.0.0.1" in logs

    # The job has ended; the service has not, and says which model answers.
    answer = httpx.post(f"{result['url']}/v1/predict", json=QUESTION, timeout=30, trust_env=False)
    assert answer.status_code == 200 and len(answer.json()["predictions"]) == 5
    version = answer.headers["x-kgray-model-version"]
    assert version == result["version"] == answer.json()["model"]["version"]
    assert httpx.get(f"{result['url']}/readyz", timeout=30, trust_env=False).status_code == 200

    # From the header of the answer to the rows it came from.
    lineage = subprocess.run(
        [sys.executable, "-m", "jobs.lineage", version, "--storage", str(storage)],
        cwd=REPO, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    for file in (REPO / "configs/data/umls").glob("*.tsv"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in lineage.stdout

    # The runs in MLflow name the submission.
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("kgray")
    runs = client.search_runs([experiment.experiment_id], "tags.`ray.submission_id` = 'kgray-system-1'")
    assert {run.info.run_name for run in runs} >= {"ingest", "embed", "train", "ensemble", "evaluate", "deploy"}
    assert {run.info.status for run in runs} == {"FINISHED"}

    # Submitted again it changes nothing, and the service answers throughout.
    again = head.submit("kgray-system-2", *command)
    assert again.returncode == 0, again.stdout[-5000:]
    assert last_line(head.api("kgray-system-2/logs")["logs"])["status"] == "up to date"
    answer = httpx.post(f"{result['url']}/v1/predict", json=QUESTION, timeout=30, trust_env=False)
    assert answer.headers["x-kgray-model-version"] == version


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("key", "train.batchsize=3", ["train.batchsize", "did you mean 'train.batch_size'"]),
        ("file", "data.triples.train=nowhere.tsv", ["nowhere.tsv"]),
        ("workers", "train.workers=64", ["train.workers"]),
    ],
)
def test_a_failing_configuration_is_a_failed_job_with_the_reason_in_one_line(
    head: Head, storage: Path, name: str, override: str, words: list[str]
) -> None:
    arguments = ("jobs.train", "configs/quickstart.yaml", f"storage.root={storage}", override)
    submitted = head.submit(f"kgray-system-{name}", *arguments)
    assert submitted.returncode != 0
    job = head.api(f"kgray-system-{name}")
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 2)
    reason = job["message"].strip().splitlines()[-1]
    assert reason.startswith("kgray train: ")
    for word in words:
        assert word in reason
    assert "Traceback" not in head.api(f"kgray-system-{name}/logs")["logs"]
