"""Splits by entity: some entities are held out of training as a whole, with some of their edges known at inference.

The inductive setting of Hamaguchi et al. 2017 and Daza et al. 2021 (BLP), with support edges: which split a triple is
in follows from hashes of its entities and of itself, so every task that reads some rows draws alike, without a shuffle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kgray.data.config import SPLITS, STORED, SUPPORT, SplitConfig
from kgray.data.dictionary import I64, U64, hash_triples, mix, split_of

if TYPE_CHECKING:
    from kgray.data.triples import Triples

_SUPPORT = STORED.index(SUPPORT)


def split_by_entity(
    entities: U64, heads: I64, relations: U64, tails: I64, config: SplitConfig
) -> npt.NDArray[np.int8]:
    """The split of each of n triples, (n,) int8 in STORED.

    entities: (u,) hashes of entities; heads, tails: (n,) positions in it; relations: (n,) hashes.
    """
    group = split_of(entities, config.seed, config.valid, config.test)
    splits = np.maximum(group[heads], group[tails])  # test wins over validation
    h, t = entities[heads], entities[tails]
    if config.keep_pairs:
        hashes = mix(np.maximum(h, t) + mix(np.minimum(h, t)))
    else:
        hashes = hash_triples(h, relations, t)
    known = split_of(hashes, config.seed, config.support, 0.0) > 0
    splits[known & (splits > 0)] = _SUPPORT
    return splits


@dataclass
class SupportAudit:
    """Counts of one partition of a graph with held-out entities.

    triples: support triples whose head is in it. entities (3,): of each of SPLITS, its entities that no training triple
    holds; supported (3,): those of them with support triples. only_support: entities in no other split.
    """

    triples: int
    entities: I64
    supported: I64
    only_support: int

    @classmethod
    def of(cls, own: Triples, foreign: Triples, span: tuple[int, int]) -> SupportAudit:
        """Of triples without duplicates: those with their head in ``span``, and those with their tail alone."""
        touched = [_touched(own, foreign, span, split) for split in range(len(STORED))]
        support = touched[_SUPPORT]
        unseen = [one & ~touched[0] for one in touched[: len(SPLITS)]]
        return cls(
            triples=int((own.split == _SUPPORT).sum()),
            entities=np.asarray([int(one.sum()) for one in unseen]),
            supported=np.asarray([int((one & support).sum()) for one in unseen]),
            only_support=int((support & ~np.logical_or.reduce(touched[: len(SPLITS)])).sum()),
        )


def support_report(parts: Sequence[SupportAudit]) -> dict[str, Any]:
    """The section ``support`` of audit.json."""
    entities = np.sum([part.entities for part in parts], axis=0)
    supported = np.sum([part.supported for part in parts], axis=0)
    return {
        "triples": sum(part.triples for part in parts),
        "only_support_entities": sum(part.only_support for part in parts),
        "unseen_entities": {
            split: {"total": int(entities[s]), "without_support": int(entities[s] - supported[s])}
            for s, split in enumerate(SPLITS)
            if s
        },
    }


def add_support(told: dict[str, Any], support: dict[str, Any]) -> None:
    """Put the section into audit.json as told of the other splits."""
    told["support"] = support
    told["entities"]["without_triples"] -= support["only_support_entities"]


def _touched(own: Triples, foreign: Triples, span: tuple[int, int], split: int) -> npt.NDArray[np.bool_]:
    """Which entities of a span a triple of a split holds; (end - start,) bool."""
    found = np.zeros(span[1] - span[0], dtype=bool)
    for side in (own.head[own.split == split], own.tail[own.split == split], foreign.tail[foreign.split == split]):
        found[side[(side >= span[0]) & (side < span[1])] - span[0]] = True
    return found
