"""The evaluate job on a real Ray: report artifact, up to date, errors as the user meets them."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluation_artifacts import graph_artifact, model_artifact, random_splits

from kgray.artifact import Artifact, Store
from kgray.errors import ArtifactError, DataError, NonFiniteError
from kgray.evaluation import shards
from kgray.evaluation.config import EvaluateConfig
from kgray.evaluation.counts import Counts
from kgray.evaluation.evaluate import evaluate, evaluate_recipe
from kgray.evaluation.ranking import rank_triples
from kgray.graph.graph import SPLITS, Graph
from kgray.model.bundle import Bundle

N, R = 150, 4


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def graph(store: Store) -> Artifact:
    return graph_artifact(store, random_splits(0, N, R, (900, 200, 1200)), N, R)


def build(store: Store, config: EvaluateConfig, model: Artifact, graph: Artifact, **other: object) -> Artifact:
    recipe = evaluate_recipe(store, config, model, graph, **other)  # type: ignore[arg-type]
    made = store.build(recipe, lambda draft: evaluate(draft, config, model, graph, **other))  # type: ignore[arg-type]
    return made.artifact


def test_the_report_is_written_by_shards_and_equals_the_evaluator(
    ray_cluster: object, store: Store, graph: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The plan is made in this process: several shards of a small split.
    monkeypatch.setattr(shards, "_LEAST_SCORES", 1)
    model = model_artifact(store, graph)
    config = EvaluateConfig(workers=2)
    report = build(store, config, model, graph)
    assert report.kind == "report"
    parts = [name for name in report.files() if name.startswith("ranks.parquet/")]
    assert len(parts) > 1
    loaded = Graph.load(graph)
    whole = rank_triples(
        Bundle.load(model),
        loaded.triples["test"],
        loaded.known(SPLITS),
        split="test",
        train=loaded.triples["train"],
    )
    metrics = report.read_json("metrics.json")
    for name, value in whole.metrics().items():
        assert metrics["metrics"][name] == pytest.approx(value, abs=1e-9)
        assert report.counts[name] == metrics["metrics"][name]
    assert Counts.from_json(metrics["counts"]).metrics() == {n: report.counts[n] for n in whole.metrics()}
    assert metrics["slices"]["both"]["relation"].keys() <= {f"_relation_{i}" for i in range(R)}
    assert metrics["slices"]["both"]["entities"]["unseen"]["count"] > 0
    for name in ("relation_frequency", "inverse_rule"):
        assert f"baseline.{name}.test.both.realistic.filtered.full.mrr" in report.counts
    assert "baseline.marginals.test.relation.realistic.filtered.full.mrr" in report.counts
    page = report.read_bytes("report.html").decode()
    assert model.version in page
    assert metrics["filtered_by"] == ["train", "valid", "test"], "nothing was held out, there is no support"
    assert {f"plots/{n}.svg" for n in ("comparison", "ranks", "relations", "training")} <= set(report.files())
    assert report.read_table("ranks.parquet").num_rows == 3 * 1200
    # Neither workers nor batch size are part of what is measured.
    again = store.find(evaluate_recipe(store, EvaluateConfig(workers=1, batch_size=9), model, graph))
    assert again is not None
    assert again.version == report.version


def test_ablations_stand_beside_the_model(ray_cluster: object, store: Store, graph: Artifact) -> None:
    config = EvaluateConfig(tasks=("tail", "head"), ranks=False, baselines=False, workers=1)
    variant = build(store, config, model_artifact(store, graph, dim=8), graph)
    model = model_artifact(store, graph)
    report = build(store, config, model, graph, ablations={"graph_only": variant})
    assert report.version != evaluate_recipe(store, config, model, graph).version
    told = report.read_json("metrics.json")["ablations"]["graph_only"]
    key = "test.both.realistic.filtered.full.mrr"
    assert told["metrics"][key] == variant.counts[key]
    assert "graph only" in report.read_bytes("report.html").decode()
    with pytest.raises(ArtifactError, match="not a report"):
        build(store, config, model, graph, ablations={"graph_only": model})


def test_errors_come_as_if_raised_here_and_leave_nothing(
    ray_cluster: object, store: Store, graph: Artifact, tmp_path: Path
) -> None:
    sick = model_artifact(store, graph, poison=True)
    config = EvaluateConfig(workers=2)
    with pytest.raises(NonFiniteError, match=r"query .*candidate 1 ") as caught:
        build(store, config, sick, graph)
    assert type(caught.value) is NonFiniteError
    assert store.find(evaluate_recipe(store, config, sick, graph)) is None
    empty = graph_artifact(store, random_splits(5, N, R, (300, 50, 0)), N, R)
    with pytest.raises(DataError, match="no test triples"):
        build(store, config, model_artifact(store, empty), empty)
