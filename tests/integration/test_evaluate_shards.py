"""Shards without Ray: their plan, their reading, their sum, and memory that stays flat."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from evaluation_artifacts import SPLITS, graph_artifact, model_artifact, random_splits

from kgray.artifact import Artifact, Draft, Store
from kgray.errors import ArtifactError, ConfigError, DataError, NonFiniteError
from kgray.evaluation import shards
from kgray.evaluation.config import EvaluateConfig
from kgray.evaluation.counts import KINDS
from kgray.evaluation.ranking import filter_splits, rank_triples
from kgray.evaluation.shards import Measured, measure, plan, prepare, read_triples
from kgray.graph.filter_index import FilterIndex
from kgray.graph.graph import Graph
from kgray.model.bundle import Bundle

N, R = 120, 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    store = Store(tmp_path_factory.mktemp("store"))
    graph = graph_artifact(store, random_splits(0, N, R, (900, 300, 1500)), N, R)
    return graph, model_artifact(store, graph)


def draft_in(folder: Path) -> Draft:
    folder.mkdir(parents=True, exist_ok=True)
    return Draft(str(folder))


@pytest.mark.parametrize("parts", [1, 2, 5, 7])
def test_parts_hold_every_triple_once_in_order(
    made: tuple[Artifact, Artifact], parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_LEAST_ROWS", 1)
    monkeypatch.setattr(shards, "_LEAST_SCORES", 1)
    graph, _ = made
    planned = plan(graph, "test", parts)
    sizes = [sum(piece.stop - piece.start for piece in part) for part in planned]
    assert len(planned) == parts
    assert max(sizes) - min(sizes) <= 1
    read = [array for part in planned for array in read_triples(graph, part)]
    assert np.concatenate(read).tolist() == Graph.load(graph).triples["test"].tolist()
    assert all(array.dtype == np.int64 for array in read)


def test_small_splits_are_not_cut_and_empty_ones_refused(made: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    assert len(plan(made[0], "test", 16)) == 1
    store, splits = Store(tmp_path), random_splits(1, N, R, (200, 50, 0))
    with pytest.raises(DataError, match=r"no test triples.*data\.triples\.test"):
        plan(graph_artifact(store, splits, N, R), "test", 4)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_the_sum_of_shards_is_the_evaluator_on_the_whole(
    made: tuple[Artifact, Artifact], tmp_path: Path, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_LEAST_ROWS", 1)
    monkeypatch.setattr(shards, "_LEAST_SCORES", 1)
    graph, model = made
    config = EvaluateConfig(split=split, batch_size=37)
    prepared = prepare(graph, config)
    draft = draft_in(tmp_path / "draft")
    parts = [
        measure(draft, config, model, graph, prepared, pieces, number)
        for number, pieces in enumerate(plan(graph, split, 4))
    ]
    assert len(parts) == 4
    random.Random(1).shuffle(parts)
    total: Measured = parts[0]
    for part in parts[1:]:
        total = total + part
    loaded = Graph.load(graph)
    rows = np.concatenate([loaded.triples[s] for s in filter_splits(split)])
    known = FilterIndex.build(rows, N, R)
    whole = rank_triples(
        Bundle.load(model),
        loaded.triples[split],
        known,
        split=split,
        train=loaded.triples["train"],
        batch_size=37,
    )
    assert total.model.metrics(KINDS) == pytest.approx(whole.metrics(KINDS), abs=1e-12)
    assert total.model.metrics(KINDS) == whole.metrics(KINDS)
    assert total.model.slices() == whole.slices()
    assert set(total.baselines) == {"relation_frequency", "inverse_rule", "marginals"}
    assert {side: int(h.sum()) for side, h in total.histogram.items()} == dict.fromkeys(
        ("tail", "head", "relation"), len(loaded.triples[split])
    )
    ranks = pq.read_table(tmp_path / "draft" / "ranks.parquet")
    assert ranks.schema.equals(shards.RANKS_SCHEMA)
    assert len(ranks) == 3 * len(loaded.triples[split])
    for side in ("tail", "head", "relation"):
        mine = ranks.filter(np.array(ranks["side"]) == side)
        mrr = (1 / mine["rank_realistic"].to_numpy()).mean()
        assert mrr == pytest.approx(whole.metrics()[whole.key(side) + ".mrr"], abs=1e-12)
        ids = [loaded.entity_ids[i].as_py() for i in loaded.triples[split][:, 0].tolist()]
        assert sorted(mine["head"].to_pylist()) == sorted(ids)


def test_validation_never_reads_the_test_split(made: tuple[Artifact, Artifact]) -> None:
    graph, _ = made
    loaded = Graph.load(graph)
    known = FilterIndex.from_arrays(prepare(graph, EvaluateConfig(split="valid")).known)
    only_test = {tuple(t) for t in loaded.triples["test"].tolist()} - {
        tuple(t) for s in ("train", "valid") for t in loaded.triples[s].tolist()
    }
    held = np.array(sorted(only_test))
    assert len(held) > 100
    assert not known.contains(held[:, 0], held[:, 1], held[:, 2]).any()
    everything = FilterIndex.from_arrays(prepare(graph, EvaluateConfig(split="test")).known)
    for split in SPLITS:
        assert everything.contains(*loaded.triples[split].T).all()


def test_options_decide_what_is_computed(made: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    graph, model = made
    config = EvaluateConfig(tasks=("relation",), baselines=False, ranks=False)
    prepared = prepare(graph, config)
    assert not prepared.baselines
    draft = draft_in(tmp_path / "draft")
    result = measure(draft, config, model, graph, prepared, plan(graph, "test", 1)[0], 0)
    assert result.model.sides() == ["relation"]
    assert not list((tmp_path / "draft").iterdir())
    tails = prepare(graph, EvaluateConfig(tasks=("tail",)))
    assert set(tails.baselines) == {"relation_frequency", "inverse_rule"}


def test_a_model_of_another_graph_and_non_finite_scores_are_refused(
    made: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    _, model = made
    store = Store(tmp_path / "store")
    other = graph_artifact(store, random_splits(3, N, R, (300, 50, 300)), N, R)
    config = EvaluateConfig()
    draft = draft_in(tmp_path / "draft")
    with pytest.raises(ArtifactError, match="was trained on graph"):
        measure(draft, config, model, other, prepare(other, config), plan(other, "test", 1)[0], 0)
    sick = model_artifact(store, other, poison=True)
    with pytest.raises(NonFiniteError, match="candidate 1 "):
        measure(draft, config, sick, other, prepare(other, config), plan(other, "test", 1)[0], 0)


@pytest.mark.parametrize("size", [11, 120])
def test_candidates_in_ranges_are_measured_as_whole_rows_are(
    made: tuple[Artifact, Artifact], tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, model = made
    pieces = plan(graph, "test", 1)[0]
    found = []
    for ranged in (False, True):
        config = EvaluateConfig(baselines=False, ranged=ranged)
        monkeypatch.setattr(shards, "sizes", lambda scorer, entities, cells: (23, size))
        draft = draft_in(tmp_path / str(ranged))
        found.append((measure(draft, config, model, graph, prepare(graph, config), pieces, 0), draft))
    (whole, one), (parts, other) = found
    assert parts.model.metrics(KINDS) == whole.model.metrics(KINDS)
    assert parts.model.slices() == whole.model.slices()
    assert {side: h.tolist() for side, h in parts.histogram.items()} == {
        side: h.tolist() for side, h in whole.histogram.items()
    }
    order = [("side", "ascending"), ("head", "ascending"), ("relation", "ascending"), ("tail", "ascending")]
    ranks = [pq.read_table(draft.path_of("ranks.parquet")).sort_by(order) for draft in (one, other)]
    assert ranks[0].drop(["score"]).equals(ranks[1].drop(["score"]))


def test_links_are_not_measured_by_range() -> None:
    with pytest.raises(ConfigError, match="ranged"):
        EvaluateConfig(ranged=True, link_negatives=5)


_MEMORY = """
import json, resource, sys
from pathlib import Path
from kgray.artifact import Artifact, Draft
from kgray.evaluation.config import EvaluateConfig
from kgray.evaluation.shards import Piece, measure, plan, prepare
graph, model, share, out = sys.argv[1:]
graph, model = Artifact.load(graph), Artifact.load(model)
config = EvaluateConfig(score_memory_mb=2, baselines=False)
prepared = prepare(graph, config)
pieces = plan(graph, "test", 1)[0]
few = [Piece(p.file, p.start, p.start + (p.stop - p.start) // 10) for p in pieces]
Path(out).mkdir()
measured = measure(Draft(out), config, model, graph, prepared, pieces if share == "all" else few, 0)
count = measured.model.metrics()["test.tail.realistic.filtered.full.count"]
print(json.dumps({"count": count, "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def test_ten_times_the_triples_take_the_same_memory(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    graph = graph_artifact(store, random_splits(2, 200, R, (2000, 10, 200_000)), 200, R, row_group=20_000)
    model = model_artifact(store, graph)
    peak = {}
    for share in ("tenth", "all"):
        command = [sys.executable, "-c", _MEMORY, graph.uri, model.uri, share, str(tmp_path / share)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        peak[share] = told["peak_kib"] / 1024
        assert told["count"] == pytest.approx(200_000 if share == "all" else 20_000, abs=5)
    # 180,000 more triples are 540,000 more rows of ranks: some 40 MiB, had they been kept.
    assert peak["all"] - peak["tenth"] < 16, peak
