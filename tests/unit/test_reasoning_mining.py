"""Rules are those the definition gives, whatever way they were counted."""

from __future__ import annotations

import numpy as np
import pytest

from kgray.errors import ConfigError
from kgray.reasoning.config import RulesConfig
from kgray.reasoning.facts import Facts
from kgray.reasoning.mining import mine_rules
from kgray.reasoning.rules import Rules
from tests.unit.rule_oracle import Oracle


def random_triples(seed: int, entities: int, relations: int, count: int) -> np.ndarray:
    """Random facts, loops and duplicates among them."""
    draw = np.random.default_rng(seed)
    limits = np.array([entities, relations, entities])
    return draw.integers(0, limits, size=(count, 3))


def contents(rules: Rules) -> set[tuple]:
    rows = zip(
        rules.relation.tolist(), rules.body.tolist(), rules.constant.tolist(), rules.body_constant.tolist(),
        rules.support.tolist(), rules.body_size.tolist(), strict=True,
    )
    return {(r, tuple(x for x in b if x >= 0), c, d, s, n) for r, b, c, d, s, n in rows}


WHOLE = RulesConfig(min_support=1, min_confidence=0.0, max_rules=10**6, max_constant_rules=10**6, max_candidates=10**6)


@pytest.mark.parametrize(("seed", "relations", "count"), [(0, 2, 18), (1, 1, 12), (2, 2, 30), (3, 1, 25)])
def test_every_rule_with_its_support_and_size(seed: int, relations: int, count: int):
    triples = random_triples(seed, 6, relations, count)
    rules = mine_rules(Facts.build(triples, 6, relations), WHOLE)
    assert contents(rules) == Oracle(triples, 6, relations).mine(WHOLE)
    assert len(contents(rules)) == len(rules)
    np.testing.assert_allclose(rules.confidence, rules.support / (rules.body_size + 5.0))
