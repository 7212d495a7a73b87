"""The audit of a graph: what would make its figures look better, or worse, than they are.

Every partition counts what touches its entities, the driver adds up. Exact, after duplicates are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kgray.data.config import SPLITS
from kgray.data.triples import I64, Bools, Triples, concat

MIN_SUPPORT = 2
"""Training triples a relation must repeat the wrong way round to be called symmetric, or another's inverse."""
MIN_CONFIDENCE = 0.5
"""And their share of the relation's training triples: the rule is right more often than not."""


@dataclass
class PartAudit:
    """Counts of one partition. Splits are in the order train, valid, test; pairs train-valid, train-test,
    valid-test. Triples are those whose head is in the partition."""

    kept: I64
    duplicates: I64
    overlap: I64
    loops: I64
    relations: I64
    """(R, 3) triples by relation and split."""
    degrees: tuple[I64, I64]
    """Training degrees and how many entities have them."""
    hubs: list[tuple[int, int]]
    """(degree, entity) of the largest."""
    unseen: I64
    """(3,) entities of a split that no training triple holds."""
    without_triples: int
    reversed_pairs: tuple[I64, I64]
    """Codes r1 * R + r2 and the number of training triples (h, r1, t), h != t, with (t, r2, h) in training."""
    forward: I64
    """(R,) training triples with h != t: what confidence is a share of."""
    seen: Bools
    """Which entities of the part a training triple holds; not sent to the driver."""


def audit_part(
    own: Triples, foreign: Triples, dropped: npt.NDArray[np.int8], overlap: I64, span: tuple[int, int], relations: int
) -> PartAudit:
    """First pass over one part of the entities, ``span``. own, foreign: triples without duplicates, those with their
    head in it and those with their tail alone; dropped: the splits of own triples that were duplicates; overlap: see
    :func:`overlaps`."""
    start, end = span
    inside = (own.tail >= start) & (own.tail < end)
    in_split: list[Bools] = []
    degree: I64 = np.empty(0, dtype=np.int64)
    for s in range(3):
        mine, others = own.split == s, foreign.split == s
        count = np.bincount(own.head[mine] - start, minlength=end - start)
        count += np.bincount(own.tail[mine & inside] - start, minlength=end - start)
        count += np.bincount(foreign.tail[others] - start, minlength=end - start)
        in_split.append(count > 0)
        degree = count if s == 0 else degree
    straight = own.head != own.tail
    train_own = own[(own.split == 0) & straight]
    backward = concat([own[(own.split == 0) & straight & inside], foreign[foreign.split == 0]])
    x, y = _matches(train_own, backward, start)
    codes = train_own.relation[x].astype(np.int64) * relations + backward.relation[y]
    by_relation = np.bincount(own.relation.astype(np.int64) * 3 + own.split, minlength=3 * relations)
    values, counts = np.unique(degree, return_counts=True)
    return PartAudit(
        kept=np.bincount(own.split, minlength=3),
        duplicates=np.bincount(dropped, minlength=3),
        overlap=overlap,
        loops=np.bincount(own.split[~straight], minlength=3),
        relations=by_relation.reshape(relations, 3),
        degrees=(values, counts),
        hubs=_largest(degree, start),
        unseen=np.asarray([int((touched & ~in_split[0]).sum()) for touched in in_split]),
        without_triples=int((~(in_split[0] | in_split[1] | in_split[2])).sum()),
        reversed_pairs=_unique_counts(codes),
        forward=np.bincount(train_own.relation, minlength=relations).astype(np.int64),
        seen=in_split[0],
    )


def _largest(degree: I64, start: int) -> list[tuple[int, int]]:
    """(degree, entity) of the ten largest."""
    if len(degree) > 1000:
        among = np.flatnonzero(degree >= np.partition(degree, -10)[-10])
    else:
        among = np.arange(len(degree))
    top = among[np.lexsort((among, -degree[among]))[:10]]
    return [(int(degree[n]), int(n + start)) for n in top if degree[n]]


def overlaps(keys: I64) -> I64:
    """Triples in two splits: train-valid, train-test, valid-test, (3,). keys: sorted, four times a number of the triple
    plus its split, each once."""
    facts = keys >> 2
    new = np.ones(len(keys), dtype=bool)
    new[1:] = facts[1:] != facts[:-1]
    starts = np.flatnonzero(new)
    if not len(starts):
        return np.zeros(3, dtype=np.int64)
    splits = np.bitwise_or.reduceat(np.left_shift(1, keys & 3), starts)
    return np.asarray([int(((splits & pair) == pair).sum()) for pair in (3, 5, 6)])


def may_meet(left: I64, right: I64) -> tuple[Bools, Bools]:
    """Which of two lists of keys may be in the other one too: all that are, and few that are not. A filter of one hash
    (Bloom 1970), for where most are in one list alone."""
    bits = min(24, max(10, (8 * max(len(left), len(right), 1)).bit_length()))
    places = [
        ((keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - bits)).astype(np.int64)
        for keys in (left, right)
    ]
    marked = np.zeros(1 << bits, dtype=bool)
    marked[places[1]] = True
    in_left = marked[places[0]]
    marked[:] = False
    marked[places[0][in_left]] = True
    return in_left, marked[places[1]]


def _matches(forward: Triples, backward: Triples, start: int) -> tuple[I64, I64]:
    """All (row of forward, row of backward) with (h, t) = (t', h'); heads of ``forward`` lie in the partition."""
    width = 1 + int(max(forward.tail.max(initial=0), backward.head.max(initial=0)))
    wanted = (forward.head - start) * width + forward.tail
    keys = (backward.tail - start) * width + backward.head
    left, right = (np.flatnonzero(mask) for mask in may_meet(wanted, keys))
    wanted, keys = wanted[left], keys[right]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    low, high = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
    counts = high - low
    x = np.repeat(np.arange(len(wanted)), counts)
    y = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(low, counts)
    return left[x], right[order[y]]


def _unique_counts(codes: I64, weights: I64 | None = None) -> tuple[I64, I64]:
    values, inverse = np.unique(codes, return_inverse=True)
    counts = np.bincount(inverse, weights=weights, minlength=len(values))
    return values.astype(np.int64), counts.astype(np.int64)


@dataclass(frozen=True)
class Rule:
    """(h, body, t) in training makes (t, head, h) likely. Symmetric where body is head."""

    body: int
    head: int
    support: int
    confidence: float


def find_rules(parts: Sequence[PartAudit], relations: int) -> list[Rule]:
    """The rules the training triples bear out, strongest first."""
    codes, counts = _unique_counts(
        np.concatenate([part.reversed_pairs[0] for part in parts]),
        np.concatenate([part.reversed_pairs[1] for part in parts]),
    )
    forward = np.sum([part.forward for part in parts], axis=0)
    rules = [
        Rule(int(code // relations), int(code % relations), int(n), float(n / forward[code // relations]))
        for code, n in zip(codes, counts, strict=True)
        if n >= MIN_SUPPORT and n >= MIN_CONFIDENCE * forward[code // relations]
    ]
    return sorted(rules, key=lambda rule: (-rule.confidence, -rule.support, rule.body, rule.head))


@dataclass
class HeldOut:
    """Second pass: what training already tells of the held-out triples of one partition, by split (3,)."""

    answered: I64
    reverse_in_train: I64
    unseen_entity: I64


def audit_held_out(
    triples: Triples, span: tuple[int, int], seen: Bools, rules: Sequence[Rule], relations: int
) -> HeldOut:
    """triples: as in the first pass; seen: (N,) bool, whether a training triple holds the entity."""
    start, end = span
    held = triples[(triples.head >= start) & (triples.head < end) & (triples.split > 0)]
    backward = triples[(triples.split == 0) & (triples.tail >= start) & (triples.tail < end)]
    straight = np.flatnonzero(held.head != held.tail)
    x, y = _matches(held[straight], backward, start)
    x = straight[x]
    by_rule = np.asarray(sorted(rule.body * relations + rule.head for rule in rules), dtype=np.int64)
    codes = backward.relation[y].astype(np.int64) * relations + held.relation[x]
    reverse, answered = np.zeros(len(held), dtype=bool), np.zeros(len(held), dtype=bool)
    reverse[x] = True
    answered[x[np.isin(codes, by_rule)]] = True
    unseen = ~(seen[held.head] & seen[held.tail])
    counts = [np.bincount(held.split[mask], minlength=3) for mask in (answered, reverse, unseen)]
    return HeldOut(*counts)


@dataclass
class TextAudit:
    """What is missing of the texts."""

    missing_name: int = 0
    missing_description: int = 0
    missing_text: int = 0
    duplicate_names: int = 0
    entities_with_duplicate_name: int = 0
    relations_without_text: list[str] = field(default_factory=list)
    relation_names_shared: list[str] = field(default_factory=list)


def report(
    parts: Sequence[PartAudit],
    held: Sequence[HeldOut],
    rules: Sequence[Rule],
    relations: Sequence[str],
    text: TextAudit,
    moved_to_train: int | None,
    entity_names: dict[int, str],
) -> dict[str, Any]:
    """audit.json. ``entity_names``: the external ids of the hubs."""
    total = _sum(part.kept for part in parts)
    unseen = _sum(part.unseen for part in parts)
    by_relation = _sum(part.relations for part in parts)
    told: dict[str, Any] = {
        "triples": _by_split(total),
        "duplicates": _by_split(_sum(part.duplicates for part in parts)),
        "loops": _by_split(_sum(part.loops for part in parts)),
        "overlap": dict(
            zip(
                ("train_valid", "train_test", "valid_test"),
                _ints(_sum(p.overlap for p in parts)),
                strict=True,
            )
        ),
        "entities": {
            "total": int(sum(int(part.degrees[1].sum()) for part in parts)),
            "without_triples": sum(part.without_triples for part in parts),
            "missing_name": text.missing_name,
            "missing_description": text.missing_description,
            "missing_text": text.missing_text,
            "duplicate_names": text.duplicate_names,
            "entities_with_duplicate_name": text.entities_with_duplicate_name,
        },
        "unseen": {
            split: {
                "entities": int(unseen[s]),
                "triples": int(sum(int(h.unseen_entity[s]) for h in held)),
                "relations": [
                    relations[r] for r in map(int, np.flatnonzero((by_relation[:, s] > 0) & (by_relation[:, 0] == 0)))
                ],
            }
            for s, split in enumerate(SPLITS)
            if s
        },
        "relations": {
            "total": len(relations),
            "without_text": text.relations_without_text,
            "shared_names": text.relation_names_shared,
            "triples": {name: _by_split(by_relation[r]) for r, name in enumerate(relations)},
        },
        **_rules(rules, relations),
        "trivial_rule": _trivial(held, total),
        "degree": _degrees(parts, entity_names),
    }
    if moved_to_train is not None:
        told["moved_to_train"] = moved_to_train
    return told


def hubs(parts: Sequence[PartAudit]) -> list[tuple[int, int]]:
    """(degree, entity) of the ten entities of the largest training degree."""
    return sorted((hub for part in parts for hub in part.hubs), key=lambda hub: (-hub[0], hub[1]))[:10]


def _rules(rules: Sequence[Rule], relations: Sequence[str]) -> dict[str, Any]:
    def told(rule: Rule) -> dict[str, Any]:
        return {"support": rule.support, "confidence": round(rule.confidence, 6)}

    return {
        "symmetric": [{"relation": relations[r.body], **told(r)} for r in rules if r.body == r.head],
        "inverse": [
            {"relation": relations[r.body], "inverse": relations[r.head], **told(r)} for r in rules if r.body != r.head
        ],
    }


def _trivial(held: Sequence[HeldOut], total: I64) -> dict[str, Any]:
    answered = _sum(part.answered for part in held)
    reverse = _sum(part.reverse_in_train for part in held)
    return {
        SPLITS[s]: {
            "triples": int(total[s]),
            "answered": int(answered[s]),
            "share": round(float(answered[s] / total[s]), 6) if total[s] else 0.0,
            "reverse_in_train": int(reverse[s]),
        }
        for s in (1, 2)
    }


def _degrees(parts: Sequence[PartAudit], entity_names: dict[int, str]) -> dict[str, Any]:
    degrees, counts = _unique_counts(
        np.concatenate([part.degrees[0] for part in parts]),
        np.concatenate([part.degrees[1] for part in parts]),
    )
    number = int(counts.sum())
    if not number:
        return {}
    upto = np.cumsum(counts)
    quantile = {
        name: int(degrees[np.searchsorted(upto, share * number, side="left")])
        for name, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99))
    }
    return {
        "min": int(degrees[0]),
        "mean": round(float((degrees * counts).sum() / number), 6),
        **quantile,
        "max": int(degrees[-1]),
        "hubs": [{"entity": entity_names.get(entity, str(entity)), "degree": n} for n, entity in hubs(parts)],
    }


def _sum(values: Iterable[npt.NDArray[Any]]) -> I64:
    return np.asarray(np.sum(list(values), axis=0), dtype=np.int64)


def _ints(values: I64) -> list[int]:
    return [int(value) for value in values]


def _by_split(values: I64) -> dict[str, int]:
    return dict(zip(SPLITS, _ints(values), strict=True))
