"""`cluster/local.sh` and `ray job submit`: the service outlives its job, the head leaves nothing behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from serve_models import free_port, make_model, umls_graph

from kgray.artifact import Store

REPO = Path(__file__).parents[2]


class Head:
    """The script, with a folder and ports of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dashboard_port = free_port()
        ports = ("RAY_PORT", "AGENT_PORT", "CLIENT_PORT", "METRICS_PORT")
        self.environment = os.environ | {f"KGRAY_{name}": str(free_port()) for name in ports}
        self.environment |= {
            "KGRAY_RAY_DIR": str(folder),
            "KGRAY_DASHBOARD_PORT": str(self.dashboard_port),
            "KGRAY_RAY_OBJECT_STORE": str(200 << 20),
            "PYTHON": sys.executable,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def call(self, command: str) -> subprocess.CompletedProcess[str]:
        script = str(REPO / "cluster" / "local.sh")
        return subprocess.run(
            ["bash", script, command], env=self.environment, capture_output=True, text=True, timeout=180
        )

    def submit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        address = f"http://127.0.0.1:{self.dashboard_port}"
        ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", address]
        return subprocess.run(
            [*ray, "--working-dir", ".", "--", "python", "tests/integration/serve_job.py", *arguments],
            cwd=REPO,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
        )

    def processes(self) -> list[str]:
        """Command lines that name the head's folder."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            if f"{self.folder}/" in line or line.endswith(str(self.folder)):
                found.append(line)
        return found


@pytest.fixture
def head(short_tmp: Path) -> Iterator[Head]:
    head = Head(short_tmp)
    yield head
    head.call("stop")


@pytest.mark.slow
def test_the_service_outlives_its_job(head: Head, tmp_path: Path) -> None:
    assert head.call("status").returncode == 1
    started = head.call("start")
    assert started.returncode == 0, started.stderr
    assert "runs already" in head.call("start").stdout
    status = head.call("status")
    assert status.returncode == 0 and "Node status" in status.stdout

    model, port = make_model(Store(str(tmp_path)), umls_graph(), 1), str(free_port())
    for up_to_date in ("False", "True"):
        job = head.submit(model.uri, port)
        assert job.returncode == 0, job.stdout + job.stderr
        assert f"deployed {model.version}, up to date: {up_to_date}" in job.stdout
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/predict",
            json={"head": "virus", "relation": "causes"},
            trust_env=False,
            timeout=30,
        )
        assert (answer.status_code, answer.headers["x-kgray-model-version"]) == (200, model.version)

    broken = head.submit(str(tmp_path / "nowhere"), port)
    assert broken.returncode != 0
    assert "no artifact at" in broken.stdout
    assert httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200

    assert head.processes()
    assert head.call("stop").stdout == "stopped\n"
    for _ in range(50):
        if not head.processes():
            break
        time.sleep(0.2)
    assert head.processes() == []
    assert head.call("stop").stdout == "does not run\n"


@pytest.mark.slow
def test_a_port_in_use_is_told(head: Head) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(head.environment["KGRAY_RAY_PORT"])))
        taken.listen()
        started = head.call("start")
    assert started.returncode == 1
    assert "Ray did not start" in started.stderr
    assert head.call("status").stdout == "does not run\n"


def test_a_stale_pid_file_kills_nobody(head: Head) -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        head.folder.mkdir(exist_ok=True)
        (head.folder / "head.pid").write_text(f"{bystander.pid}\n")
        assert head.call("stop").stdout == "does not run\n"
        assert bystander.poll() is None
    finally:
        bystander.terminate()
        bystander.wait()


def test_an_unknown_word_shows_the_usage(head: Head) -> None:
    shown = head.call("restart")
    assert shown.returncode == 2
    assert "cluster/local.sh start" in shown.stderr
