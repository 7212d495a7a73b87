"""Scores by rules: noisy-or over the most confident rules that fire, in its additive form.

A candidate's score is the sum of -log(1 - confidence) over the ``top`` most confident rules that predict it from the
facts given, 0 where none does: 1 - exp(-score) is the noisy-or, and the score is exactly its rules' contributions.
A rule predicts a triple, whichever of its ends is asked for: the two directions of a triple have one score, and a
relation's score is that of the triple it makes.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kgray.reasoning.facts import Facts, Int64
from kgray.reasoning.fired import Fired
from kgray.reasoning.indexes import ConstantIndex, Lookup
from kgray.reasoning.paths import paths_between
from kgray.reasoning.rules import HOPS, Rules, pack
from kgray.reasoning.trie import Trie

_QUERIES = 64
Float32 = NDArray[np.float32]


class RuleScorer:
    """Implements the Scorer protocol of kgray/model/bundle.py over the rules and facts given.

    The facts need not be those the rules were mined on: :meth:`over` takes any, so that some can be deleted and the
    rest scored again.
    """

    tasks = ("tail", "head", "relation")

    def __init__(self, rules: Rules, facts: Facts, top: int = 5) -> None:
        """Raises ValueError for rules that speak of relations or entities the facts cannot have."""
        if top < 1:
            raise ValueError(f"top {top}, expected a positive number of rules")
        size = 2 * facts.num_relations
        for what, ids, limit in (
            ("relation", rules.relation, size),
            ("relation", rules.body, size),
            ("entity", rules.constant, facts.num_entities),
            ("entity", rules.body_constant, facts.num_entities),
        ):
            if ids.size and int(ids.max()) >= limit:
                raise ValueError(f"a rule names {what} {int(ids.max())}, the facts have 0..{limit - 1}")
        self.rules = rules
        self.facts = facts
        self.top = top
        self.weights: Float32 = -np.log1p(-rules.confidence).astype(np.float32)
        order = np.lexsort((np.arange(len(rules)), -rules.confidence))
        self._rank = np.empty(len(rules), dtype=np.int64)
        self._rank[order] = np.arange(len(rules))

    @classmethod
    def over(cls, rules: Rules, triples: Int64, num_entities: int, num_relations: int, top: int = 5) -> RuleScorer:
        """A scorer that grounds the rules on ``triples`` (n, 3) and nothing else."""
        return cls(rules, Facts.build(triples, num_entities, num_relations), top)

    @property
    def num_entities(self) -> int:
        return self.facts.num_entities

    @property
    def num_relations(self) -> int:
        return self.facts.num_relations

    def score_tails(self, heads: Tensor, relations: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, N) float32."""
        return self._score(_ids(heads), _ids(relations))

    def score_heads(self, relations: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, N) float32."""
        return self._score(_ids(tails), _ids(relations) + self.num_relations)

    def score_relations(self, heads: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, R) float32."""
        query, rule, relation = self.fired(_ids(heads), _ids(tails))
        scores = np.zeros((len(heads), self.num_relations), dtype=np.float32)
        self._add(scores.reshape(-1), query * self.num_relations + relation, rule)
        return torch.from_numpy(scores)

    def score_triples(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 3 -> (B,) float32."""
        query, rule, relation = self.fired(_ids(heads), _ids(tails))
        asked = relation == _ids(relations)[query]
        scores = np.zeros(len(heads), dtype=np.float32)
        self._add(scores, query[asked], rule[asked])
        return torch.from_numpy(scores)

    def fired(self, heads: Int64, tails: Int64) -> tuple[Int64, Int64, Int64]:
        """Every rule that predicts any relation from head to tail: (query, rule, real relation), (n,) int64 each."""
        facts, rules = self.facts, self.rules
        queries, fired = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for length, bodies in self._bodies.items():
            query, body = paths_between(facts, heads, tails, length).bodies(facts)
            row, rule = bodies.get(pack(facts.num_relations, body))
            queries.append(query[row])
            fired.append(rule)
        for variable, constant, reciprocal in ((heads, tails, False), (tails, heads, True)):
            query, rule = self._constants.between(variable, constant)
            chosen = (rules.relation[rule] >= self.num_relations) == reciprocal
            queries.append(query[chosen])
            fired.append(rule[chosen])
        query, rule = np.concatenate(queries), np.concatenate(fired)
        return query, rule, rules.relation[rule] % max(self.num_relations, 1)

    def ranked(self, rules: Int64) -> Int64:
        """The given rules, the most confident first."""
        return rules[np.argsort(self._rank[rules])]

    @cached_property
    def _bodies(self) -> dict[int, Lookup]:
        found = {}
        for length in range(1, HOPS + 1):
            own = np.flatnonzero(self.rules.is_path & (self.rules.hops == length))
            if len(own):
                found[length] = Lookup.build(pack(self.num_relations, self.rules.body[own, :length]), own)
        return found

    @cached_property
    def _trie(self) -> Trie:
        return Trie(self.rules, self.facts)

    @cached_property
    def _constants(self) -> ConstantIndex:
        return ConstantIndex.build(self.rules, self.facts)

    def _add(self, scores: Float32, cells: Int64, rules: Int64) -> None:
        """Add to each cell its ``top`` rules, in falling order: sums are the same to the last bit in every batch."""
        order = np.lexsort((self._rank[rules], cells))
        cells, rules = cells[order], rules[order]
        place = np.arange(len(cells)) - np.searchsorted(cells, cells)
        for number in range(self.top):
            chosen = place == number
            scores[cells[chosen]] += self.weights[rules[chosen]]

    def _score(self, entities: Int64, relations: Int64) -> Tensor:
        self._check(entities, relations)
        scores = np.zeros((len(entities), self.num_entities), dtype=np.float32)
        for start in range(0, len(entities), _QUERIES):
            stop = min(start + _QUERIES, len(entities))
            constant = self._constants.rows(entities[start:stop], relations[start:stop])
            for low, high, paths in self._trie.rows(entities[start:stop], relations[start:stop]):
                fired = Fired.join([paths, constant.between(low, high)]).ordered(self._rank)
                for query in range(low, high):
                    self._sum(scores[start + query], fired.between(query, query + 1))
        return torch.from_numpy(scores)

    def _sum(self, scores: Float32, fired: Fired) -> None:
        """Scores (N,) of one query from its fired rules, the most confident first."""
        if not len(fired.rule):
            return
        weights = self.weights[fired.rule]
        # By candidate: of each the rules that predict it, still the most confident first.
        columns = fired.rows.tocsc()
        reached = np.flatnonzero(np.diff(columns.indptr))
        place, end = columns.indptr[reached], columns.indptr[reached + 1]
        for _ in range(self.top):
            scores[reached] += weights[columns.indices[place]]
            place = place + 1
            more = place < end
            reached, place, end = reached[more], place[more], end[more]

    def _check(self, entities: Int64, relations: Int64) -> None:
        for what, ids, limit in (
            ("entity", entities, self.num_entities),
            ("relation", relations, 2 * self.num_relations),
        ):
            if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= limit):
                raise ValueError(f"{what} id outside 0..{limit - 1}")


def _ids(tensor: Tensor) -> Int64:
    return tensor.detach().cpu().numpy().astype(np.int64)

