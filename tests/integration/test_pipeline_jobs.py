"""Jobs as a user runs them, on a real Ray: what is built, what is skipped, what is said.

python3 -m pytest tests/integration/test_pipeline_jobs.py
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from kgray.pipeline import command, explain_command, lineage_command

REPO = Path(__file__).resolve().parents[2]
QUICKSTART = str(REPO / "configs" / "quickstart.yaml")
SMALL = ["train.epochs=1", "model.dim=32", "model.gnn.fanouts=[4]", "model.gnn.inference_fanouts=[8]"]
NO_MLFLOW = "lineage.tracking_uri=http://127.0.0.1:9"

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs a job; returns exit status, the line of JSON, stdout and stderr."""

    def do(job: str, *arguments: str, config: str = QUICKSTART) -> tuple[int, dict[str, Any], str, str]:
        capfd.readouterr()
        if job == "lineage":
            status = lineage_command.main(arguments)
        elif job == "explain":
            status = explain_command.main([config, *arguments])
        else:
            status = command.main(job, [config, *arguments])
        out, err = capfd.readouterr()
        return status, json.loads(out.splitlines()[-1]), out, err

    return do


def statuses(result: dict[str, Any]) -> dict[str, str]:
    return {name: step["status"] for name, step in result["steps"].items()}


def test_without_mlflow_the_pipeline_finishes_says_so_once_and_is_traced_to_its_files(run, tmp_path):
    options = [f"storage.root={tmp_path}", NO_MLFLOW, "text=null", *SMALL]
    status, first, out, err = run("evaluate", *options)
    assert status == 0, err
    assert statuses(first) == dict.fromkeys(["ingest", "train", "mine", "ensemble", "evaluate"], "done")
    assert err.count("MLflow at http://127.0.0.1:9 cannot be used") == 1
    assert 0 < first["metrics"]["test.both.realistic.filtered.full.mrr"] <= 1
    assert "baseline" in out and "\n  member fused" in out
    assert 0 <= first["metrics"]["test.both.calibration.ece"] <= 1 and "test.both.calibration" in out

    status, again, _, err = run("evaluate", *options)
    assert status == 0 and again["status"] == "up to date" and again["version"] == first["version"]
    assert set(statuses(again).values()) == {"up to date"}
    assert again["seconds"] < 15 and "MLflow" not in err

    status, told, out, err = run("explain", *options, "--head", "virus", "--relation", "causes", "--top", "1", "--json")
    (reasons,) = told["explanations"]
    assert status == 0 and told["status"] == "up to date" and len(out.splitlines()) == 1, err
    assert sum(a["value"] for a in reasons["addends"]) == pytest.approx(reasons["score"], rel=1e-3, abs=1e-3)
    assert reasons["neighbours"]["facts"] and reasons["rules"] and 0 <= reasons["probability"] <= 1
    status, _, _, err = run("explain", *options, "--head", "virsu", "--relation", "causes")
    assert status == 2 and "did you mean 'virus'" in err.splitlines()[-1]

    status, chain, tree, _ = run("lineage", first["version"], "--storage", str(tmp_path), "--verify")
    files = {file["uri"]: file["sha256"] for file in chain["files"]}
    expected = list((REPO / "configs/data/umls").glob("*.tsv"))
    assert status == 0
    assert files == {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in expected}
    assert all(digest in tree for digest in files.values())
    assert tree.startswith(f"report {first['version']}  [verified]")


def test_a_broken_run_goes_on_where_it_broke_and_a_changed_input_is_noticed(run, tmp_path):
    data = tmp_path / "umls"
    shutil.copytree(REPO / "configs/data/umls", data)
    config = tmp_path / "mine.yaml"
    config.write_text(Path(QUICKSTART).read_text().replace("data/umls/", "umls/"))
    options = [f"storage.root={tmp_path / 'storage'}", "lineage.enabled=false"]

    # A mistake that only shows on the cluster: 64 workers are more than it has.
    status, failed, _, err = run("train", *options, "text=null", "train.workers=64", config=str(config))
    assert status == 2 and failed["status"] == "failed"
    assert "train.workers" in err.splitlines()[-1] and "Traceback" not in err
    assert [p.name for p in (tmp_path / "storage").iterdir() if not p.name.startswith(".")] in (
        [["graph"], ["graph", "runs"], ["runs", "graph"]]
    )
    status, ingested, _, _ = run("ingest", *options, config=str(config))
    assert status == 0 and ingested["status"] == "up to date"

    # Another byte in an input is another graph; the same bytes again are the one that is there.
    before = (data / "train.tsv").read_bytes()
    (data / "train.tsv").write_bytes(before + b"virus\tcauses\talga\n")
    status, changed, _, _ = run("ingest", *options, config=str(config))
    assert status == 0 and changed["status"] == "done" and changed["version"] != ingested["version"]
    (data / "train.tsv").write_bytes(before)
    assert run("ingest", *options, config=str(config))[1]["version"] == ingested["version"]

    # And an input that is no longer what the graph was made of is found out.
    (data / "valid.tsv").write_bytes(b"")
    status, _, _, err = run("lineage", ingested["version"], str(config), *options, "--verify")
    assert status == 2 and "valid.tsv" in err and "has changed" in err


def test_a_bad_row_found_in_a_worker_is_one_line_with_file_and_line(run, tmp_path):
    bad = tmp_path / "train.tsv"
    bad.write_text("virus\tcauses\tdisease_or_syndrome\nvirus\tcauses\n")
    status, result, _, err = run(
        "ingest", f"storage.root={tmp_path / 'storage'}", f"data.triples.train={bad}", "lineage.enabled=false"
    )
    assert status == 2 and result["error"] == err.splitlines()[-1].removeprefix("kgray ingest: ")
    assert f"{bad}, line 2: " in result["error"]
    assert not list((tmp_path / "storage").glob("graph/*"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_pipeline_with_ablations_deploys_and_shows_its_answers_again(run, tmp_path):
    """All steps, with MLflow in its SQLite file."""
    from mlflow import MlflowClient
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"storage.root={tmp_path}", f"serve.port={port}", "evaluate.ablations=true", *SMALL]
    # A member of every family: a variant, which is an ablation too, another seed, paths and rules.
    options += ["members.variants=[text_only]", "members.seeds=[1]", "train.epochs=2", "members.snapshots=1"]
    options += ["members.paths.model={layers: 2, dim: 8, keep: 20}", "members.paths.train.epochs=1"]
    options += ["members.relations.model.hops=2", "members.relations.train.epochs=1"]
    try:
        status, result, out, err = run("pipeline", *options)
    finally:
        serve.shutdown()
    assert status == 0, err[-3000:]
    assert list(statuses(result)) == [
        *("ingest", "embed", "train text_only", "evaluate text_only"),
        *("train graph_only", "evaluate graph_only", "train", "train snapshot 1", "train seed 1"),
        *("train paths", "train relations", "mine", "ensemble", "evaluate", "deploy"),
    ]
    names = ("fused", "text_only", "snapshot 1", "seed 1", "paths", "relations", "rules")
    members = [f"member {name}" for name in names]
    for row in ("model", *members, "text_only", "graph_only", "baseline"):
        assert f"\n  {row}" in out
    assert f"POST http://127.0.0.1:{port}/v1/predict" in out
    assert result["url"] == f"http://127.0.0.1:{port}"

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("kgray")
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    whole = runs["pipeline quickstart"].info.run_id
    assert {r.data.tags.get("mlflow.parentRunId") for r in runs.values()} == {whole, None}
    assert client.get_metric_history(runs["train"].info.run_id, "train.loss")[0].step == 0
    champion = client.get_model_version_by_alias("kgray", "champion")
    assert champion.tags["kgray.version"] == result["version"]

    status, again, out, err = run("pipeline", *options)
    assert status == 0 and again["status"] == "up to date" and "url" not in again
    assert f"POST http://127.0.0.1:{port}/v1/predict" in out and "--keep-serving" in err
