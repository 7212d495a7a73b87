"""Link prediction as social networks measure it: links against pairs without one, by ROC-AUC and average precision.

The negatives of a query are drawn among its own candidates, and their scores read from the row the true answer is
ranked in. Uniform ones are any entity; hard ones lie two hops from the query's entity in the training graph, where
negatives look most like links (a model that only knows who is near whom scores 1 against uniform ones). Scores of all
queries are pooled, so they must mean the same in each: a model trained by a softmax is at a disadvantage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse

from kgray.evaluation.counts import SIDES
from kgray.evaluation.ranking import Scored
from kgray.model.candidates import mix

Ints = npt.NDArray[np.int64]
KINDS = ("uniform", "hard")
_TRIES = 8
"""Draws for one negative: known answers, and at two hops the entity itself, are thrown away."""
_DROPPED_BITS = 10


def adjacency(train: npt.NDArray[Any], num_entities: int) -> sparse.csr_array:
    """(N, N) float32: 1 where a training triple (n, 3) joins two different entities, either way round."""
    head, tail = np.concatenate([train[:, [0, 2]], train[:, [2, 0]]]).T
    apart = head != tail
    ones = np.ones(int(apart.sum()), dtype=np.float32)
    joined = sparse.csr_array((ones, (head[apart], tail[apart])), shape=(num_entities, num_entities))
    joined.sum_duplicates()
    joined.data[:] = 1.0
    return joined


def draw_negatives(scored: Scored, near: sparse.csr_array, count: int) -> dict[str, tuple[Ints, Ints]]:
    """Negatives of B entity queries: by kind (row, candidate), at most ``count`` of each kind a query, fewer where
    that many are not found. Decided by each query alone, however queries are cut into batches."""
    triples, width = scored.triples, scored.scores.shape[1]
    entity = triples[:, 0] if scored.side == "tail" else triples[:, 2]
    state = mix(np.full(len(triples), SIDES.index(scored.side), dtype=np.uint64), *triples.T)
    draws = np.stack([mix(state, np.full(len(state), n)) for n in range(2 * count * _TRIES)], axis=1)
    first, second = np.split(draws, 2, axis=1)
    uniform = (first % np.uint64(width)).astype(np.int64)
    middle, walked = _step(near, np.repeat(entity[:, None], first.shape[1], axis=1), first)
    end, on = _step(near, middle, second)
    found = {"uniform": (uniform, np.ones(uniform.shape, dtype=bool)), "hard": (end, walked & on)}
    known = scored.others_known().numpy()
    known[np.arange(len(triples)), scored.gold.numpy()] = True
    known[np.arange(len(triples)), entity] = True  # nobody is a negative of oneself
    return {kind: _kept(ids, good & ~np.take_along_axis(known, ids, 1), count) for kind, (ids, good) in found.items()}


def _step(near: sparse.csr_array, entities: Ints, draws: npt.NDArray[np.uint64]) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """A neighbour of each entity and whether it has any; arrays of any one shape."""
    start = near.indptr[entities].astype(np.int64)
    degree = near.indptr[entities + 1].astype(np.int64) - start
    place = start + (draws % np.maximum(degree, 1).astype(np.uint64)).astype(np.int64)
    if not near.nnz:
        return entities, degree > 0
    return near.indices[np.minimum(place, near.nnz - 1)].astype(np.int64), degree > 0


def _kept(ids: Ints, good: npt.NDArray[np.bool_], count: int) -> tuple[Ints, Ints]:
    """The first ``count`` different good ids of each row: (row, id)."""
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, 1)
    again = np.zeros_like(good)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
    good = good & ~again
    rows, columns = np.nonzero(good & (np.cumsum(good, axis=1) <= count))
    return rows, ids[rows, columns]


@dataclass(slots=True)
class LinkScores:
    """How often each score was given to true links and to negatives, by kind ("true", "uniform", "hard").

    tables: (score key, count), both (n,) int64. Keys keep the order of float32 scores but for their last 10 of 23
    binary digits, which bounds a table at 4 million rows however many queries there are. Sums are exact, whatever the
    order of the shards.
    """

    tables: dict[str, tuple[Ints, Ints]] = field(default_factory=dict)

    def see(self, scored: Scored, negatives: Mapping[str, tuple[Ints, Ints]], scores: torch.Tensor) -> None:
        """Add a batch: ``scores`` (B, C) of one model, at the gold answers and at the given negatives."""
        self._add("true", scores.gather(1, scored.gold[:, None]).squeeze(1))
        for kind, (rows, columns) in negatives.items():
            self._add(kind, scores[torch.from_numpy(rows), torch.from_numpy(columns)])

    def _add(self, kind: str, scores: torch.Tensor) -> None:
        bits = (scores.float().numpy() + np.float32(0.0)).view(np.int32).astype(np.int64)  # + 0.0: no negative zero
        ordered = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
        keys, counts = np.unique(ordered >> _DROPPED_BITS, return_counts=True)
        self._merge(kind, keys, counts.astype(np.int64))

    def _merge(self, kind: str, keys: Ints, counts: Ints) -> None:
        if kind in self.tables:
            own = self.tables[kind]
            keys, place = np.unique(np.concatenate([own[0], keys]), return_inverse=True)
            counts = np.bincount(place, np.concatenate([own[1], counts]), len(keys)).astype(np.int64)
        self.tables[kind] = (keys, counts)

    def __add__(self, other: LinkScores) -> LinkScores:
        total = LinkScores(dict(self.tables))
        for kind, table in other.tables.items():
            total._merge(kind, *table)
        return total

    def metrics(self, split: str) -> dict[str, float]:
        """``test.auc.uniform``, ``test.ap.uniform`` and so on; a kind without negatives is left out.

        AUC: the share of (link, negative) pairs where the link scores higher, ties counting half. Average precision:
        the mean, over links, of the precision at their score; chance is links / (links + negatives), which the number
        of negatives sets.
        """
        found = {}
        for kind in KINDS:
            if "true" in self.tables and kind in self.tables and self.tables[kind][1].sum():
                positive, negative = self._joint(kind)
                found[f"{split}.auc.{kind}"] = _auc(positive, negative)
                found[f"{split}.ap.{kind}"] = _average_precision(positive, negative)
        return found

    def _joint(self, kind: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Links and negatives at every score given to either, the highest first."""
        (true, links), (keys, counts) = self.tables["true"], self.tables[kind]
        scores = np.union1d(true, keys)
        out = np.zeros((2, len(scores)))
        out[0, np.searchsorted(scores, true)] = links
        out[1, np.searchsorted(scores, keys)] = counts
        return out[0, ::-1], out[1, ::-1]


def _auc(positive: npt.NDArray[np.float64], negative: npt.NDArray[np.float64]) -> float:
    above = np.cumsum(positive) - 0.5 * positive
    return float((above * negative).sum() / (positive.sum() * negative.sum()))


def _average_precision(positive: npt.NDArray[np.float64], negative: npt.NDArray[np.float64]) -> float:
    precision = np.cumsum(positive) / np.cumsum(positive + negative)
    return float((precision * positive).sum() / positive.sum())


class CommonNeighbours:
    """An entity by how many neighbours it shares with the query's entity, whatever the relation."""

    def __init__(self, train: Ints, num_entities: int, num_relations: int) -> None:
        self.num_entities, self.num_relations = num_entities, num_relations
        self.near = adjacency(train, num_entities)
        degree = np.diff(self.near.indptr).astype(np.float32)
        self.weighted = self.near.copy()
        self.weighted.data = self._weight(degree)[self.near.indices]

    def _weight(self, degree: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return np.ones_like(degree)

    def score_tails(self, heads: torch.Tensor, relations: torch.Tensor) -> torch.Tensor:
        """(B, N); an entity shares nothing with itself, where it would share most."""
        shared = (self.weighted[heads.numpy()] @ self.near).toarray().astype(np.float32)
        shared[np.arange(len(shared)), heads.numpy()] = 0.0
        return torch.from_numpy(shared)

    def score_heads(self, relations: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        """(B, N)."""
        return self.score_tails(tails, relations)


class AdamicAdar(CommonNeighbours):
    """The same, a shared neighbour of degree d counting 1 / log(d) (Adamic and Adar 2003)."""

    def _weight(self, degree: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        # One that is shared has two neighbours at least.
        return (1.0 / np.log(np.maximum(degree, 2.0))).astype(np.float32)
