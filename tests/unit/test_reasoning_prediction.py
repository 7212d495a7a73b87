"""Why the model gives an answer: addends that sum up, planted rules with their facts, paths, facts left out; and the
command that tells it.

python3 -m pytest tests/unit/test_reasoning_prediction.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_graphs import ENTITIES, RELATIONS, SMALL, graph, vectors

from kgray.errors import UserError
from kgray.evaluation.calibration import Calibration, Monotone, TaskCalibration
from kgray.evaluation.ranking import rank_triples
from kgray.graph.graph import SPLITS
from kgray.model.bundle import Bundle, write_common
from kgray.model.ensemble import EnsembleScorer, score
from kgray.model.features import CandidateFeatures
from kgray.model.gate import LEVELS, Gate, TrainingFacts
from kgray.model.leave_one_out import LeaveOneOut
from kgray.model.path_scorer import PathScorer
from kgray.model.paths import PathModel
from kgray.model.paths_config import PathsConfig
from kgray.model.reranking import Pairwise, Reranker
from kgray.model.states import scorer_of
from kgray.pipeline import explain_command
from kgray.pipeline.plan import Work
from kgray.reasoning.config import RulesConfig
from kgray.reasoning.deletion import deletion_test
from kgray.reasoning.explain import Fact, explain
from kgray.reasoning.facts import Facts
from kgray.reasoning.mining import mine_rules
from kgray.reasoning.prediction import Explainer, Explanation
from kgray.reasoning.render import WIDTH, Vocabulary, render, to_json
from kgray.reasoning.scorer import RuleScorer
from kgray.serving.predictor import Predictor, Query, Ranking
from kgray.training.fused_task import build_model

NEXT, BACK, TWO = range(RELATIONS)
DATA = graph()
TRAIN = DATA.triples["train"]
TASKS = ("tail", "head", "relation")


def gate(members: tuple[str, ...], part: str, seed: int) -> Gate:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * 0.3

    m = len(members)
    return Gate(members, torch.ones(3, m), normal(3, m), normal(LEVELS[part], m))


def reranker(members: tuple[str, ...]) -> Reranker:
    names = [f"name{i}" for i in range(ENTITIES)]
    features = CandidateFeatures.of(DATA, names, [f"before name{i + 1}" for i in range(ENTITIES)])
    width = 1 + len(members) + len(features.names)
    torch.manual_seed(0)
    model = Pairwise(width, 2 * RELATIONS, hidden=8).eval()
    with torch.no_grad():
        model.common.normal_()
        model.together[-1].weight.normal_()  # type: ignore[index, union-attr]
    ones = torch.ones(2, len(members))
    return Reranker(10, members, features, model, ones, torch.zeros(width), torch.ones(width))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, LeaveOneOut]:
    """A calibrated ensemble of a fused model, a path model and mined rules, its best candidates looked at twice."""
    folder = tmp_path_factory.mktemp("bundle")
    model = build_model(DATA, vectors(), SMALL, seed=0).eval()
    states = scorer_of(model, DATA.message_index())
    facts = Facts.build(TRAIN, ENTITIES, RELATIONS)
    torch.manual_seed(0)
    paths = PathModel(PathsConfig(layers=2, dim=8, patterns=2, keep=None), DATA.message_index(), RELATIONS)
    members = {
        "fused": states,
        "rules": RuleScorer(mine_rules(facts, RulesConfig()), facts),
        "paths": PathScorer(paths.eval()),
    }
    every, two = tuple(members), ("fused", "rules")
    gates = {"entity": gate(every, "entity", 0), "relation": gate(two, "relation", 1)}
    scorer = EnsembleScorer(members, gates, TrainingFacts.of(TRAIN, ENTITIES, RELATIONS), reranker(every))
    write_common(folder, "ensemble", DATA, {})
    one = TaskCalibration(0.7, Monotone(np.zeros(0), np.zeros(0)), Monotone(np.zeros(0), np.zeros(0)),
                          np.full(RELATIONS, -3.0))
    (folder / "calibration.json").write_text(json.dumps(Calibration(0.1, dict.fromkeys(TASKS, one)).to_json()))
    info = {"family": "ensemble"}
    known = DATA.known(SPLITS)
    return Bundle(folder, scorer, known, "0123", "", info), LeaveOneOut(model, states, DATA)


def given(task: str, row: list[int]) -> tuple[int, int]:
    h, r, t = row
    return {"tail": (h, r), "head": (r, t), "relation": (h, t)}[task]


def names(bundle: Bundle) -> Vocabulary:
    return Vocabulary(bundle.entity_ids, bundle.entity_names, bundle.relation_ids, bundle.relation_names)


def check_numbers(bundle: Bundle, one: Explanation, task: str, row: list[int]) -> None:
    first, second = given(task, row)
    scores = score(bundle.scorer, task, torch.tensor([first]), torch.tensor([second]))[0]
    assert one.score == pytest.approx(float(scores[one.candidate]))
    assert sum(a.value for a in one.addends) == pytest.approx(one.score, abs=1e-3)
    triple = {"tail": 2, "head": 0, "relation": 1}[task]
    answers = {tuple(r)[triple] for s in SPLITS for r in DATA.triples[s].tolist() if given(task, r) == (first, second)}
    free = [c for c in range(len(scores)) if c != one.candidate and c not in answers]
    assert one.rival == max(free, key=lambda c: float(scores[c]))
    assert one.rival_score == pytest.approx(float(scores[one.rival]))
    contrasts = [a.contrast for a in one.addends if a.contrast is not None]
    assert len(contrasts) == len(one.addends)
    assert sum(contrasts) == pytest.approx(one.score - one.rival_score, abs=1e-3)  # type: ignore[operator]
    assert contrasts == sorted(contrasts, key=lambda c: -abs(c))
    assert one.known == (one.candidate in answers)


@pytest.mark.parametrize("task", TASKS)
def test_addends_sum_up_and_the_rest_is_what_is_served_and_ranked(
    task: str, bundle: tuple[Bundle, LeaveOneOut]
) -> None:
    model, leave_one_out = bundle
    explainer, predictor = Explainer(model, "fused", leave_one_out), Predictor(model)
    for row in DATA.triples["test"][:3].tolist():
        first, second = given(task, row)
        wanted = {"tail": 2, "head": 0, "relation": 1}[task]
        found = explainer.explain(task, first, second, [*explainer.best(task, first, second, 3), row[wanted]])
        parts = ("head", "relation", "tail")
        asked = dict(zip([p for p in parts if p != task], (first, second), strict=True))
        ids = {p: model.relation_ids[i] if p == "relation" else model.entity_ids[i] for p, i in asked.items()}
        served = predictor.predict([Query(**ids, top_k=3)])[0]
        assert isinstance(served, Ranking)
        for one, other in zip(found, served.predictions, strict=False):
            table = model.relation_ids if task == "relation" else model.entity_ids
            assert (table[one.candidate], one.known, one.in_set) == (other.id, other.known, other.in_set)
            assert one.score == pytest.approx(other.score) and one.probability == pytest.approx(other.probability)
        for one in found:
            check_numbers(model, one, task, row)
        ranks: list[float] = []
        rank_triples(
            *(model.scorer, np.array([row]), model.known),
            split="test", tasks=(task,), on_ranks=lambda r, ranks=ranks: ranks.extend(r.realistic.tolist()),
        )
        assert found[-1].rank == ranks[0]
        if task == "relation":
            assert not found[0].first_ranking and not found[0].paths
        else:
            assert {a.name for a in found[0].first_ranking} == {"fused", "rules", "paths"}
            assert {"first ranking", "features together", "same name"} <= {a.name for a in found[0].addends}


def test_planted_rules_are_named_with_their_facts(bundle: tuple[Bundle, LeaveOneOut]) -> None:
    model, leave_one_out = bundle
    explainer, words = Explainer(model, "fused", leave_one_out), names(model)
    known = {tuple(row) for row in TRAIN.tolist()}
    hidden = [row for row in DATA.triples["test"].tolist() if row[1] == BACK and (row[2], NEXT, row[0]) in known]
    assert hidden
    for head, relation, tail in hidden:
        (one,) = explainer.explain("tail", head, relation, [tail])
        rules = model.scorer.members["rules"]  # type: ignore[attr-defined]
        assert list(one.rules) == explain(rules, head, relation, tail)
        assert one.rules_score == pytest.approx(sum(fired.contribution for fired in one.rules), rel=1e-5)
        inverse = [fired for fired in one.rules if fired.rule.body == (NEXT + RELATIONS,)]
        assert inverse and inverse[0].groundings == ((Fact(tail, NEXT, head),),)
        text = render(one, words, 1)
        assert "r1(X, Y) <- r0(Y, X) [" in text and f"e{tail} -r0-> e{head}" in text
        assert len(text.splitlines()) <= 45 and max(map(len, text.splitlines())) <= WIDTH
        data = json.loads(json.dumps(to_json(one, words)))
        assert [f"e{tail}", "r0", f"e{head}"] in [f for r in data["rules"] for g in r["groundings"] for f in g]
        assert data["score"] == one.score and len(data["addends"]) == len(one.addends)


def test_paths_lead_from_the_query_to_the_answer_and_facts_are_the_greatest_changes(
    bundle: tuple[Bundle, LeaveOneOut]
) -> None:
    model, leave_one_out = bundle
    explainer = Explainer(model, "fused", leave_one_out)
    head, relation, tail = DATA.triples["test"][0].tolist()
    for task in ("tail", "head"):
        first, second = given(task, [head, relation, tail])
        (one,) = explainer.explain(task, first, second, [tail if task == "tail" else head])
        start, end = (head, tail) if task == "tail" else (tail, head)
        for path in one.paths:
            at = start
            for step in path.steps:
                assert at == (step.head if step.forward else step.tail)
                at = step.tail if step.forward else step.head
            assert at == end
        effects = leave_one_out.effects(task, first, second, [one.candidate])
        assert one.neighbours.examined == len(effects.facts) > 0
        changes = [abs(n.change) for n in one.neighbours.facts]
        assert changes == sorted(changes, reverse=True)
        assert changes[0] == pytest.approx(float(effects.changes.abs().max()))


def test_what_cannot_be_left_out_is_said(bundle: tuple[Bundle, LeaveOneOut]) -> None:
    model, _ = bundle
    (one,) = Explainer(model, "fused", "the vectors are gone").explain("tail", 0, 0, [1])
    assert one.neighbours.why_not == "the vectors are gone" and "the vectors are gone" in render(one, names(model), 1)
    single = replace(model, scorer=model.scorer.members["rules"], info={"family": "rules"})  # type: ignore[attr-defined]
    (one,) = Explainer(single).explain("tail", 0, 0, [1])
    assert [a.name for a in one.addends] == ["rules"] and one.addends[0].value == one.score
    paths = replace(model, scorer=model.scorer.members["paths"], info={"family": "paths"})  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="not relation queries"):
        Explainer(paths).explain("relation", 0, 1, [0])


def test_a_query_that_another_member_answers_is_explained_without_the_fused_models_facts(
    bundle: tuple[Bundle, LeaveOneOut], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, leave_one_out = bundle
    monkeypatch.setattr(leave_one_out.scorer.decoders[0].decoder, "tasks", ("tail", "head"))
    (one,) = Explainer(model, "fused", leave_one_out).explain("relation", 0, 1, [0])
    assert one.neighbours.why_not == "the model cannot tell the relation"


def test_known_answers_can_be_left_out(bundle: tuple[Bundle, LeaveOneOut]) -> None:
    explainer = Explainer(bundle[0])
    head, relation, tail = TRAIN[0].tolist()
    every = explainer.best("tail", head, relation, ENTITIES)
    new = explainer.best("tail", head, relation, ENTITIES, filter_known=True)
    assert tail in every and tail not in new and [e for e in every if e in new] == new


def test_deleting_the_reasons_hurts_more_than_deleting_at_random() -> None:
    rules = mine_rules(Facts.build(TRAIN, ENTITIES, RELATIONS), RulesConfig(constants=False, hops=1))
    triples = np.concatenate([DATA.triples["valid"], DATA.triples["test"]])
    found = deletion_test(rules, TRAIN, triples, DATA.known(SPLITS), split="test", count=100)
    scorer = RuleScorer.over(rules, TRAIN, ENTITIES, RELATIONS)
    scores = scorer.score_triples(*(torch.from_numpy(column.copy()) for column in triples.T))
    assert found.queries == int((scores > 0).sum())
    assert found.score == pytest.approx(float(scores[scores > 0].mean()), rel=1e-5)
    # Without any of its reasons nothing of a score is left.
    assert found.score_explained == pytest.approx(found.score, rel=1e-5)
    assert found.score_explained > 2 * found.score_random
    assert found.reciprocal_rank_explained > 2 * found.reciprocal_rank_random
    assert found.harder > 0.5 and found.softer == 0.0
    with pytest.raises(ValueError, match="no rule predicts"):
        deletion_test(rules.take(np.zeros(0, np.int64)), TRAIN, triples, DATA.known(SPLITS), split="test", count=1)


@pytest.fixture
def work(bundle: tuple[Bundle, LeaveOneOut], monkeypatch: pytest.MonkeyPatch) -> Work:
    """As if the ensemble of the bundle had been built."""
    monkeypatch.setattr(Bundle, "load", lambda _: bundle[0])
    monkeypatch.setattr(explain_command, "leave_one_out", lambda _: bundle[1])
    return SimpleNamespace(artifacts={"ensemble": None})  # type: ignore[return-value]


def test_the_command_explains_the_best_answers_or_both_directions_of_a_triple(
    bundle: tuple[Bundle, LeaveOneOut], work: Work
) -> None:
    explainer = Explainer(*bundle[:1])
    best = explainer.best("head", NEXT, 5, 2)
    found = explain_command.explain(work, {"relation": "r0", "tail": "e5"}, 2, filter_known=False)
    assert [data["head"]["id"] for _, data in found] == [f"e{e}" for e in best]
    assert [text.split()[0] for text, _ in found] == ["1.", "2."]
    new = explain_command.explain(work, {"relation": "r0", "tail": "e5"}, 1, filter_known=True)
    assert not new[0][1]["known"]
    found = explain_command.explain(work, {"head": "e4", "relation": "r0", "tail": "e5"}, 9, filter_known=True)
    assert [data["task"] for _, data in found] == ["tail", "head"]
    whole = bundle[0].score_triples(torch.tensor([4]), torch.tensor([0]), torch.tensor([5]))
    assert np.mean([data["score"] for _, data in found]) == pytest.approx(float(whole))
    (one,) = explain_command.explain(work, {"head": "e4", "tail": "e5"}, 1, filter_known=False)
    assert one[1]["task"] == "relation"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"head": "e 4O", "relation": "r0"}, "head: no entity has the id or name 'e 4O'"),
        ({"head": "E-4", "relation": "r0"}, "did you mean"),
        ({"head": "e4", "relation": "e5"}, "relation: no relation has the id or name 'e5'"),
    ],
)
def test_unknown_ids_are_the_users_mistake_with_what_is_near(given: dict[str, str], words: str, work: Work) -> None:
    with pytest.raises(UserError, match=words):
        explain_command.explain(work, given, 1, filter_known=False)


def test_a_model_that_ranks_no_relations_is_not_asked_for_one(
    bundle: tuple[Bundle, LeaveOneOut], work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = replace(bundle[0], scorer=bundle[0].scorer.members["paths"])  # type: ignore[attr-defined]
    monkeypatch.setattr(Bundle, "load", lambda _: paths)
    with pytest.raises(UserError, match="cannot tell the relation, it answers tail and head"):
        explain_command.explain(work, {"head": "e4", "tail": "e5"}, 1, filter_known=False)


def test_long_names_do_not_break_the_page(bundle: tuple[Bundle, LeaveOneOut], tmp_path: Path) -> None:
    model, leave_one_out = bundle
    words = names(model)
    long = replace(words, entity_names=[f"a name\nthat never ends {'x' * 300} {i}" for i in range(ENTITIES)])
    (one,) = Explainer(model, "fused", leave_one_out).explain("tail", 0, NEXT, [1])
    lines = render(one, long, 1).splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= WIDTH
