"""Why the rules predict a triple: those that fire, what each adds, and the facts each stands on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kgray.reasoning.facts import Facts, Int64
from kgray.reasoning.paths import paths_between
from kgray.reasoning.rules import Rule
from kgray.reasoning.scorer import RuleScorer


@dataclass(frozen=True)
class Fact:
    """A training fact, its relation a real one."""

    head: int
    relation: int
    tail: int


@dataclass(frozen=True)
class FiredRule:
    """A rule that predicts the triple.

    contribution: what it adds to the score, -log(1 - confidence); 0.0 for a rule beyond the ``top`` that count.
    groundings: bodies that hold, each the facts of its atoms in their order.
    """

    rule: Rule
    contribution: float
    groundings: tuple[tuple[Fact, ...], ...]


def explain(
    scorer: RuleScorer, head: int, relation: int, tail: int, limit: int = 10, groundings: int = 3
) -> list[FiredRule]:
    """At most ``limit`` rules that predict (head, relation, tail), the most confident first, with at most
    ``groundings`` bodies each. Those of the scorer's ``top`` add up to its score of the triple.

    Raises ValueError for an id out of range or a limit below 0.
    """
    facts = scorer.facts
    for what, value, size in (
        ("head", head, facts.num_entities),
        ("relation", relation, facts.num_relations),
        ("tail", tail, facts.num_entities),
    ):
        if not 0 <= value < size:
            raise ValueError(f"{what} {value} outside 0..{size - 1}")
    if limit < 0 or groundings < 0:
        raise ValueError(f"limit {limit} and groundings {groundings} must not be negative")
    _, rule, concluded = scorer.fired(np.array([head]), np.array([tail]))
    chosen = scorer.ranked(rule[concluded == relation])[:limit]
    return [
        FiredRule(
            rule=scorer.rules[number],
            contribution=float(scorer.weights[number]) if place < scorer.top else 0.0,
            groundings=tuple(_groundings(facts, scorer.rules[number], head, tail, groundings)),
        )
        for place, number in enumerate(chosen.tolist())
    ]


def _groundings(facts: Facts, rule: Rule, head: int, tail: int, limit: int) -> list[tuple[Fact, ...]]:
    if rule.constant is None:
        return _paths(facts, rule.body, head, tail, limit)
    # The conclusion names c, so X is the other end.
    variable = head if rule.relation < facts.num_relations else tail
    if rule.body_constant is not None:
        others = [rule.body_constant]
    else:
        _, place = facts.edges(np.array([variable]))
        kept = place[(facts.relations[place] == rule.body[0]) & (facts.tails[place] != rule.constant)]
        others = facts.tails[kept].tolist()
    found: list[tuple[Fact, ...]] = [(_fact(facts, variable, rule.body[0], z),) for z in others[:limit]]
    return found


def _paths(facts: Facts, body: tuple[int, ...], head: int, tail: int, limit: int) -> list[tuple[Fact, ...]]:
    pairs = paths_between(facts, np.array([head]), np.array([tail]), len(body)).pairs
    first, second = np.divmod(facts.pair_keys[pairs], max(facts.num_entities, 1))
    holds = np.ones(len(pairs), dtype=bool)
    for step, relation in enumerate(body):
        holds &= facts.contains(first[:, step], np.full(len(pairs), relation), second[:, step])
    rows = np.flatnonzero(holds)
    # In the order of their entities: the same whichever end the paths were looked for from.
    order = rows[np.lexsort(second[rows].T[::-1])][:limit]
    return [
        tuple(_fact(facts, *step) for step in zip(first[row].tolist(), body, second[row].tolist(), strict=True))
        for row in order.tolist()
    ]


def _fact(facts: Facts, head: int, relation: int, tail: int) -> Fact:
    real = facts.num_relations
    return Fact(head, relation, tail) if relation < real else Fact(tail, relation - real, head)


def fact_rows(fired: list[FiredRule]) -> Int64:
    """The distinct facts of all groundings, (n, 3) int64 head, relation, tail: what a deletion test deletes."""
    rows = {(f.head, f.relation, f.tail) for one in fired for grounding in one.groundings for f in grounding}
    return np.array(sorted(rows), dtype=np.int64).reshape(-1, 3)
