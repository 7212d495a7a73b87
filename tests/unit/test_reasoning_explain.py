"""Planted rules are found and given as reasons; deleting the reasons takes the score away."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kgray.reasoning.config import RulesConfig
from kgray.reasoning.explain import explain, fact_rows
from kgray.reasoning.facts import Facts
from kgray.reasoning.mining import mine_rules
from kgray.reasoning.rules import Rule, Rules, rule_text
from kgray.reasoning.scorer import RuleScorer

SPOUSE, PARENT, CHILD, BROTHER, UNCLE, LIVES, SPEAKS, NOISE = range(8)
NAMES = ["spouse", "parent", "child", "brother", "uncle", "lives", "speaks", "noise"]
PEOPLE, PLACES = 300, 4
LANGUAGE = PEOPLE + PLACES
ENTITIES = LANGUAGE + 2
HIDDEN = 10


@pytest.fixture(scope="module")
def planted() -> tuple[np.ndarray, np.ndarray]:
    """(train, hidden) facts: spouse symmetric, child inverse of parent, parent and brother composed to uncle, who
    lives in the first place speaks the first language; a tenth of all facts is noise."""
    draw = np.random.default_rng(7)
    couples = draw.permutation(PEOPLE).reshape(-1, 2)
    parent = np.stack([np.arange(PEOPLE), draw.integers(0, PEOPLE, PEOPLE)], axis=1)
    parent = parent[parent[:, 0] != parent[:, 1]]
    brother = draw.permutation(PEOPLE).reshape(-1, 2)
    of = dict(brother.tolist())
    uncle = np.array([(x, of[y]) for x, y in parent.tolist() if y in of and of[y] != x])
    lives = np.stack([np.arange(PEOPLE), PEOPLE + draw.integers(0, PLACES, PEOPLE)], axis=1)
    speaks = np.array([(x, LANGUAGE + int(place > PEOPLE)) for x, place in lives.tolist()])
    noise = draw.integers(0, PEOPLE, (PEOPLE // 10, 2))
    hidden, train = [], []
    for relation, pairs, held in [
        (SPOUSE, np.concatenate([couples, couples[:, ::-1]]), True), (PARENT, parent, False),
        (CHILD, parent[:, ::-1], True), (BROTHER, brother, False), (UNCLE, uncle, True), (LIVES, lives, False),
        (SPEAKS, speaks, True), (NOISE, noise, False),
    ]:
        rows = np.insert(pairs, 1, relation, axis=1)
        hidden.append(rows[:HIDDEN] if held else rows[:0])
        train.append(rows[HIDDEN:] if held else rows)
    return np.concatenate(train), np.concatenate(hidden)


@pytest.fixture(scope="module")
def scorer(planted: tuple[np.ndarray, np.ndarray]) -> RuleScorer:
    facts = Facts.build(planted[0], ENTITIES, len(NAMES))
    return RuleScorer(mine_rules(facts, RulesConfig()), facts)


def confidence(rules: Rules, relation: int, *bodies: tuple[int, ...]) -> float:
    """The highest of the path rules with one of the bodies; NaN where there is none."""
    found = [rules[i] for i in np.flatnonzero((rules.relation == relation) & rules.is_path).tolist()]
    return max((rule.confidence for rule in found if rule.body in bodies), default=float("nan"))


def test_planted_rules_are_found(scorer: RuleScorer):
    real = len(NAMES)
    # Ten facts are hidden and five wrong ones charged, of some three hundred.
    assert confidence(scorer.rules, SPOUSE, (SPOUSE + real,)) > 0.9
    assert confidence(scorer.rules, CHILD, (PARENT + real,)) > 0.9
    assert confidence(scorer.rules, UNCLE, (PARENT, BROTHER), (CHILD + real, BROTHER)) > 0.85
    assert not confidence(scorer.rules, NOISE, (SPOUSE,), (PARENT,)) > 0.1
    own = scorer.rules.take((scorer.rules.relation == SPEAKS) & (scorer.rules.constant == LANGUAGE))
    assert (own[0].body, own[0].body_constant) == ((LIVES,), PEOPLE)
    assert own[0].confidence > 0.8


def test_hidden_facts_are_explained(scorer: RuleScorer, planted: tuple[np.ndarray, np.ndarray]):
    train, hidden = planted
    known = {tuple(row) for row in train.tolist()}
    expected = {SPOUSE: {(SPOUSE + 8,)}, CHILD: {(PARENT + 8,)}, UNCLE: {(PARENT, BROTHER), (CHILD + 8, BROTHER)},
                SPEAKS: {(LIVES,)}}
    for head, relation, tail in hidden.tolist():
        reasons = explain(scorer, head, relation, tail)
        assert expected[relation] & {reason.rule.body for reason in reasons[:2]}
        for reason in reasons:
            assert reason.groundings
            for grounding in reason.groundings:
                assert len(grounding) == len(reason.rule.body)
                assert all((f.head, f.relation, f.tail) in known for f in grounding)
                assert (head, relation, tail) not in {(f.head, f.relation, f.tail) for f in grounding}


def test_contributions_add_up_to_the_score(scorer: RuleScorer, planted: tuple[np.ndarray, np.ndarray]):
    rows = planted[1]
    scores = scorer.score_triples(*(torch.from_numpy(column) for column in rows.T))
    for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
        reasons = explain(scorer, *row, limit=1000)
        assert sum(reason.contribution for reason in reasons) == pytest.approx(score, rel=1e-6)
        assert all((reason.contribution > 0) == (place < scorer.top) for place, reason in enumerate(reasons))
        confidences = [reason.rule.confidence for reason in reasons]
        assert confidences == sorted(confidences, reverse=True)


def test_deleting_the_reasons_hurts_more_than_deleting_as_many_others(
    scorer: RuleScorer, planted: tuple[np.ndarray, np.ndarray]
):
    train, hidden = planted
    draw = np.random.default_rng(0)
    drops = np.zeros(2)
    for row in hidden.tolist():
        reasons = fact_rows(explain(scorer, *row, limit=scorer.top, groundings=1000))
        asked = [torch.tensor([i]) for i in row]
        named = (train[:, None] == reasons).all(axis=2).any(axis=1)
        others = np.isin(np.arange(len(train)), draw.choice(np.flatnonzero(~named), len(reasons), replace=False))
        before = float(scorer.score_triples(*asked))
        for kind, gone in enumerate((named, others)):
            rest = RuleScorer.over(scorer.rules, train[~gone], ENTITIES, len(NAMES))
            drops[kind] += before - float(rest.score_triples(*asked))
        assert len(reasons) == named.sum()
    assert drops[0] > 10 * max(drops[1], 0.1)


def test_rules_as_text():
    entities = ["Ann", "Rome", "Italy"]
    relations = ["lives", "born"]

    def rule(**given: object) -> str:
        values = {"id": 0, "relation": 0, "body": (0,), "constant": None, "body_constant": None,
                  "support": 120, "body_size": 140, "confidence": 0.8276, **given}
        return rule_text(Rule(**values), entities, relations)  # type: ignore[arg-type]

    assert rule(body=(3,)) == "lives(X, Y) <- born(Y, X) [0.83, 120 of 140]"
    assert rule(body=(0, 3)) == "lives(X, Y) <- lives(X, Z), born(Y, Z) [0.83, 120 of 140]"
    assert rule(body=(1, 2, 0)).startswith("lives(X, Y) <- born(X, Z1), lives(Z2, Z1), lives(Z2, Y) [")
    assert rule(body=(1,), constant=2, body_constant=1).startswith("lives(X, Italy) <- born(X, Rome) [")
    assert rule(relation=2, body=(1,), constant=0).startswith("lives(Ann, X) <- born(X, some Z) [")


def test_wrong_questions_are_refused(scorer: RuleScorer):
    with pytest.raises(ValueError, match=r"tail 306 outside 0\.\.305"):
        explain(scorer, 0, 0, ENTITIES)
    with pytest.raises(ValueError, match="limit -1"):
        explain(scorer, 0, 0, 1, limit=-1)
