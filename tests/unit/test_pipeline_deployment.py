"""What a deployment shows of itself, and how a serving process ends.

python3 -m pytest tests/unit/test_pipeline_deployment.py
"""

from __future__ import annotations

import os
import signal
import threading

import pytest

from kgray.artifact import Recipe, Store
from kgray.pipeline.deployment import ANSWERS, exchanges, wait_for_signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serving_ends_when_asked_and_gives_the_signal_handlers_back(number):
    before = signal.getsignal(number)
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    wait_for_signal()
    assert signal.getsignal(number) is before


def test_exchanges_show_question_status_version_and_ranked_answers(tmp_path):
    prediction = {"rank": 1, "id": "a", "name": "Alga", "score": 1.25, "known": True}
    body = {"model": {"name": "kgray", "version": "0f" * 8}, "missing": "tail", "predictions": [prediction]}
    content = {
        "url": "http://localhost:8000",
        "answers": [
            {"path": "/v1/predict", "request": {"head": "virus"}, "status": 200, "body": body},
            {"path": "/v1/predict", "request": {}, "status": 404, "body": {"title": "unknown"}},
        ],
    }
    store = Store(tmp_path)
    made = store.build(Recipe("deployment", 1), lambda draft: draft.write_json(ANSWERS, content))
    lines = exchanges(made.artifact).splitlines()
    assert lines[0] == 'POST http://localhost:8000/v1/predict {"head": "virus"}'
    assert lines[1].split() == ["200", "model", "0f" * 8, "tail:"]
    assert lines[2].split() == ["1", "1.250", "Alga", "(known)"]
    assert lines[4].split(maxsplit=1) == ["404", '{"title": "unknown"}']
