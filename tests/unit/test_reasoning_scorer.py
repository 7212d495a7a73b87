"""Scores are the noisy-or of the rules that fire, asked in any way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kgray.reasoning.config import RulesConfig
from kgray.reasoning.facts import Facts
from kgray.reasoning.mining import mine_rules
from kgray.reasoning.scorer import RuleScorer
from tests.unit.rule_oracle import Oracle
from tests.unit.test_reasoning_mining import random_triples


@pytest.mark.parametrize(("seed", "entities", "relations", "count", "top"), [
    (0, 7, 2, 20, 5), (1, 6, 1, 14, 1), (2, 7, 2, 28, 2), (3, 8, 3, 30, 3),
])
def test_scores_are_those_of_the_definition(seed: int, entities: int, relations: int, count: int, top: int):
    triples = random_triples(seed, entities, relations, count)
    config = RulesConfig(min_support=2, max_rules=8, max_constant_rules=6)
    rules = mine_rules(Facts.build(triples, entities, relations), config)
    # Other facts than those mined on, as after a deletion.
    triples = triples[::2]
    scorer = RuleScorer.over(rules, triples, entities, relations, top)
    oracle = Oracle(triples, entities, relations)
    expected = np.array([
        [[oracle.score(rules, h, r, t, top) for t in range(entities)] for r in range(relations)]
        for h in range(entities)
    ])
    assert (expected > 0).any()
    assert (expected == 0).any()
    h, r, t = (torch.from_numpy(i.ravel()) for i in np.meshgrid(*map(np.arange, expected.shape), indexing="ij"))
    close = {"rtol": 1e-6, "atol": 1e-7}
    tails = scorer.score_tails(h, r)
    np.testing.assert_allclose(tails.numpy(), expected[h, r], **close)
    heads = scorer.score_heads(r, t)
    np.testing.assert_allclose(heads.numpy(), expected[:, r, t].T, **close)
    by_relation = scorer.score_relations(h, t)
    np.testing.assert_allclose(by_relation.numpy(), expected[h, :, t], **close)
    triple = scorer.score_triples(h, r, t)
    # To the last bit, whoever asks: the four must tie with each other.
    every = torch.arange(len(h))
    assert torch.equal(triple, tails[every, t])
    assert torch.equal(triple, heads[every, h])
    assert torch.equal(triple, by_relation[every, r])
    assert tails.dtype == heads.dtype == by_relation.dtype == triple.dtype == torch.float32
