"""MLflow may be absent: said once, and never in the way.

python3 -m pytest tests/unit/test_lineage_tracking.py
"""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kgray.artifact import Source
from kgray.config import from_dict
from kgray.errors import ConfigError
from kgray.lineage.config import LineageConfig
from kgray.lineage.registry import choose_alias, selection_metric
from kgray.lineage.tracking import (
    Tracker,
    flatten,
    job_tags,
    metric_name,
    numeric,
    ray_submission_id,
    tracking_uri,
)


@pytest.fixture(autouse=True)
def no_mlflow_of_the_user(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def use(tracker: Tracker) -> None:
    """All a job does with a tracker."""
    with (
        tracker.run("pipeline", params={"a": 1}, tags={"t": "1"}) as whole,
        tracker.run("train", inputs=[Source("file", "0" * 64, "/x")], parent=whole) as run,
    ):
        run.metrics(0, {"loss": 1.0})
        run.metrics(1, {"loss": 0.5})
        run.tag(url="here")


def test_the_uri_is_the_configured_one_then_the_environments_then_a_file_in_the_storage(
    tmp_path, monkeypatch
):
    assert tracking_uri(LineageConfig(), str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri(LineageConfig(), "s3://bucket/x") == f"sqlite:///{Path.home()}/.kgray/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert tracking_uri(LineageConfig(), str(tmp_path)) == "http://elsewhere:5000"
    assert tracking_uri(LineageConfig(tracking_uri="http://here"), str(tmp_path)) == "http://here"


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:9",  # nothing listens
        "http://nowhere.invalid:5000",
        "http://",
        "http://127.0.0.1:notaport",
        "postgresql://user:secret@127.0.0.1:9/db",
        "sqlite:////proc/no/such/place/mlflow.db",
        "sqlite:////etc/hostname",  # not a database
    ],
)
def test_an_mlflow_out_of_reach_is_said_once_and_the_job_goes_on(uri, tmp_path, caplog):
    logging.getLogger("kgray").propagate = True
    tracker = Tracker(LineageConfig(tracking_uri=uri, timeout_s=2), str(tmp_path))
    use(tracker)
    use(tracker)
    said = [r.getMessage() for r in caplog.records if "MLflow" in r.getMessage()]
    assert len(said) == 1
    assert "manifests" in said[0] and "secret" not in said[0]
    assert tracker.problem and not tracker.active


def test_a_failure_inside_a_run_is_still_the_jobs_own(tmp_path):
    tracker = Tracker(LineageConfig(tracking_uri="http://127.0.0.1:9"), str(tmp_path))
    with pytest.raises(KeyError, match="mine"), tracker.run("train"):
        raise KeyError("mine")


def test_switched_off_it_neither_warns_nor_writes(tmp_path, caplog):
    tracker = Tracker(LineageConfig(enabled=False), str(tmp_path))
    use(tracker)
    assert not caplog.records and not list(tmp_path.iterdir())


def test_a_server_that_accepts_and_never_answers_costs_seconds_not_minutes(tmp_path):
    """In a process of its own, as MLflow reads its time-outs from the environment."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)
        held: list[socket.socket] = []
        threading.Thread(target=_hold, args=(server, held), daemon=True).start()
        code = (
            "import time, sys; from kgray.lineage.config import LineageConfig; "
            "from kgray.lineage.tracking import Tracker; import mlflow; t = time.monotonic()\n"
            f"uri = 'http://127.0.0.1:{server.getsockname()[1]}'\n"
            "tracker = Tracker(LineageConfig(tracking_uri=uri, timeout_s=1), '.')\n"
            "with tracker.run('x') as r: r.metrics(0, {'a': 1.0})\n"
            "print(tracker.problem is not None, time.monotonic() - t)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
        )
    unreachable, seconds = done.stdout.split()
    assert unreachable == "True" and float(seconds) < 30


def _hold(server: socket.socket, held: list[socket.socket]) -> None:
    while True:
        try:
            held.append(server.accept()[0])
        except OSError:
            return


def test_importing_the_package_does_not_import_mlflow():
    code = (
        "import sys, kgray.lineage.tracking, kgray.lineage.registry, kgray.lineage.chain\n"
        "print(sorted(m for m in ('mlflow', 'ray', 'torch', 'pydantic') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_and_values_become_what_mlflow_takes():
    assert metric_name("test.both.hits@10") == "test.both.hits_at_10"
    assert metric_name("a(b)=c") == "a_b__c"
    assert flatten({"a": {"b": 1, "c": {"d": [1]}}, "e": {}}) == {"a.b": 1, "a.c.d": [1], "e": {}}
    assert numeric({"a": {"b": 1}, "c": True, "d": "x", "e": float("nan"), "f": None}) == {"a.b": 1.0}


def test_a_job_knows_its_ray_submission(monkeypatch):
    monkeypatch.setenv(
        "RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}})
    )
    assert job_tags()["ray.submission_id"] == "raysubmit_1"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "not json")
    assert ray_submission_id() is None


@pytest.mark.parametrize(("key", "value"), [("timeout_s", 0), ("experiment", ""), ("tracking_uri", "")])
def test_wrong_settings_are_refused_by_key(key, value):
    with pytest.raises(ConfigError, match=key):
        from_dict(LineageConfig, {key: value})


METRIC = "valid.both.realistic.filtered.full.mrr"


def champion(value: float, graph: str = "g1", metric: str = METRIC) -> dict[str, str]:
    return {
        "kgray.graph_version": graph,
        "kgray.selection_metric": metric,
        "kgray.selection_value": repr(value),
    }


@pytest.mark.parametrize(
    ("value", "present", "alias", "word"),
    [
        (0.1, None, "champion", "first model registered"),
        (0.1, champion(0.9, "g0"), "champion", "first model of graph g1"),
        (0.5, champion(0.4), "champion", ">= 0.4000"),
        (0.4, champion(0.4), "champion", ">= 0.4000"),
        (0.3, champion(0.4), "challenger", "< 0.4000"),
        (None, champion(0.4), "challenger", "no validation MRR"),
        (0.3, champion(0.4, metric="valid.tail.mrr"), "champion", "no " + METRIC),
    ],
)
def test_the_rule_of_the_champion(value, present, alias, word):
    got, reason = choose_alias(value, METRIC if value is not None else None, "g1", present)
    assert got == alias and word in reason


def test_models_are_chosen_by_validation_never_by_test():
    assert selection_metric({"test.both.mrr": 0.9, METRIC: 0.5, "valid.tail.mrr": 0.7}) == (METRIC, 0.5)
    assert selection_metric({"valid.tail.mrr": 0.7, "valid.tail.hits@1": 0.9}) == ("valid.tail.mrr", 0.7)
    assert selection_metric({"test.both.mrr": 0.9}) is None
