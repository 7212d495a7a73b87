"""Rules are those the definition gives, whatever way they were counted."""

from __future__ import annotations

import numpy as np
import pytest

from kgray.errors import ConfigError, TrainingError
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


def same(a: Rules, b: Rules) -> bool:
    return a.to_table().equals(b.to_table())


def sampled_config() -> RulesConfig:
    """So little may be spent that everything is sampled."""
    return RulesConfig(min_support=1, max_walks=300, max_groundings=60, max_candidates=40, max_rules=20)


def test_rules_do_not_depend_on_how_relations_are_split_or_ordered():
    triples = random_triples(5, 40, 4, 400)
    facts = Facts.build(triples, 40, 4)
    for config in (WHOLE, sampled_config()):
        whole = mine_rules(facts, config)
        assert same(whole, mine_rules(facts, config))
        assert same(whole, Rules.join([mine_rules(facts, config, [3, 1]), mine_rules(facts, config, [0, 2])]))
        shuffled = Facts.build(np.random.default_rng(0).permutation(triples), 40, 4)
        assert same(whole, mine_rules(shuffled, config))
    assert len(mine_rules(facts, config, [])) == 0


def test_the_seed_draws_what_is_sampled():
    facts = Facts.build(random_triples(5, 40, 4, 400), 40, 4)
    config = sampled_config()
    other = RulesConfig(**{name: getattr(config, name) for name in config.__slots__} | {"seed": 1})
    assert not same(mine_rules(facts, config), mine_rules(facts, other))


def test_a_sample_is_near_the_whole():
    draw = np.random.default_rng(3)
    # Every relation holds of half of the pairs at random: confidences are near one half, sampled or not.
    pairs = np.argwhere(draw.random((120, 120)) < 0.5)
    triples = np.insert(pairs, 1, 0, axis=1)
    config = RulesConfig(constants=False, max_walks=20_000, max_groundings=20_000)
    rules = mine_rules(Facts.build(triples, 120, 1), config)
    assert {int(h) for h in rules.hops} == {1, 2, 3}
    assert rules.body_size.max() <= 15_000
    np.testing.assert_allclose(rules.confidence, 0.5, atol=0.06)


def test_at_most_so_many_of_each_kind():
    facts = Facts.build(random_triples(5, 40, 4, 400), 40, 4)
    rules = mine_rules(facts, RulesConfig(min_support=1, max_rules=3, max_constant_rules=7))
    paths = rules.take(rules.is_path)
    for length in (1, 2, 3):
        assert np.bincount(paths.relation[paths.hops == length]).max() == 3
    assert np.bincount(rules.relation[~rules.is_path]).max() == 7
    whole = mine_rules(facts, RulesConfig(min_support=1))
    for relation in range(4):
        best = np.sort(whole.confidence[(whole.relation == relation) & (whole.hops == 2)])[::-1][:3]
        kept = np.sort(rules.confidence[(rules.relation == relation) & (rules.hops == 2)])[::-1]
        np.testing.assert_array_equal(kept, best)


@pytest.mark.parametrize(("entities", "relations", "count"), [(0, 0, 0), (5, 2, 0), (1, 1, 3), (2, 1, 1)])
def test_graphs_with_next_to_nothing(entities: int, relations: int, count: int):
    triples = random_triples(0, entities, relations, count) if count else np.zeros((0, 3), dtype=np.int64)
    assert len(mine_rules(Facts.build(triples, entities, relations), RulesConfig())) == 0


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="outside 3 entities and 1 relations"):
        Facts.build(np.array([[0, 1, 2]]), 3, 1)
    with pytest.raises(TrainingError, match="300 relations and 4194304 entities are more"):
        Facts.build(np.zeros((0, 3), dtype=np.int64), 2**22, 300)
    with pytest.raises(ValueError, match=r"expected some of 0\.\.0"):
        mine_rules(Facts.build(np.array([[0, 0, 2]]), 3, 1), RulesConfig(), [1])
    for key, value in [("hops", 4), ("pessimism", 0.0), ("min_confidence", 1.0), ("top", 0), ("seed", -1)]:
        with pytest.raises(ConfigError, match=key):
            RulesConfig(**{key: value})


def test_rules_survive_a_table():
    rules = mine_rules(Facts.build(random_triples(1, 10, 2, 60), 10, 2), RulesConfig())
    assert len(rules)
    assert same(rules, Rules.from_table(rules.to_table()))
