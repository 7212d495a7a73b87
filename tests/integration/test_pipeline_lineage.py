"""Runs and models in a real MLflow.

python3 -m pytest tests/integration/test_pipeline_lineage.py
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kgray.artifact import Artifact, Recipe, Store
from kgray.lineage.config import LineageConfig
from kgray.lineage.registry import Registered, find_registered, register
from kgray.lineage.tracking import Run, Tracker

METRIC = "valid.both.realistic.filtered.full.mrr"


def build(store: Store, kind: str, inputs: tuple[Any, ...], **counts: Any) -> Artifact:
    def make(draft: Any) -> dict[str, Any]:
        draft.write_json("content.json", counts)
        return counts

    return store.build(Recipe(kind, 1, inputs, counts), make).artifact


def train(tracker: Tracker, store: Store, graph: Artifact, mrr: float, parent: Run) -> Registered | None:
    """What the train step does with MLflow."""
    model = build(store, "model", (graph.source,), **{METRIC: mrr, "test.both.mrr": 1.0 - mrr})
    with tracker.run(
        "train", params={"model": {"dim": 8}, "train": {"epochs": 2}}, inputs=[graph.source], parent=parent
    ) as run:
        for epoch in range(2):
            run.metrics(epoch, {METRIC: mrr * epoch / 2, "hits@10": 0.5, "broken": float("nan")})
        run.output(model)
        return register(tracker, run, model, model.counts)


def story(tracker: Tracker, store: Store) -> list[Registered | None]:
    """Three models of one graph, then one of another."""
    file = Path(store.root).parent / "train.tsv"
    file.write_text("a\tb\tc\n")
    files = store.hash_files([str(file)])
    graphs = [build(store, "graph", tuple(files), entities=n) for n in (2, 3)]
    with tracker.run("pipeline", params={"a": {"b": None}}, tags={"kgray.job": "pipeline"}) as whole:
        with tracker.run("ingest", inputs=files, parent=whole) as run:
            run.output(graphs[0])
        known = [train(tracker, store, graphs[0], mrr, whole) for mrr in (0.5, 0.4, 0.6, 0.6)]
        return [*known, train(tracker, store, graphs[1], 0.1, whole)]


def check_runs(tracker: Tracker) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracker.uri)
    experiment = client.get_experiment_by_name("kgray")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    by_name = {run.info.run_name: run for run in runs}
    whole, ingest, trained = by_name["pipeline"], by_name["ingest"], by_name["train"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert ingest.data.tags["mlflow.parentRunId"] == whole.info.run_id
    assert trained.data.params == {"model.dim": "8", "train.epochs": "2"}
    assert [m.value for m in client.get_metric_history(trained.info.run_id, METRIC)] == [0.0, 0.05]
    assert "hits_at_10" in trained.data.metrics and "broken" not in trained.data.metrics
    (used,) = trained.inputs.dataset_inputs
    assert used.dataset.name == "graph" and len(used.dataset.digest) == 16
    assert [i.dataset.name for i in ingest.inputs.dataset_inputs] == ["train.tsv"]
    # And back: the runs that used a graph, by its version.
    found = client.search_runs([experiment.experiment_id], f"datasets.digest = '{used.dataset.digest}'")
    assert trained.info.run_id in {run.info.run_id for run in found}
    assert trained.data.tags["kgray.version"] and trained.data.tags["kgray.artifact"]


def check_registry(tracker: Tracker, registered: list[Registered | None]) -> None:
    from mlflow import MlflowClient

    assert all(registered)
    first, second, third, same, other = [one for one in registered if one]
    assert [first.alias, second.alias, third.alias] == ["champion", "challenger", "champion"]
    assert "0.4000 < 0.5000 of the champion" in second.reason
    assert same == third  # one artifact, one version
    assert other.alias == "champion" and "first model of graph" in other.reason
    client = MlflowClient(tracker.uri, registry_uri=tracker.uri)
    version = client.get_model_version_by_alias("kgray", "champion")
    assert str(version.version) == other.number and version.tags["kgray.alias_reason"] == other.reason
    assert find_registered(tracker, "models:/kgray@champion") == version.tags["kgray.artifact"]
    assert find_registered(tracker, f"models:/kgray/{first.number}") != version.tags["kgray.artifact"]
    assert find_registered(tracker, "models:/kgray@nobody") is None


def test_runs_and_models_in_a_sqlite_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "storage")
    tracker = Tracker(LineageConfig(), store.root)
    registered = story(tracker, store)
    assert tracker.problem is None
    check_runs(tracker)
    check_registry(tracker, registered)
    # Nothing in the current directory: MLflow's files lie in the storage, and its artifacts beside them.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["storage", "train.tsv"]
    assert (tmp_path / "storage" / "mlflow.db").is_file() and (tmp_path / "storage" / "mlflow").is_dir()


def test_a_failed_and_an_interrupted_job_leave_runs_that_say_so(tmp_path):
    from mlflow import MlflowClient

    tracker = Tracker(LineageConfig(), str(tmp_path))
    with pytest.raises(KeyError), tracker.run("failed"):
        raise KeyError("mine")
    with pytest.raises(KeyboardInterrupt), tracker.run("killed"):
        raise KeyboardInterrupt
    client = MlflowClient(tracker.uri)
    runs = {r.info.run_name: r for r in client.search_runs([client.get_experiment_by_name("kgray").experiment_id])}
    assert runs["failed"].info.status == "FAILED" and runs["failed"].data.tags["kgray.error"] == "KeyError: 'mine'"
    assert runs["killed"].info.status == "KILLED"


@pytest.mark.slow
def test_runs_and_models_on_a_tracking_server(tmp_path, monkeypatch):
    """Also that a server that dies in between is survived."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    places = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "files"),
    ]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*command, *places], stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
    try:
        tracker = Tracker(LineageConfig(tracking_uri=f"http://127.0.0.1:{port}"), str(tmp_path / "storage"))
        wait_for(port, server, tmp_path / "log")
        store = Store(tmp_path / "storage")
        registered = story(tracker, store)
        assert tracker.problem is None, (tmp_path / "log").read_text()[-3000:]
        check_runs(tracker)
        check_registry(tracker, registered)
    finally:
        end(server)
    begin = time.monotonic()
    with tracker.run("after the end") as run:
        run.metrics(0, {"a": 1.0})
    assert tracker.problem is not None and time.monotonic() - begin < 60


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    import httpx

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    pytest.fail("the MLflow server did not come up: " + log.read_text()[-2000:])


def end(server: subprocess.Popen[bytes]) -> None:
    import os
    import signal

    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
