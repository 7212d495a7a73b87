"""The ensemble as an artifact: written, opened, ranked with its members, answered from; and what it may not know.

python3 -m pytest tests/integration/test_ensemble_artifact.py
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_artifacts import graph_artifact, model_artifact, random_splits

from kgray.artifact import Artifact, Draft, Store
from kgray.errors import ArtifactError
from kgray.evaluation.config import EnsembleConfig, EvaluateConfig
from kgray.evaluation.ensemble import ensemble_recipe
from kgray.evaluation.ensemble_fit import gather, prepare, write_ensemble
from kgray.evaluation.ranking import filter_splits, rank_triples
from kgray.evaluation.report import report_of, write_report
from kgray.evaluation.shards import Piece, measure, plan
from kgray.evaluation.shards import prepare as prepare_ranking
from kgray.graph.graph import Graph
from kgray.model.bundle import Bundle
from kgray.model.ensemble import EnsembleScorer
from kgray.serving.predictor import Predictor, Query, Ranking

N, R = 150, 4
CONFIG = EnsembleConfig(candidates=10, sampled=20, folds=3, shrinkage=(0.3,), group=60)


def build(
    store: Store,
    graph: Artifact,
    members: dict[str, Artifact],
    config: EnsembleConfig = CONFIG,
    parts: list[list[Piece]] | None = None,
) -> Artifact:
    """What the ensemble step does, in this process."""

    def make(draft: Draft) -> dict[str, object]:
        shared = prepare(graph)
        pieces = plan(graph, "valid", 1) if parts is None else parts
        found = [gather(config, graph, members, shared, part, 1.0) for part in pieces]
        return write_ensemble(draft.local_dir(), config, graph, members, shared, found)

    return store.build(ensemble_recipe(config, graph, members), make).artifact


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Artifact, dict[str, Artifact], Artifact]:
    store = Store(tmp_path_factory.mktemp("store"))
    graph = graph_artifact(store, random_splits(1, N, R, (900, 200, 120)), N, R)
    members = {"wide": model_artifact(store, graph, dim=16), "narrow": model_artifact(store, graph, dim=8)}
    return store, graph, members, build(store, graph, members)


def test_it_opens_with_its_members_and_its_scores_are_sums(made: tuple[Store, Artifact, dict, Artifact]) -> None:
    _, graph, members, artifact = made
    assert [s.version for s in artifact.inputs] == [graph.version, *(m.version for m in members.values())]
    bundle = Bundle.load(artifact)
    ensemble = bundle.scorer
    assert isinstance(ensemble, EnsembleScorer) and bundle.tasks == ("tail", "head", "relation")
    assert bundle.graph_version == graph.version and bundle.calibration is not None
    assert {"valid.both.realistic.filtered.crossfit.mrr", "valid.tail.calibration.ece"} <= artifact.counts.keys()
    h, r, t = torch.from_numpy(Graph.load(graph).triples["test"]).unbind(1)
    everything = torch.arange(N).expand(len(h), -1)
    addends = ensemble.decompose("tail", h, r, everything)
    torch.testing.assert_close(sum(addends.values()), bundle.score_tails(h, r), rtol=1e-5, atol=1e-5)
    assert bundle.score_triples(h, r, t).shape == (len(h),)


def test_members_are_ranked_by_the_rows_that_were_mixed(
    made: tuple[Store, Artifact, dict, Artifact], tmp_path: Path
) -> None:
    _, graph, members, artifact = made
    config = EvaluateConfig(baselines=False, ranks=False)
    prepared = prepare_ranking(graph, config)
    found = [
        measure(Draft(str(tmp_path)), config, artifact, graph, prepared, part, i)
        for i, part in enumerate(plan(graph, "test", 1))
    ]
    (measured,) = found
    loaded = Graph.load(graph)
    known, triples = loaded.known(filter_splits("test")), loaded.triples["test"]
    for name, member in {**members, "model": artifact}.items():
        want = rank_triples(Bundle.load(member), triples, known, split="test", train=loaded.triples["train"])
        mine = measured.model if name == "model" else measured.members[name]
        assert mine.metrics() == pytest.approx(want.metrics(), abs=0.02), name
    assert set(measured.reliability) == {"tail", "head", "relation"}
    assert all(one.count == len(triples) for one in measured.reliability.values())

    # And the report says all of it.
    report = report_of(config, artifact, graph, measured, {}, 1.0)
    write_report(Draft(str(tmp_path / "report")), report)
    page = (tmp_path / "report" / "report.html").read_text()
    assert (tmp_path / "report" / "plots" / "reliability.svg").stat().st_size
    for text in ("wide", "narrow", "How the members were mixed", "entity answers: ", "for 90% of queries"):
        assert text in page, text
    assert report["members"]["wide"]["version"] == members["wide"].version
    assert report["history"], "of the first member"
    assert 0 <= report["metrics"]["test.both.calibration.coverage"] <= 1


def test_served_probabilities_and_sets_are_those_that_were_measured(
    made: tuple[Store, Artifact, dict, Artifact],
) -> None:
    _, graph, _, artifact = made
    bundle = Bundle.load(artifact)
    calibration = bundle.calibration
    assert calibration is not None
    loaded = Graph.load(graph)
    ids = loaded.entity_ids.to_pylist()
    relation_ids = loaded.relation_ids.to_pylist()
    for h, r, t in loaded.triples["test"][:20].tolist():
        scores = bundle.score_tails(torch.tensor([h]), torch.tensor([r]))[0]
        out = torch.zeros(1, N, dtype=torch.bool)
        _, known = bundle.known.tails([h], [r])
        out[0, torch.from_numpy(known)] = True
        # As the evaluator asks: every other known answer left out, this one not.
        asked = out.clone()
        asked[0, t] = False
        rows = calibration.rows("tail", scores[None], np.array([r]), asked)
        inside = bool(scores[t].double() >= rows.threshold[0])
        p = rows.probability(0, scores[[t]].numpy(), np.array([False]))[0]
        (answer,) = Predictor(bundle).predict([Query(ids[h], relation_ids[r], None, top_k=N)])
        assert isinstance(answer, Ranking) and answer.answer_set is not None
        by_id = {one.id: one for one in answer.predictions}
        assert by_id[ids[t]].in_set == inside
        assert by_id[ids[t]].probability == pytest.approx(p, rel=1e-3, abs=1e-9)
        assert answer.answer_set.size == sum(bool(o.in_set) and not o.known for o in answer.predictions)
        assert answer.answer_set.coverage == pytest.approx(0.9)
        fresh = [o.probability for o in answer.predictions if not o.known]
        assert all(x is not None and 0 <= x <= 1 for x in fresh) and fresh == sorted(fresh, reverse=True)  # type: ignore[type-var]


def test_test_triples_change_neither_gate_nor_calibration(tmp_path: Path) -> None:
    files = []
    for number in (0, 1):
        store = Store(tmp_path / str(number))
        splits = random_splits(1, N, R, (900, 200, 120))
        if number:
            splits["test"] = splits["test"][::-1] * 0 + random_splits(9, N, R, (9, 9, 120))["test"]
        graph = graph_artifact(store, splits, N, R)
        members = {"wide": model_artifact(store, graph, dim=16), "narrow": model_artifact(store, graph, dim=8)}
        artifact = build(store, graph, members)
        files.append({name: artifact.read_bytes(name) for name in ("gate.safetensors", "calibration.json")})
        assert artifact.read_bytes("known.safetensors")
    assert files[0] == files[1]


def test_shards_make_no_difference(made: tuple[Store, Artifact, dict, Artifact], tmp_path: Path) -> None:
    _, graph, members, artifact = made
    pieces = [p for part in plan(graph, "valid", 1) for p in part]
    cut = [[Piece(p.file, a, b)] for p in pieces for a, b in ((p.start, p.start + 7), (p.start + 7, p.stop)) if a < b]
    config = replace(CONFIG, score_memory_mb=1)
    again = build(Store(tmp_path), graph, members, config, cut)
    first, second = Bundle.load(artifact).scorer, Bundle.load(again).scorer
    h, r = torch.arange(50), torch.arange(50) % R
    torch.testing.assert_close(first.score_tails(h, r), second.score_tails(h, r), rtol=0.05, atol=0.05)


def test_without_validation_triples_the_first_member_answers_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    graph = graph_artifact(store, random_splits(1, N, R, (900, 0, 50)), N, R)
    members = {"wide": model_artifact(store, graph, dim=16), "narrow": model_artifact(store, graph, dim=8)}
    bundle = Bundle.load(build(store, graph, members, parts=[]))
    assert bundle.calibration is None
    h, r = torch.arange(20), torch.arange(20) % R
    torch.testing.assert_close(bundle.score_tails(h, r), Bundle.load(members["wide"]).score_tails(h, r))
    (answer,) = Predictor(bundle).predict([Query("e1", "_relation_0", None)])
    assert isinstance(answer, Ranking) and answer.answer_set is None and answer.predictions[0].probability is None


def test_a_moved_storage_a_lost_member_and_a_member_of_another_graph(
    made: tuple[Store, Artifact, dict, Artifact], tmp_path: Path
) -> None:
    store, graph, members, artifact = made
    moved = tmp_path / "moved"
    shutil.copytree(store.root, moved)
    hidden = Path(store.root).rename(tmp_path / "hidden")
    try:
        found = Artifact.load(str(moved / "model" / artifact.version))
        assert Bundle.load(found).num_entities == N
        shutil.rmtree(moved / "model" / members["narrow"].version)
        with pytest.raises(ArtifactError, match="no artifact at"):
            Bundle.load(found)
    finally:
        hidden.rename(store.root)
    other = graph_artifact(store, random_splits(5, N, R, (500, 50, 50)), N, R)
    with pytest.raises(ArtifactError, match=r"member narrow.*was trained on graph"):
        build(store, graph, {"wide": members["wide"], "narrow": model_artifact(store, other)})
