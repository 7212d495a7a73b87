"""Batch prediction on Ray: its answers are those of the service, whatever dies, and it says where they came from.

    python3 -m pytest tests/integration/test_predict.py
    python3 -m pytest -m slow tests/integration/test_predict.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from evaluation_artifacts import graph_artifact, model_artifact, random_splits
from ray import cloudpickle
from test_ensemble_artifact import build
from test_predict_shards import by_query, same_as_served, write_queries

from kgray.artifact import Artifact, Store
from kgray.data.inputs import Sizes
from kgray.errors import ClusterError, ConfigError, DataError, NonFiniteError
from kgray.lineage.chain import trace
from kgray.model.bundle import Bundle
from kgray.prediction.config import PredictConfig
from kgray.prediction.output import ANSWERS
from kgray.prediction.pool import ATTEMPTS, Pool
from kgray.prediction.predict import predict, predict_recipe, scratch_name
from kgray.serving.predictor import Predictor

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import a test

REPO = Path(__file__).resolve().parents[2]
N, R = 150, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Artifact, Artifact]:
    """A store, a graph and an ensemble of it."""
    store = Store(tmp_path_factory.mktemp("store"))
    graph = graph_artifact(store, random_splits(1, N, R, (900, 200, 120)), N, R)
    members = {"wide": model_artifact(store, graph, dim=16), "narrow": model_artifact(store, graph, dim=8)}
    return store, graph, build(store, graph, members)


def run(store: Store, config: PredictConfig, model: Artifact, sizes: Sizes | None = None) -> Artifact:
    recipe = predict_recipe(store, config, model)
    return store.build(recipe, lambda draft: predict(draft, store, config, model, sizes)).artifact


def test_predictions_are_published_with_their_chain_and_cleaned_up(
    made: tuple[Store, Artifact, Artifact], ray_cluster: object, tmp_path: Path
) -> None:
    store, _, model = made
    path = write_queries(tmp_path / "queries.tsv", 240)
    config = PredictConfig(queries=str(path), top_k=6, shard_rows=50, workers=2)
    artifact = run(store, config, model)
    counts = artifact.counts
    assert counts["queries"] == 240 and counts["asked_triple"] == 60 and counts["quarantined"] == 0
    assert counts["shards"] == 5 == len(artifact.parquet_files(ANSWERS))
    found, predictor = by_query(artifact), Predictor(Bundle.load(model))
    assert sorted(found) == list(range(240))
    for number in range(0, 240, 7):
        same_as_served(predictor, found[number], config)
    chain = trace(artifact.version, [store])
    assert {node.kind for node in chain.walk()} == {"predictions", "model", "graph", "file"}
    assert [node.uri for node in chain.files()] == [str(path)]


def test_the_same_answers_whatever_the_workers_and_the_memory(
    made: tuple[Store, Artifact, Artifact], ray_cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, model = made
    config = PredictConfig(queries=str(write_queries(tmp_path / "queries.tsv", 60)), shard_rows=20, workers=1)
    one = run(store, config, model).read_table(ANSWERS)
    other = Store(tmp_path / "other")
    again = run(other, PredictConfig(queries=config.queries, shard_rows=20, workers=3), model).read_table(ANSWERS)
    assert again.equals(one)


def test_candidates_divided_among_processes_give_the_same_answers(
    made: tuple[Store, Artifact, Artifact], ray_cluster: object, tmp_path: Path
) -> None:
    store, _, model = made
    path = str(write_queries(tmp_path / "queries.tsv", 80))
    alone = run(store, PredictConfig(queries=path, workers=1), model).read_table(ANSWERS)
    divided = run(Store(tmp_path / "other"), PredictConfig(queries=path, workers=1, holders=2), model)
    found = divided.read_table(ANSWERS)
    exact = ("query", "asked", "rank", "answer", "known", "in_set", "set_size", "tail_rank", "head_rank")
    assert found.select(exact).equals(alone.select(exact))
    for name in ("score", "probability", "tail_probability", "head_probability"):
        np.testing.assert_allclose(found[name].to_numpy(), alone[name].to_numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"predict\.holders.*less than the 4 CPUs"):
        run(store, PredictConfig(queries=path, top_k=3, holders=4), model)


def test_what_an_interrupted_run_did_is_not_done_again(
    made: tuple[Store, Artifact, Artifact], ray_cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, model = made
    config = PredictConfig(queries=str(write_queries(tmp_path / "queries.tsv", 90)), shard_rows=10, workers=1, top_k=3)

    original = Pool.run

    def broken(self: Pool, items: list) -> Iterator:
        for number, one in enumerate(original(self, items)):
            if number == 4:
                raise InterruptedError
            yield one

    monkeypatch.setattr(Pool, "run", broken)
    with pytest.raises(InterruptedError):
        run(store, config, model)
    monkeypatch.undo()
    scratch = Path(store.scratch(scratch_name(predict_recipe(store, config, model).version)))
    notes = sorted(scratch.glob("answers/*.json"))
    assert 4 <= len(notes) < 9
    # Of one of them the file is not what its note says: that one is computed again.
    told = json.loads(notes[0].read_text())
    (scratch / told["file"]).write_bytes(b"half")
    asked: list[object] = []
    monkeypatch.setattr(Pool, "run", lambda self, items: original(self, asked.extend(items) or items))
    artifact = run(store, config, model)
    assert len(asked) == 9 - len(notes) + 1
    monkeypatch.undo()
    calm = Store(tmp_path / "calm")
    assert artifact.read_table(ANSWERS).equals(run(calm, config, model).read_table(ANSWERS))


@dataclass(frozen=True)
class Dies:
    """A worker that dies of one item, some times."""

    folder: Path
    times: int

    def __call__(self, item: int) -> int:
        marks = list(self.folder.glob("death-*"))
        if item == 5 and len(marks) < self.times:
            (self.folder / f"death-{len(marks)}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if item == 7:
            time.sleep(0.2)
        return item * 2


def test_items_of_a_worker_that_dies_go_to_another(ray_cluster: object, tmp_path: Path) -> None:
    body = Dies(tmp_path, 1)
    with Pool[int, int](lambda: body, 2) as pool:
        assert dict(pool.run(range(12))) == {i: 2 * i for i in range(12)}
    assert len(list(tmp_path.glob("death-*"))) == 1


def test_an_item_that_kills_every_worker_is_named(ray_cluster: object, tmp_path: Path) -> None:
    body = Dies(tmp_path, 99)
    told = f"{ATTEMPTS} workers died, one after the other, of 5"
    with Pool[int, int](lambda: body, 1) as pool, pytest.raises(ClusterError, match=told):
        list(pool.run(range(8)))
    assert len(list(tmp_path.glob("death-*"))) in (ATTEMPTS, ATTEMPTS + 1), "the first may have had company"


def test_bad_rows_stop_the_job_or_are_set_aside(
    made: tuple[Store, Artifact, Artifact], ray_cluster: object, tmp_path: Path
) -> None:
    store, _, model = made
    path = tmp_path / "queries.csv"
    path.write_text("relation,head\n_relation_0,e1\nnothing,e1\n_relation_0,e1\n_relation_0,?\n")
    told = r"queries.csv, line 3: relation: no relation has .* and 1 more bad row \(predict\.on_bad_row=skip"
    before = set(Path(store.root, "runs").glob("predict-*/queries/*"))
    with pytest.raises(DataError, match=told):
        run(store, PredictConfig(queries=str(path)), model)
    assert set(Path(store.root, "runs").glob("predict-*/queries/*")) == before, "what was read is of no use any more"
    with pytest.raises(DataError, match=r"2 bad rows, more than predict\.max_bad_rows=1"):
        run(store, PredictConfig(queries=str(path), on_bad_row="skip", max_bad_rows=1), model)
    artifact = run(store, PredictConfig(queries=str(path), on_bad_row="skip"), model)
    assert artifact.counts["quarantined"] == 2 and artifact.counts["queries"] == 2
    aside = [json.loads(line) for line in artifact.read_bytes("quarantine.jsonl").decode().splitlines()]
    assert [one["line"] for one in aside] == [3, 5]
    assert {row["line"] for row in artifact.read_table(ANSWERS).to_pylist()} == {2, 4}
    path.write_text("relation,head\nnothing,e1\n")
    with pytest.raises(DataError, match="no row can be answered"):
        run(store, PredictConfig(queries=str(path), on_bad_row="skip"), model)


def test_more_answers_than_entities_are_all_of_them(
    made: tuple[Store, Artifact, Artifact], ray_cluster: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, _, model = made
    path = tmp_path / "queries.tsv"
    path.write_text("e1\t_relation_0\t?\ne1\t?\te2\n")
    found = by_query(run(store, PredictConfig(queries=str(path), top_k=10_000), model))
    assert [len(found[n]) for n in (0, 1)] == [N, R]
    assert "predict: top_k=10000 is more than the 150 entities" in caplog.text


def test_a_score_that_is_no_number_is_an_error_that_names_the_query(
    made: tuple[Store, Artifact, Artifact], ray_cluster: object, tmp_path: Path
) -> None:
    store, graph, _ = made
    sick = model_artifact(store, graph, dim=12, poison=True)
    path = tmp_path / "queries.tsv"
    path.write_text("e3\t_relation_0\t?\n")
    with pytest.raises(NonFiniteError, match=r"for \(e3, _relation_0, \?\)"):
        run(store, PredictConfig(queries=str(path)), sick)


CONFIG = """
storage: {{root: {root}}}
data:
  triples: {{train: {umls}/train.tsv, valid: {umls}/valid.tsv, test: {umls}/test.tsv}}
  entities: {umls}/entities.tsv
  relations: {umls}/relations.tsv
graph: {{partitions: 1}}
text: null
model: {{dim: 32, text: {{kind: none}}, objective: {{kind: one_vs_all}}}}
train: {{epochs: 1, batch_size: 512, evaluate_every: 1}}
members: {{rules: null}}
predict: {{queries: {folder}/queries.tsv, output: {folder}/answers.parquet, top_k: 100, shard_rows: 40, workers: 2}}
lineage: {{enabled: false}}
ray: {{address: local, object_store_memory: 200000000}}
"""


def until(what: Callable[[], object], seconds: float, why: str) -> object:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.05)
    pytest.fail(f"{why}: not within {seconds:.0f} s")


def bodies(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """The actors that hold the model."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "_Body" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_worker_and_a_killed_driver_cost_what_they_had_not_finished(tmp_path: Path, umls: Path) -> None:
    """The whole job, killed for real: the rerun answers only shards that had no note, and says the same as a calm run.
    """
    rows = [line.split("\t") for line in (umls / "train.tsv").read_text().splitlines()]
    queries = "".join(f"{h}\t{r}\t?\n?\t{r}\t{t}\n{h}\t{r}\t{t}\n" for h, r, t in rows)
    commands = {}
    for name in ("calm", "rough"):
        folder = tmp_path / name
        folder.mkdir()
        # In the same place for both: the answers say which file they are of.
        (tmp_path / "queries.tsv").write_text(queries)
        config = folder / "predict.yaml"
        text = CONFIG.format(root=folder / "store", umls=umls, folder=folder)
        config.write_text(text.replace(f"{folder}/queries.tsv", f"{tmp_path}/queries.tsv"))
        commands[name] = [sys.executable, "-m", "jobs.predict", str(config)]
    # Trained once.
    rough = tmp_path / "rough" / "store"
    (tmp_path / "one.tsv").write_text("virus\tcauses\t?\n")
    finish([*commands["rough"], f"predict.queries={tmp_path}/one.tsv", "predict.output=null"])
    shutil.copytree(rough, tmp_path / "calm" / "store", ignore=shutil.ignore_patterns(".tmp", "runs"))

    log = (tmp_path / "rough.log").open("w")
    driver = subprocess.Popen(commands["rough"], cwd=REPO, stdout=log, stderr=log, text=True)

    def notes() -> set[Path]:
        return set(rough.glob("runs/predict-*/answers/*.json"))

    try:
        until(notes, 240, "the first answers")
        killed = bodies(driver)[0]
        killed.kill()
        before = len(notes())
        until(lambda: len(notes()) > before + 10 and len(bodies(driver)) == 2, 240, "another worker")
        assert killed.pid not in [process.pid for process in bodies(driver)]
        family = psutil.Process(driver.pid).children(recursive=True)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(timeout=30)
        assert len(list(rough.glob("predictions/*"))) == 1, "killed too late to prove anything"
        assert not (tmp_path / "rough" / "answers.parquet").exists()
        _, alive = psutil.wait_procs(family, timeout=120)
        assert not alive, f"left running after the driver's death: {alive}"
    finally:
        driver.kill()
        log.close()
    assert "is given to another" in (tmp_path / "rough.log").read_text()
    kept = sum(json.loads(path.read_text())["queries"] for path in notes())
    result, told = finish(commands["rough"])
    assert f"predict: {kept} of {len(rows) * 3} queries were answered by an interrupted run" in told
    assert result["status"] == "done"
    assert not list(rough.glob("runs/predict-*")), "notes outlived their run"
    again, _ = finish(commands["rough"])
    assert again["status"] == "up to date" and again["version"] == result["version"]

    calm, _ = finish(commands["calm"])
    assert calm["version"] == result["version"] and calm["metrics"] == result["metrics"]
    answers = [pq.read_table(tmp_path / name / "answers.parquet") for name in ("calm", "rough")]
    assert answers[0].equals(answers[1]) and answers[0]["query"][-1].as_py() == len(rows) * 3 - 1


def finish(command: list[str]) -> tuple[dict[str, object], str]:
    """The line of JSON, and what was told on stderr."""
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1]), done.stderr
