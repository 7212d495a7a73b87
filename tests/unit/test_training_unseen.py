"""Entities held out of training: never a target, a candidate or a neighbour there, and known by support when asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from model_graphs import ENTITIES, ONE_VS_ALL, RELATIONS, SMALL, TRAIN, graph, vectors

from kgray.artifact import Draft
from kgray.graph.graph import Graph
from kgray.graph.neighbours import NeighbourIndex
from kgray.model.bundle import write_common
from kgray.model.config import ModelConfig
from kgray.model.features import CandidateFeatures
from kgray.model.fused import FusedModel
from kgray.model.path_scorer import PathScorer, write_paths
from kgray.model.paths import PathModel
from kgray.model.paths_config import PathsConfig
from kgray.model.relation_scorer import write_relations
from kgray.model.relations_config import RelationsConfig
from kgray.model.states import scorer_of
from kgray.reasoning.artifact import write_rules
from kgray.reasoning.config import RulesConfig
from kgray.reasoning.facts import Facts
from kgray.reasoning.mining import mine_rules
from kgray.training.fused_task import FusedTask
from kgray.training.loop import fit
from kgray.training.paths_task import PathsTask
from kgray.training.relations_task import RelationsTask
from kgray.training.worker import Worker

HELD = np.arange(30, 36)


def divided() -> Graph:
    """The ring with six entities held out: half of their facts support, the others valid and test."""
    facts = np.concatenate([graph().triples[split] for split in ("train", "valid", "test")])
    touched = np.isin(facts[:, [0, 2]], HELD).any(axis=1)
    of_held = facts[touched]
    parts = {"train": facts[~touched], "support": of_held[::2], "valid": of_held[1::4], "test": of_held[3::4]}
    return Graph.from_arrays(parts, ENTITIES, RELATIONS)


@pytest.mark.parametrize("config", [SMALL, ONE_VS_ALL], ids=["sampled", "one vs all"])
def test_no_step_touches_a_held_out_entity(config: ModelConfig) -> None:
    data = divided()
    task = FusedTask.make(data, vectors(), config, TRAIN, Worker("cpu"))
    for epoch in range(3):
        for step in range(task.batches.steps):
            batch = task.batches.make(epoch, step)
            assert not np.isin(batch.neighbourhood.nodes.numpy(), HELD).any()
    assert task.index.num_triples == len(data.triples["train"]) + len(data.triples["support"])


def test_held_out_entities_are_no_candidates_where_nothing_is_known_of_them_either() -> None:
    data = divided()
    data = Graph.from_arrays({**data.triples, "support": np.empty((0, 3), dtype=np.int64)}, ENTITIES, RELATIONS)
    trained = data.trained_entities()
    assert trained is not None and not np.isin(HELD, trained).any()
    assert len(FusedTask.make(data, vectors(), ONE_VS_ALL, TRAIN, Worker("cpu")).batches.make(0, 0).neighbourhood.nodes)


def test_relations_are_told_over_support_when_asked(tmp_path: Path) -> None:
    data = divided()
    task = RelationsTask.make(data, None, RelationsConfig(text=False, dim=8, hidden=8), TRAIN, Worker("cpu"))
    assert not task.batches.index.context(HELD, HELD, None, heads=True).any()
    scorer = task.scorer()
    around = np.expm1(scorer.index.context(HELD, HELD, None, heads=True)).sum(axis=1)
    support = data.triples["support"]
    assert around.round().tolist() == [int((support[:, [0, 2]] == entity).sum()) for entity in HELD]
    write_relations(tmp_path, scorer, data, [], {})
    assert np.array_equal(np.load(tmp_path / "facts.npy"), data.context)


def test_every_trained_entity_is_a_candidate_as_often_as_it_is_said() -> None:
    data = divided()
    task = FusedTask.make(data, vectors(), SMALL, TRAIN, Worker("cpu"))
    trained = data.trained_entities()
    assert trained is not None
    seen = np.zeros(ENTITIES)
    steps = [(epoch, step) for epoch in range(200) for step in range(task.batches.steps)]
    for epoch, step in steps:
        batch = task.batches.make(epoch, step)
        seeds = len(batch.log_inclusion)  # type: ignore[arg-type]
        seen[batch.neighbourhood.nodes.numpy()[:seeds]] += 1
    said = task.batches._inclusion(1).exp().numpy()
    np.testing.assert_allclose(seen[trained] / len(steps), said[trained], atol=0.1)


def test_states_are_computed_over_train_and_support() -> None:
    data = divided()
    done = fit(data, vectors(), SMALL, replace(TRAIN, epochs=1))
    assert isinstance(done.model, FusedModel)
    known = np.concatenate([data.triples["train"], data.triples["support"]])
    oracle = scorer_of(done.model, NeighbourIndex.build(known, ENTITIES, RELATIONS))
    torch.testing.assert_close(done.scorer.heads, oracle.heads)  # type: ignore[attr-defined]
    blind = scorer_of(done.model, data.message_index())
    changed = (done.scorer.heads != blind.heads).any(dim=1).numpy()  # type: ignore[attr-defined]
    touched = np.unique(data.triples["support"][:, [0, 2]])
    assert set(np.flatnonzero(changed)) == set(touched.tolist())
    assert done.model.structure is not None and not done.model.structure.present[HELD].any()


def test_what_is_asked_changes_nothing() -> None:
    """The same weights and states whatever the test split holds."""
    data = divided()
    other = Graph.from_arrays({**data.triples, "test": data.triples["test"][:1]}, ENTITIES, RELATIONS)
    first, second = (fit(one, vectors(), SMALL, replace(TRAIN, epochs=2)) for one in (data, other))
    assert first.best == second.best
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])
    assert torch.equal(first.scorer.heads, second.scorer.heads)  # type: ignore[attr-defined]


PATHS = PathsConfig(layers=2, dim=8, keep=None, dropout=0.0)


def test_paths_run_over_support_when_asked(tmp_path: Path) -> None:
    data = divided()
    done = fit(data, None, PATHS, replace(TRAIN, epochs=1))
    assert isinstance(done.task, PathsTask) and isinstance(done.scorer, PathScorer)
    oracle = PathModel(PATHS, NeighbourIndex.build(data.context, ENTITIES, RELATIONS), RELATIONS)
    oracle.load_state_dict(done.model.state_dict())
    h, r = torch.arange(28, 38), torch.zeros(10, dtype=torch.int64)
    want = PathScorer(oracle.eval()).score_tails(h, r)
    torch.testing.assert_close(done.scorer.score_tails(h, r), want)
    assert not torch.allclose(PathScorer(done.task.model).score_tails(h, r), want)
    write_paths(tmp_path, done.task.model, data, [], {})
    assert np.array_equal(np.load(tmp_path / "triples.npy"), data.context)


def test_rules_are_mined_on_training_and_grounded_on_support_too(tmp_path: Path) -> None:
    data = divided()
    rules = mine_rules(Facts.build(data.triples["train"], ENTITIES, RELATIONS), RulesConfig(), range(RELATIONS))
    write_rules(Draft(str(tmp_path)), RulesConfig(), data, rules)
    facts = {tuple(row) for row in np.load(tmp_path / "facts.npy").tolist()}
    assert facts == {tuple(row) for split in ("train", "support") for row in data.triples[split].tolist()}


def test_features_and_filters_know_support(tmp_path: Path) -> None:
    data = divided()
    features = CandidateFeatures.of(data, [""] * ENTITIES, [""] * ENTITIES)
    assert features.facts.contains(*data.triples["support"].T).all()
    assert not features.facts.contains(*data.triples["test"].T).any()
    assert len(features.neighbours.items) > len(
        CandidateFeatures.of(replace(data, triples={**data.triples, "support": data.triples["support"][:0]}),
                             [""] * ENTITIES, [""] * ENTITIES).neighbours.items
    )  # fmt: skip
    write_common(tmp_path, "fused", data, {})
    assert data.known(("train", "valid", "test", "support")).num_triples == sum(map(len, data.triples.values()))
