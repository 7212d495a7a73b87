"""Rules counted and applied one entity at a time, straight from their definition: slow, and obvious."""

from __future__ import annotations

import itertools
import math

import numpy as np

from kgray.reasoning.config import RulesConfig
from kgray.reasoning.rules import NONE, Rule, Rules


class Oracle:
    """Facts as a set of (head, relation, tail), reciprocals too."""

    def __init__(self, triples: np.ndarray, num_entities: int, num_relations: int) -> None:
        self.n, self.r = num_entities, num_relations
        self.facts = {(h, r, t) for h, r, t in triples.tolist()}
        self.facts |= {(t, r + num_relations, h) for h, r, t in triples.tolist()}

    def path_holds(self, body: tuple[int, ...], x: int, y: int) -> bool:
        """Some path of the body leads from x to y, all its entities different."""
        others = [e for e in range(self.n) if e not in (x, y)]
        for middle in itertools.permutations(others, len(body) - 1):
            path = (x, *middle, y)
            if x != y and all((path[i], r, path[i + 1]) in self.facts for i, r in enumerate(body)):
                return True
        return False

    def constant_holds(self, body: int, other: int | None, x: int, c: int) -> bool:
        """X = x has the body of a rule that concludes c."""
        if x == c:
            return False
        if other is not None:
            return other != x and (x, body, other) in self.facts
        return any((x, body, z) in self.facts for z in range(self.n) if z not in (x, c))

    def predicts(self, rule: Rule, head: int, relation: int, tail: int) -> bool:
        if rule.relation >= self.r:
            head, relation, tail = tail, relation + self.r, head
        if rule.relation != relation:
            return False
        if rule.constant is None:
            return self.path_holds(rule.body, head, tail)
        return rule.constant == tail and self.constant_holds(rule.body[0], rule.body_constant, head, tail)

    def score(self, rules: Rules, head: int, relation: int, tail: int, top: int) -> float:
        fired = sorted((r.confidence for r in map(rules.__getitem__, range(len(rules)))
                        if self.predicts(r, head, relation, tail)), reverse=True)
        return sum(-math.log(1 - confidence) for confidence in fired[:top])

    def mine(self, config: RulesConfig) -> set[tuple]:
        """(relation, body, constant, body constant, support, body size) of every rule, none cut off."""
        every = range(2 * self.r)
        found = set()
        pairs = list(itertools.permutations(range(self.n), 2))
        for hops in range(1, config.hops + 1):
            for body in itertools.product(every, repeat=hops):
                holds = [(x, y) for x, y in pairs if self.path_holds(body, x, y)]
                for relation in range(self.r):
                    if body != (relation,):
                        support = sum((x, relation, y) in self.facts for x, y in holds)
                        found.add((relation, body, NONE, NONE, support, len(holds)))
        if config.constants:
            for relation, c, body, other in itertools.product(every, range(self.n), every, [None, *range(self.n)]):
                if (relation, c) == (body, other):
                    continue
                holds = [x for x in range(self.n) if self.constant_holds(body, other, x, c)]
                support = sum((x, relation, c) in self.facts for x in holds)
                found.add((relation, (body,), c, NONE if other is None else other, support, len(holds)))
        return {
            rule for rule in found
            if rule[4] >= config.min_support and rule[4] / (rule[5] + config.pessimism) >= config.min_confidence
        }
