"""Constant rules: r(X, c) <- r'(X, c') and r(X, c) <- r'(X, some Z), AnyBURL's two acyclic kinds of one atom.

The second kind asks for a Z other than c, and the first never repeats its own conclusion, so that no body holds the
fact it predicts. Counted whole, by products of entity-by-feature incidence matrices, features being (r', c').
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from kgray.reasoning.config import RulesConfig
from kgray.reasoning.facts import Facts, Int64, find
from kgray.reasoning.rules import HOPS, NONE, Rules

_ENTRIES = 1 << 23


@dataclass(frozen=True)
class Features:
    """What is true of single entities, as columns over N entities.

    keys: (f,) int64 ascending, ``r' * N + c'``. matrix: (N, f) incidence by column. rows: the same by row.
    domains: (N, 2R), whether an entity has any r'-neighbour. domain_sizes: (2R,) entities that do.
    sole: (f,) int64, of how many entities c' is the one r'-neighbour.
    sole_keys, sole_counts: ascending ``(r * 2R + r') * N + c``, and of how many X with r(X, c) c is the one
    r'-neighbour.
    """

    keys: Int64
    matrix: sparse.csc_array
    rows: sparse.csr_array
    domains: sparse.csr_array
    domain_sizes: Int64
    sole: Int64
    sole_keys: Int64
    sole_counts: Int64

    @classmethod
    def build(cls, facts: Facts) -> Features:
        n, size = facts.num_entities, 2 * facts.num_relations
        keys, column = np.unique(facts.relations * n + facts.tails, return_inverse=True)
        ones = np.ones(len(column), dtype=np.int64)
        rows = sparse.csr_array((ones, (facts.heads, column)), shape=(n, len(keys)))
        relation, entity = np.divmod(np.flatnonzero(facts.degrees), max(n, 1))
        some = np.ones(len(entity), dtype=np.int64)
        alone = facts.degrees[facts.relations * n + facts.heads] == 1
        pairs, a, b = facts.together
        x, c = np.divmod(facts.pair_keys[pairs], max(n, 1))
        only = facts.degrees[b * n + x] == 1
        sole_keys, sole_counts = np.unique(((a * size + b) * n + c)[only], return_counts=True)
        return cls(
            keys=keys,
            matrix=rows.tocsc(),
            rows=rows,
            domains=sparse.csr_array((some, (entity, relation)), shape=(n, size)),
            domain_sizes=np.bincount(relation, minlength=size),
            sole=np.bincount(column[alone], minlength=len(keys)),
            sole_keys=sole_keys,
            sole_counts=sole_counts,
        )


def constant_rules(facts: Facts, config: RulesConfig, features: Features, relation: int) -> Rules:
    """The constant rules that conclude ``relation`` (0..2R-1), the most confident."""
    low, high = np.searchsorted(features.keys, np.array([relation, relation + 1]) * facts.num_entities)
    counts = np.diff(features.matrix.indptr)[low:high]
    targets = low + np.flatnonzero(counts >= config.min_support)
    found = [Rules.empty()]
    for part in _parts(features, targets):
        found += [_of_one_fact(facts, config, features, part), _of_some_fact(facts, config, features, part)]
        # Cut as it grows: hubs have millions, of which thousands are wanted.
        rules = Rules.join(found)
        found = [rules.take(np.arange(min(len(rules), config.max_constant_rules)))]
    return found[0]


def _best(rules: Rules, most: int) -> Rules:
    """All that may be among the ``most`` confident; ordering so many rules to find out would take longer."""
    if len(rules) <= most:
        return rules
    return rules.take(rules.confidence >= np.partition(rules.confidence, -most)[-most])


def _parts(features: Features, targets: Int64) -> Iterator[Int64]:
    """Targets in pieces of bounded work: the facts of all entities X that have the target."""
    degrees = np.diff(features.rows.indptr)
    sums = np.concatenate([[0], np.cumsum(degrees[features.matrix.indices])])
    work = sums[features.matrix.indptr[targets + 1]] - sums[features.matrix.indptr[targets]]
    piece = np.cumsum(work) // _ENTRIES
    for number in np.unique(piece):
        yield targets[piece == number]


def _of_one_fact(facts: Facts, config: RulesConfig, features: Features, targets: Int64) -> Rules:
    """r(X, c) <- r'(X, c')."""
    counts = sparse.coo_array(features.matrix[:, targets].T.tocsr() @ features.rows)
    kept = counts.data >= config.min_support
    target, body = targets[counts.row[kept]], counts.col[kept].astype(np.int64)
    support = counts.data[kept]
    others = target != body
    target, body, support = target[others], body[others], support[others]
    c = features.keys[target] % facts.num_entities
    relation, body_constant = np.divmod(features.keys[body], facts.num_entities)
    # X is not c, even where c itself has the feature.
    size = np.diff(features.matrix.indptr)[body] - facts.contains(c, relation, body_constant)
    return _rules(facts, config, features.keys[target], relation, body_constant, support, size)


def _of_some_fact(facts: Facts, config: RulesConfig, features: Features, targets: Int64) -> Rules:
    """r(X, c) <- r'(X, some Z), Z not c."""
    n, width = facts.num_entities, 2 * facts.num_relations
    counts = sparse.coo_array(features.matrix[:, targets].T.tocsr() @ features.domains)
    target, body = features.keys[targets[counts.row]], counts.col.astype(np.int64)
    relation, c = np.divmod(target, n)
    found = find(features.sole_keys, (relation * width + body) * n + c)
    support = counts.data.copy()
    support[found >= 0] -= features.sole_counts[found[found >= 0]]
    sole = find(features.keys, body * n + c)
    size = features.domain_sizes[body] - (facts.degrees[body * n + c] > 0)
    size[sole >= 0] -= features.sole[sole[sole >= 0]]
    return _rules(facts, config, target, body, np.full(len(body), NONE, dtype=np.int64), support, size)


def _rules(
    facts: Facts, config: RulesConfig, target: Int64, body: Int64, body_constant: Int64, support: Int64, size: Int64
) -> Rules:
    confidence = support / (size + config.pessimism)
    kept = (support >= config.min_support) & (confidence >= config.min_confidence)
    relation, c = np.divmod(target, max(facts.num_entities, 1))
    padded = np.full((len(body), HOPS), NONE, dtype=np.int64)
    padded[:, 0] = body
    rules = Rules(relation, padded, c, body_constant, support, size, confidence).take(kept)
    return _best(rules, config.max_constant_rules)
