"""What a division into partitions is worth: how many triples cross it, how even it is, how much must be fetched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kgray.data.partition import Layout

if TYPE_CHECKING:
    from kgray.data.cells import CellTold


def partition_report(
    told: Sequence[CellTold], halo: Sequence[int], layout: Layout, partitioner: str, cuts: Sequence[float]
) -> dict[str, Any]:
    """The section ``partitions`` of audit.json, over the triples of train, valid and test (and support) as they lie.

    edge_cut: share of the triples whose tail is in another partition than their head. balance: the largest partition
    over the mean, in entities and in triples. halo: of a partition's own entities and those of others that are tails
    of its triples, the share of the others, whose vectors it must fetch; the argument holds their number. relations:
    how many occur in a partition, on average. passes: what each pass of a streaming partitioner left cut, of the votes
    it saw.
    """
    partitions = len(layout.ranges)
    triples, cut = np.zeros(partitions, dtype=np.int64), 0
    used = np.zeros((partitions, len(told[0].relations)), dtype=bool)
    for cell, one in enumerate(told):
        owner = layout.owners[cell]
        triples[owner] += int(one.audit.kept.sum()) + one.support.triples
        used[owner] |= one.relations
        cut += one.cut
    entities = np.asarray([end - start for start, end in layout.ranges])
    foreign = np.asarray(halo)
    shares = foreign / np.maximum(foreign + entities, 1)
    total = int(triples.sum())
    return {
        "partitioner": partitioner,
        "number": partitions,
        "edge_cut": round(cut / total, 6) if total else 0.0,
        "balance": {"entities": _balance(entities), "triples": _balance(triples)},
        "halo": {"mean": round(float(shares.mean()), 6), "max": round(float(shares.max()), 6)},
        "relations": round(float(used.sum(axis=1).mean()), 3),
        "triples": triples.tolist(),
        **({"passes": [round(share, 6) for share in cuts]} if cuts else {}),
    }


def _balance(sizes: Any) -> float:
    mean = float(sizes.mean())
    return round(float(sizes.max()) / mean, 6) if mean else 1.0
