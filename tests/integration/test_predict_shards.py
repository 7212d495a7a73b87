"""Shards of queries answered without Ray: their answers are those of the service, and the one file of them.

python3 -m pytest tests/integration/test_predict_shards.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_artifacts import graph_artifact, model_artifact, random_splits
from test_ensemble_artifact import build

from kgray.artifact import Artifact, Draft, Recipe, Store
from kgray.data import tasks
from kgray.data.inputs import Sizes
from kgray.errors import ConfigError
from kgray.evaluation.ranged import RangedAnswerer
from kgray.model.bundle import Bundle
from kgray.prediction.answering import SCHEMA, Predictions
from kgray.prediction.config import PredictConfig
from kgray.prediction.output import ANSWERS, check_output, write_output
from kgray.prediction.predict import _answered_before, _publish, _read, _shards
from kgray.prediction.queries import plan_queries, shard_name
from kgray.prediction.shards import PredictTask, Shard, done_name
from kgray.serving.predictor import Predictor, Query, Ranking, ScoredTriple, Triple

N, R = 150, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An ensemble of two fused models."""
    store = Store(tmp_path_factory.mktemp("store"))
    graph = graph_artifact(store, random_splits(1, N, R, (900, 200, 120)), N, R)
    members = {"wide": model_artifact(store, graph, dim=16), "narrow": model_artifact(store, graph, dim=8)}
    return build(store, graph, members)


def write_queries(path: Path, count: int) -> Path:
    """Rows that ask for each part in turn, and whole triples; each of them twice."""
    lines = []
    for i in np.arange(count) // 2:
        part = [f"e{i * 7 % 50}", f"_relation_{i % R}", f"e{i * 3 % 60}"]
        if i % 4 < 3:
            part[i % 4] = "?"
        lines.append("\t".join(part) + "\n")
    path.write_text("".join(lines))
    return path


def by_query(artifact: Artifact) -> dict[int, list[dict[str, object]]]:
    found: dict[int, list[dict[str, object]]] = {}
    for row in artifact.read_table(ANSWERS).to_pylist():
        found.setdefault(row["query"], []).append(row)
    return found


def same_as_served(predictor: Predictor, rows: list[dict[str, object]], config: PredictConfig) -> None:
    """The rows of one query against the service's class, one query at a time."""
    first = rows[0]
    parts = {part: first[part] for part in ("head", "relation", "tail")}
    if first["asked"] == "triple":
        (scored,) = predictor.score([Triple(**parts)])  # type: ignore[arg-type]
        assert isinstance(scored, ScoredTriple) and len(rows) == 1
        assert first["score"] == pytest.approx(scored.score, rel=1e-4, abs=1e-5) and first["known"] == scored.known
        assert first["probability"] == pytest.approx(
            (first["tail_probability"] + first["head_probability"]) / 2  # type: ignore[operator]
        )
        return
    assert parts[str(first["asked"])] is None
    query = Query(**parts, top_k=config.top_k, filter_known=config.filter_known)  # type: ignore[arg-type]
    (answer,) = predictor.predict([query])
    assert isinstance(answer, Ranking) and answer.answer_set is not None
    assert [row["rank"] for row in rows] == list(range(1, len(answer.predictions) + 1))
    for row, one in zip(rows, answer.predictions, strict=True):
        assert (row["answer"], row["answer_name"], row["known"]) == (one.id, one.name, one.known)
        assert row["score"] == pytest.approx(one.score, rel=1e-4, abs=1e-5)
        assert row["probability"] == pytest.approx(one.probability, rel=1e-4)
        assert row["in_set"] == one.in_set and row["set_size"] == answer.answer_set.size


@pytest.mark.parametrize("filter_known", [False, True])
def test_answers_are_those_of_the_service(
    model: Artifact, tmp_path: Path, filter_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_in_process", True)
    path = write_queries(tmp_path / "queries.tsv", 240)
    config = PredictConfig(queries=str(path), top_k=6, filter_known=filter_known, shard_rows=50)
    (tmp_path / "scratch").mkdir()
    out = Draft(str(tmp_path / "scratch"))
    read = _read(out, config, model, plan_queries(config, Sizes(chunk_bytes=1500, task_bytes=1500)))
    assert len(read) > 1, "the file was to be read in pieces"
    shards = _shards(read)
    assert sum(shard.rows for shard in shards) == 240
    work = Predictions(PredictTask(config, model, (str(path),), "0123456789abcdef", out))
    done = {shard: work(shard) for shard in shards}
    assert sum(one.asked for one in done.values()) < 150, "the same query was scored twice within a shard"

    # Notes and files say what is done; of a damaged file, and of a damaged note, nothing is believed.
    assert _answered_before(out, shards) == done
    Path(out.path_of(done[shards[0]].file)).write_bytes(b"half")
    Path(out.path_of(done_name(shards[1]))).write_bytes(b"{")
    assert set(_answered_before(out, shards)) == set(shards[2:])
    done |= {shard: work(shard) for shard in shards[:2]}

    store = Store(tmp_path / "store")
    recipe = Recipe("predictions", 1, (model.source,), {})
    artifact = store.build(recipe, lambda draft: _publish(draft, out, [done[s].file for s in shards])).artifact
    table = artifact.read_table(ANSWERS)
    assert table.schema.equals(SCHEMA)
    found, predictor = by_query(artifact), Predictor(Bundle.load(model))
    assert sorted(found) == list(range(240))
    assert table["query"].to_pylist() == sorted(table["query"].to_pylist())
    for number, rows in found.items():
        assert {row["line"] for row in rows} == {number + 1} and rows[0]["file"] == str(path)
        same_as_served(predictor, rows, config)
    schema = pq.read_schema(artifact.local_path(artifact.parquet_files(ANSWERS)[0]))
    assert schema.metadata[b"kgray.model"].decode() == model.version

    # The same where rows are too much to hold, whatever the ranges.
    monkeypatch.setattr("kgray.prediction.answering.answerer_of", lambda bundle, cells: ranged(bundle))
    again, _ = Predictions(work.task).answer(queries_of(out, shards[0]), 0)
    first = table.slice(0, len(again))
    exact = ["query", "asked", "rank", "answer", "known", "in_set", "set_size", "tail_rank", "head_rank"]
    assert again.select(exact).equals(first.select(exact))
    for name in ("score", "probability"):
        np.testing.assert_allclose(again[name].to_numpy(), first[name].to_numpy(), rtol=1e-4, atol=1e-5)

    # One file of them all, once.
    output = tmp_path / "answers.parquet"
    told = artifact.manifest | {"version": "0123456789abcdef"}
    for fresh in (True, False):
        check_output(str(output))
        assert write_output(Artifact(artifact.uri, told), str(output)) == fresh
    assert pq.read_table(output).equals(table)
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    with pytest.raises(ConfigError, match="something else"):
        check_output(str(path))


def ranged(bundle: Bundle) -> RangedAnswerer:
    return RangedAnswerer(bundle, bundle.scorer, 9, 40)


def queries_of(out: Draft, shard: Shard) -> pa.Table:
    return pq.read_table(out.path_of(shard_name(shard.group, shard.number)))


def test_a_place_where_nothing_can_be_written_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"predict\.output.*there is no"):
        check_output(str(tmp_path / "no" / "answers.parquet"))
    with pytest.raises(ConfigError, match="this is a folder"):
        check_output(str(tmp_path))
