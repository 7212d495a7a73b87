"""The pipeline in a process of its own that stays and answers until it is asked to end.

python3 -m pytest -m slow tests/system/test_keep_serving.py
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_the_pipeline_keeps_serving_until_asked_to_end(tmp_path: Path, ending: signal.Signals) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "jobs.deploy", "configs/quickstart.yaml", "--keep-serving"),
        *(f"storage.root={tmp_path}", f"serve.port={port}", "text=null", "lineage.enabled=false"),
        *("train.epochs=1", "model.dim=32", "ray.object_store_memory=200000000"),
    ]
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            command, cwd=REPO, stdout=subprocess.PIPE, stderr=err, text=True, start_new_session=True
        )
        watchdog = threading.Timer(400, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            line = next((text for text in process.stdout if text.startswith('{"job"')), None)
            assert line is not None, (tmp_path / "err").read_text()[-3000:]
            result = json.loads(line)
            assert result["status"] == "done" and result["url"] == f"http://127.0.0.1:{port}"
            question = {"head": "virus", "relation": "causes", "top_k": 3}
            answer = httpx.post(f"{result['url']}/v1/predict", json=question, timeout=30, trust_env=False)
            assert answer.headers["x-kgray-model-version"] == result["steps"]["ensemble"]["artifact"][-16:]
            os.kill(process.pid, ending)
            rest = process.stdout.read()
            assert process.wait(timeout=60) == 0, (tmp_path / "err").read_text()[-3000:]
            assert rest == ""  # the line of JSON was the last
        finally:
            watchdog.cancel()
            process.kill()
            process.wait()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False)
