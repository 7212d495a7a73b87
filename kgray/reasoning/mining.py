"""Mining: path rules of one to three atoms; constant rules are in constants.py.

After AnyBURL (Meilicke et al., "Anytime Bottom-Up Rule Learning for Knowledge Graph Completion", IJCAI 2019), but
exhaustive where that is cheap. Bodies are found by walking round the facts of a relation; each is then measured on
every pair it holds of: support are the pairs that are facts, confidence = support / (pairs + pessimism). What is too
large is sampled: of a relation whose facts take more than ``max_walks`` steps, facts drawn by the seed are looked at;
a body that holds of more than ``max_groundings`` walks is measured on start entities drawn by the seed, support and
body size both being those of the sample. Draws depend on the relation or the body alone, so the rules of a relation
are the same whatever other relations are mined with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kgray.reasoning.config import RulesConfig
from kgray.reasoning.constants import Features, constant_rules
from kgray.reasoning.facts import Facts, Int64, find
from kgray.reasoning.measure import Measure
from kgray.reasoning.paths import paths_between, work
from kgray.reasoning.rules import HOPS, NONE, Rules, pack, unpack


def mine_rules(facts: Facts, config: RulesConfig, relations: Sequence[int] | None = None) -> Rules:
    """The rules that conclude the given real relations (all, where None), both directions.

    Raises ValueError for a relation that is not a real one.
    """
    wanted = np.unique(np.arange(facts.num_relations) if relations is None else np.asarray(relations, dtype=np.int64))
    if len(wanted) and (wanted[0] < 0 or wanted[-1] >= facts.num_relations):
        raise ValueError(f"relations {wanted.tolist()}, expected some of 0..{facts.num_relations - 1}")
    parts = [_single_atoms(facts, config, wanted)]
    parts += [_longer(facts, config, wanted, length) for length in range(2, config.hops + 1)]
    if config.constants:
        features = Features.build(facts)
        both = np.concatenate([wanted, wanted + facts.num_relations])
        parts += [constant_rules(facts, config, features, relation) for relation in both.tolist()]
    return Rules.join(parts)


def path_rules(
    config: RulesConfig, relation: Int64, body: Int64, support: Int64, body_size: Int64, most: int
) -> Rules:
    """Those with enough support and confidence, for each relation at most ``most``."""
    absent = np.full(len(relation), NONE, dtype=np.int64)
    padded = np.full((len(relation), HOPS), NONE, dtype=np.int64)
    padded[:, : body.shape[1]] = body
    confidence = support / (body_size + config.pessimism)
    kept = (support >= config.min_support) & (confidence >= config.min_confidence)
    rules = Rules(relation, padded, absent, absent, support, body_size, confidence).take(kept)
    return rules_at_most(rules.ordered(), most)


def rules_at_most(rules: Rules, most: int) -> Rules:
    """The first ``most`` of each relation, rules being ordered and all of one kind."""
    start = np.searchsorted(rules.relation, rules.relation)
    return rules.take(np.arange(len(rules)) - start < most)


def _single_atoms(facts: Facts, config: RulesConfig, wanted: Int64) -> Rules:
    """Equivalent, subsumed, symmetric and inverse: r(X, Y) <- r'(X, Y), r' another relation or a reciprocal."""
    _, conclusion, body = facts.together
    kept = (conclusion != body) & np.isin(conclusion, wanted)
    size = 2 * facts.num_relations
    keys, support = np.unique(conclusion[kept] * size + body[kept], return_counts=True)
    conclusion, body = np.divmod(keys, max(size, 1))
    return path_rules(config, conclusion, body[:, None], support, facts.sizes[body], config.max_rules)


def _longer(facts: Facts, config: RulesConfig, wanted: Int64, length: int) -> Rules:
    found = [_candidates(facts, config, relation, length) for relation in wanted.tolist()]
    relation = np.repeat(wanted, [len(bodies) for bodies in found])
    keys = np.concatenate([np.zeros(0, dtype=np.int64), *found])
    unique = np.unique(keys)
    which = find(unique, keys)
    order = np.argsort(which, kind="stable")
    relation, which = relation[order], which[order]
    support, size = Measure(facts, config).measure(unpack(facts.num_relations, unique, length), relation, which)
    bodies = unpack(facts.num_relations, keys[order], length)
    return path_rules(config, relation, bodies, support, size, config.max_rules)


def _candidates(facts: Facts, config: RulesConfig, relation: int, length: int) -> Int64:
    """Packed bodies seen most often around facts of the relation, ties by their number."""
    own = np.flatnonzero(facts.relations == relation)
    draw = np.random.default_rng([config.seed, relation, length])
    own = own[draw.permutation(len(own))]
    spent = np.cumsum(work(facts, facts.heads[own], facts.tails[own], length))
    looked = int(np.searchsorted(spent, config.max_walks, side="right"))
    whole = looked >= len(own)
    own = own[: max(looked, 1)]
    counts = np.zeros(0, dtype=np.int64)
    keys = np.zeros(0, dtype=np.int64)
    for part in _split(own, 1 << 13):
        _, bodies = paths_between(facts, facts.heads[part], facts.tails[part], length).bodies(facts)
        seen, times = np.unique(pack(facts.num_relations, bodies), return_counts=True)
        keys, inverse = np.unique(np.concatenate([keys, seen]), return_inverse=True)
        counts = np.bincount(inverse, weights=np.concatenate([counts, times]), minlength=len(keys)).astype(np.int64)
    least = config.min_support if whole else 1
    keys, counts = keys[counts >= least], counts[counts >= least]
    return np.sort(keys[np.lexsort((keys, -counts))[: config.max_candidates]])


def _split(array: Int64, size: int) -> Iterator[Int64]:
    for start in range(0, len(array), size):
        yield array[start : start + size]
