"""Where the rules that can answer a query are looked up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from kgray.reasoning.facts import Facts, Int64, find, spread
from kgray.reasoning.fired import Fired
from kgray.reasoning.rules import NONE, Rules


@dataclass(frozen=True)
class Lookup:
    """Several values a key. keys: (k,) ascending; values of ``keys[i]``: ``values[offsets[i]:offsets[i + 1]]``."""

    keys: Int64
    offsets: Int64
    values: Int64

    @classmethod
    def build(cls, keys: Int64, values: Int64) -> Lookup:
        order = np.lexsort((values, keys))
        unique, first = np.unique(keys[order], return_index=True)
        return cls(unique, np.append(first, len(keys)).astype(np.int64), values[order])

    def get(self, keys: Int64) -> tuple[Int64, Int64]:
        """All values of all keys: (position in ``keys``, value)."""
        place = find(self.keys, keys)
        known = np.flatnonzero(place >= 0)
        start = self.offsets[place[known]]
        row, at = spread(start, self.offsets[place[known] + 1] - start)
        return known[row], self.values[at]


@dataclass(frozen=True)
class ConstantIndex:
    """Constant rules by what is known of a query.

    A feature of an entity is ``r' * (N + 1) + c'`` for each of its facts and ``r' * (N + 1) + N`` for "some".
    by_variable: ``feature * 2R + r`` of r(X, c) <- feature of X. by_both: ``feature * N + c``.
    by_constant: ``c * 2R + r``. features: those of each entity that some rule asks for.
    domains: (2R, N), the entities with a neighbour by each relation.
    """

    rules: Rules
    facts: Facts
    by_variable: Lookup
    by_both: Lookup
    by_constant: Lookup
    features: Lookup
    domains: sparse.csr_array

    @classmethod
    def build(cls, rules: Rules, facts: Facts) -> ConstantIndex:
        n, size = facts.num_entities, 2 * facts.num_relations
        own = np.flatnonzero(~rules.is_path)
        relation, c, body = rules.relation[own], rules.constant[own], rules.body[own, 0]
        other = rules.body_constant[own]
        feature = body * (n + 1) + np.where(other == NONE, n, other)
        domain, entity = np.divmod(np.flatnonzero(facts.degrees), max(n, 1))
        entities = np.concatenate([facts.heads, entity])
        features = np.concatenate([facts.relations * (n + 1) + facts.tails, domain * (n + 1) + n])
        asked = np.isin(features, feature)
        some = np.ones(len(entity), dtype=np.int64)
        return cls(
            rules=rules,
            facts=facts,
            by_variable=Lookup.build(feature * size + relation, own),
            by_both=Lookup.build(feature * n + c, own),
            by_constant=Lookup.build(c * size + relation, own),
            features=Lookup.build(entities[asked], features[asked]),
            domains=sparse.csr_array((some, (domain, entity)), shape=(size, n)),
        )

    def between(self, variables: Int64, constants: Int64) -> tuple[Int64, Int64]:
        """Rules r(X, c) whose body holds of the given X, for the given c: (query, rule), any r."""
        query, feature = self.features.get(variables)
        row, rule = self.by_both.get(feature * self.facts.num_entities + constants[query])
        query = query[row]
        kept = self._holds(variables[query], rule)
        return query[kept], rule[kept]

    def rows(self, entities: Int64, relations: Int64) -> Fired:
        """Rules that answer the queries (entity, relation 0..2R-1, ?), with the answers."""
        return Fired.join([self._of_variable(entities, relations), self._of_constant(entities, relations)])

    def _holds(self, x: Int64, rule: Int64) -> NDArray[np.bool_]:
        """Given that X has the rule's feature: X is not c, and "some Z" is one other than c."""
        c, body = self.rules.constant[rule], self.rules.body[rule, 0]
        some = self.rules.body_constant[rule] == NONE
        left = self.facts.degrees[body * self.facts.num_entities + x] - self.facts.contains(x, body, c)
        holds: NDArray[np.bool_] = (x != c) & (~some | (left > 0))
        return holds

    def _of_variable(self, entities: Int64, relations: Int64) -> Fired:
        query, feature = self.features.get(entities)
        row, rule = self.by_variable.get(feature * (2 * self.facts.num_relations) + relations[query])
        query = query[row]
        kept = self._holds(entities[query], rule)
        query, rule = query[kept], rule[kept]
        order = np.argsort(query, kind="stable")
        query, rule = query[order], rule[order]
        parts = (np.ones(len(rule), dtype=np.int64), self.rules.constant[rule], np.arange(len(rule) + 1))
        return Fired(query, rule, sparse.csr_array(parts, shape=(len(rule), self.facts.num_entities)))

    def _of_constant(self, entities: Int64, relations: Int64) -> Fired:
        """Here the query's entity is the constant, and the answers are all X with the feature."""
        facts, rules = self.facts, self.rules
        query, rule = self.by_constant.get(entities * (2 * facts.num_relations) + facts.inverse(relations))
        some = rules.body_constant[rule] == NONE
        one, any_of = np.flatnonzero(~some), np.flatnonzero(some)
        given = facts.inverse(rules.body[rule[one], 0]) * facts.num_entities + rules.body_constant[rule[one]]
        rows = sparse.csr_array(
            sparse.vstack([facts.matrix[given], self.domains[rules.body[rule[any_of], 0]]], format="csr")
        )
        order = np.concatenate([one, any_of])
        query, rule = query[order], rule[order]
        each = np.repeat(np.arange(len(rule)), np.diff(rows.indptr))
        rows.data[~self._holds(rows.indices.astype(np.int64), rule[each])] = 0
        rows.eliminate_zeros()
        back = np.argsort(query, kind="stable")
        return Fired(query[back], rule[back], rows[back])
