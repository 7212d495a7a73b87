"""New entities by text and facts: against the graph's own entities, encoded the ordinary way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from model_graphs import ENTITIES, RELATIONS, SMALL, TRAIN, WIDTH, graph, vectors

from kgray.evaluation.counts import SIDES
from kgray.graph.graph import Graph
from kgray.graph.neighbours import NeighbourIndex
from kgray.model.config import GnnConfig, ModelConfig, ablation
from kgray.model.ensemble import EnsembleScorer
from kgray.model.fused import FusedModel
from kgray.model.gate import LEVELS, ONE, Gate, Queries, TrainingFacts
from kgray.model.newcomer import NEW, FusedNewcomers, Newcomer, answers_given
from kgray.model.newcomer_mix import Newcomers, NoNewcomersError
from kgray.model.states import StateScorer, scorer_of
from kgray.training.loop import fit


def trained(config: ModelConfig) -> tuple[Graph, FusedModel]:
    data = graph()
    done = fit(data, vectors() if config.text.kind != "none" else None, config, replace(TRAIN, epochs=1))
    assert isinstance(done.model, FusedModel)
    return data, done.model.eval()


def read(name: str, description: str) -> np.ndarray:
    """The text of entity 5 is "5"; another's is nothing."""
    return vectors().entities[int(name)] if name else np.zeros(WIDTH, dtype=np.float16)


def facts_of(data: Graph, entity: int) -> np.ndarray:
    facts = data.triples["train"]
    facts = facts[(facts[:, 0] == entity) | (facts[:, 2] == entity)].copy()
    facts[:, [0, 2]] = np.where(facts[:, [0, 2]] == entity, NEW, facts[:, [0, 2]])
    return facts


def without_vector(data: Graph, model: FusedModel, entity: int, edges: np.ndarray) -> StateScorer:
    """The oracle: all entities encoded over ``edges``, this one's structural vector taken away."""
    index = NeighbourIndex.build(edges, data.num_entities, data.num_relations)
    if model.structure is not None:
        model.structure.present[entity] = False
    return scorer_of(model, index)


TWO_HOPS = replace(SMALL, gnn=GnnConfig(fanouts=(3, 3), inference_fanouts=(-1, -1), heads=2))


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        TWO_HOPS,
        ablation(SMALL, "text_only"),
        ablation(SMALL, "graph_only"),
        replace(SMALL, gnn=GnnConfig(kind="sage", fanouts=(3,), inference_fanouts=(-1,))),
    ],
    ids=["fused", "two hops", "text only", "graph only", "sage"],
)
def test_an_entity_given_as_new_is_answered_for_as_itself(config: ModelConfig) -> None:
    data, model = trained(config)
    train = data.triples["train"]
    for entity in (5, 7):
        own = without_vector(data, model, entity, train)
        # Its neighbours are as they were: in deep networks they must not have heard from it in the oracle either.
        around = train[(train[:, 0] != entity) & (train[:, 2] != entity)]
        context = NeighbourIndex.build(around, data.num_entities, data.num_relations)
        new = FusedNewcomers(model, own, read if config.text.kind != "none" else None, context)
        states = new.states(Newcomer(str(entity), "", facts_of(data, entity)))
        if model.gnn is not None and len(new.fanouts) > 1:
            own = _deaf_neighbours(data, model, entity)
            new.scorer = own
        torch.testing.assert_close(states.head[0], own.heads[entity], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states.tail[0], own.tails[entity], rtol=1e-4, atol=1e-5)
        one, r = torch.tensor([entity]), torch.tensor([1])
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(new.score("tail", states, 1), own.score_tails(one, r)[0], **close)
        torch.testing.assert_close(new.score("head", 1, states), own.score_heads(r, one)[0], **close)
        other = torch.tensor([9])
        torch.testing.assert_close(new.score("relation", states, 9), own.score_relations(one, other)[0], **close)
        torch.testing.assert_close(new.score("relation", 9, states), own.score_relations(other, one)[0], **close)
        torch.testing.assert_close(new.score("relation", states, states), own.score_relations(one, one)[0], **close)


def _deaf_neighbours(data: Graph, model: FusedModel, entity: int) -> StateScorer:
    """All states where no edge leads from the entity to its neighbours, only back."""
    index = NeighbourIndex.build(data.triples["train"], data.num_entities, data.num_relations)
    keep = index.sources != entity
    owner = np.repeat(np.arange(data.num_entities), index.degrees)[keep]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=data.num_entities))])
    deaf = NeighbourIndex(
        offsets, index.sources[keep], index.relations[keep], index.triples[keep], index.num_triples
    )
    return scorer_of(model, deaf)


def test_no_facts_many_facts_and_facts_twice() -> None:
    data, model = trained(replace(SMALL, gnn=GnnConfig(fanouts=(3,), inference_fanouts=(4,), heads=2)))
    own = without_vector(data, model, 5, data.triples["train"][:0])
    new = FusedNewcomers(model, own, read)
    torch.testing.assert_close(new.states(Newcomer("5")).head[0], own.heads[5], rtol=1e-4, atol=1e-5)
    few = np.array([[NEW, 0, 1], [2, 1, NEW]])
    once = new.states(Newcomer("5", "", few))
    twice = new.states(Newcomer("5", "", np.concatenate([few, few])))
    torch.testing.assert_close(once.head, twice.head)
    assert not torch.allclose(once.head, new.states(Newcomer("5", "", few[:1])).head)
    many = np.stack([np.full(30, NEW), np.zeros(30, dtype=np.int64), np.arange(30)], axis=1)
    first, again = new.states(Newcomer("5", "", many)), new.states(Newcomer("5", "", many))
    assert torch.equal(first.head, again.head) and torch.isfinite(first.head).all()


def test_text_decides_where_there_is_nothing_else() -> None:
    """A new entity on the ring has the neighbours of the place its text says it is at."""
    data = graph()
    done = fit(data, vectors(), ablation(SMALL, "text_only"), replace(TRAIN, epochs=60, evaluate_every=10))
    assert isinstance(done.model, FusedModel) and isinstance(done.scorer, StateScorer)
    new = Newcomers({"fused": FusedNewcomers(done.model, done.scorer, _between)})
    scores = new.answer("tail", Newcomer("10.5"), 0).scores
    assert set(scores.topk(4).indices.tolist()) & {11, 12}
    away = torch.arange(ENTITIES)
    far = ((away - 11) % ENTITIES > 10) & ((11 - away) % ENTITIES > 10)
    assert scores[11] > scores[far].max()


def _between(name: str, description: str) -> np.ndarray:
    angle = 2 * np.pi * float(name) / ENTITIES
    place = [np.cos(angle), np.sin(angle), np.cos(2 * angle), np.sin(2 * angle)]
    return np.array(place + [0.0] * (WIDTH - 4), dtype=np.float16)


class Constant:
    """A member that knows only ids."""

    tasks = ("tail", "head", "relation")


def mixed(features: bool = False) -> tuple[Newcomers, dict[str, FusedNewcomers]]:
    data = graph()
    members: dict[str, FusedNewcomers] = {}
    for name, config in (("fused", SMALL), ("text_only", ablation(SMALL, "text_only"))):
        model = trained(config)[1]
        members[name] = FusedNewcomers(model, scorer_of(model, data.message_index()), read)
    names = ("rules", "fused", "text_only")
    scale = torch.tensor([[1.0, 2.0, 0.5]] * 3)
    linear = {"features": torch.randn(9, 3), "centre": torch.rand(9), "spread": torch.ones(9)} if features else {}
    gate = Gate(names, scale, torch.full((3, 3), ONE), **linear)
    facts = TrainingFacts.of(data.triples["train"], ENTITIES, RELATIONS)
    scorers = {"rules": Constant(), **{name: one.scorer for name, one in members.items()}}
    ensemble = EnsembleScorer(scorers, {"entity": gate, "relation": gate}, facts)  # type: ignore[arg-type]
    return Newcomers(members, ensemble), members


def test_an_ensemble_answers_by_the_members_that_can() -> None:
    new, members = mixed()
    one = Newcomer("5", "", np.array([[NEW, 0, 6]]))
    for task, first, second in (("tail", one, 1), ("head", 1, one), ("relation", one, 3), ("relation", 3, one)):
        answer = new.answer(task, first, second)
        rows = {
            name: member.score(task, *(member.states(p) if isinstance(p, Newcomer) else p for p in (first, second)))
            for name, member in members.items()
        }
        torch.testing.assert_close(answer.scores, 2.0 * rows["fused"] + 0.5 * rows["text_only"])
        assert list(answer.addends) == ["fused", "text_only"]


def test_a_gate_that_reads_scores_takes_the_usual_ones_of_members_that_cannot() -> None:
    torch.manual_seed(0)
    new, _ = mixed(features=True)
    answer = new.answer("tail", Newcomer("5"), 1)
    assert torch.isfinite(answer.scores).all() and set(answer.addends) == {"fused", "text_only"}


@pytest.mark.parametrize("task", ["tail", "head", "relation"])
def test_the_gate_takes_it_for_an_entity_that_training_did_not_see(task: str) -> None:
    """The oracle: an entity of the graph without training triples, weighed the ordinary way."""
    torch.manual_seed(0)
    new, _ = mixed()
    assert new.ensemble is not None
    train = graph().triples["train"]
    facts = TrainingFacts.of(train[(train[:, 0] != 7) & (train[:, 2] != 7)], ENTITIES, RELATIONS)
    part = "relation" if task == "relation" else "entity"
    gate = replace(new.ensemble.gates[part], levels=torch.randn(LEVELS[part], 3), directions=torch.randn(6, 3))
    new.ensemble.facts, new.ensemble.gates[part] = facts, gate
    given = {"tail": (7, 1), "head": (1, 7), "relation": (7, 9)}[task]
    rows = {name: torch.zeros(ENTITIES) for name in ("fused", "text_only")}
    named = [Newcomer("7") if value == 7 else value for value in given]
    first, second = (torch.tensor([value]) for value in given)
    side = torch.tensor([SIDES.index(task)])
    queries = Queries(side, facts.levels(task, first, second), facts.directions(task, first, second), None)
    want = gate.weights(queries)[0]
    assert new._weights(task, *named, rows) == pytest.approx({"fused": float(want[1]), "text_only": float(want[2])})


def test_a_member_without_a_say_answers_where_no_other_can() -> None:
    new, members = mixed()
    assert new.ensemble is not None
    gate = new.ensemble.gates["entity"]
    new.ensemble.gates["entity"] = Gate.single(gate.members, "rules", gate.scale)
    answer = new.answer("tail", Newcomer("5"), 1)
    torch.testing.assert_close(answer.scores, members["fused"].score("tail", members["fused"].states(Newcomer("5")), 1))


def test_what_no_member_can_tell_is_told() -> None:
    config = replace(SMALL, decoder="mlp", objective=replace(SMALL.objective, relation_weight=0.0))
    data, model = trained(config)
    new = Newcomers({"fused": FusedNewcomers(model, scorer_of(model, data.message_index()), read)})
    with pytest.raises(NoNewcomersError, match="tells the relation"):
        new.answer("relation", Newcomer("5"), 3)
    assert len(new.answer("tail", Newcomer("5"), 1).scores) == ENTITIES


def test_a_model_of_structure_alone_knows_nothing_new() -> None:
    data, model = trained(ablation(replace(SMALL, gnn=GnnConfig(kind="none")), "graph_only"))
    new = Newcomers({"fused": FusedNewcomers(model, scorer_of(model, data.message_index()), None)})
    with pytest.raises(NoNewcomersError, match="no member"):
        new.answer("tail", Newcomer("x", "", np.array([[NEW, 0, 3]])), 0)


def test_nothing_known_is_told() -> None:
    data, model = trained(ablation(SMALL, "graph_only"))
    scorer = scorer_of(model, data.message_index())
    new = Newcomers({"fused": FusedNewcomers(model, scorer, None)})
    with pytest.raises(NoNewcomersError, match="needs facts"):
        new.answer("tail", Newcomer("x"), 0)
    assert len(new.answer("tail", Newcomer("x", "", np.array([[NEW, 0, 3]])), 0).scores) == ENTITIES
    with pytest.raises(NoNewcomersError, match="no member"):
        Newcomers({}).answer("tail", Newcomer("x"), 0)


def test_answers_given_against_the_facts() -> None:
    facts = np.array([[NEW, 0, 4], [NEW, 1, 5], [6, 0, NEW], [NEW, 0, 7], [4, 2, NEW]])
    one = Newcomer("x", "", facts)
    assert answers_given("tail", (one, 0)).tolist() == [4, 7]
    assert answers_given("head", (0, one)).tolist() == [6]
    assert answers_given("relation", (one, 4)).tolist() == [0]
    assert answers_given("relation", (4, one)).tolist() == [2]
    assert answers_given("tail", (one, 2)).tolist() == []
