"""What needs no learning: scorers that count the facts known when a question is asked (training triples, and support
where entities are held out), ranked by the same evaluator as the model.

A model is worth its cost only above these. They know nothing of text and nothing of the graph beyond one
edge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kgray.evaluation.counts import SIDES, distinct_triples
from kgray.evaluation.links import AdamicAdar, CommonNeighbours
from kgray.evaluation.ranking import Scorer

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
_PSEUDO = 5.0  # best on the validation splits of WN18RR and FB15k-237 among 1, 2, 5, 10


@dataclass(frozen=True, slots=True)
class Baseline:
    """A named scorer, the tasks it answers, and what it does in one sentence. links: whether it only makes sense where
    links are predicted, see ``evaluate.link_negatives``."""

    name: str
    tasks: tuple[str, ...]
    meaning: str
    build: type[Any]
    links: bool = False

    def scorer(self, train: npt.NDArray[Any], num_entities: int, num_relations: int) -> Scorer:
        """Fit it to the facts known, (n, 3) integers; duplicates count once."""
        scorer: Scorer = self.build(distinct_triples(train), num_entities, num_relations)
        return scorer


@dataclass(frozen=True, slots=True)
class WeightedRows:
    """CSR of weighted values: row ``g`` is ``values[offsets[g]:offsets[g + 1]]`` with as many ``weights``."""

    offsets: Ints
    values: Ints
    weights: Floats

    @classmethod
    def count(cls, groups: Ints, values: Ints, num_groups: int, num_values: int) -> WeightedRows:
        """How often each value stands with each group; ``groups`` and ``values`` (n,)."""
        keys, counts = np.unique(groups * num_values + values, return_counts=True)
        offsets = np.searchsorted(keys, np.arange(num_groups + 1, dtype=np.int64) * num_values)
        return cls(offsets, keys % max(num_values, 1), counts.astype(np.float32))

    def expand(self, groups: Ints) -> tuple[Ints, Ints, Floats]:
        """All entries of B groups: row in 0..B-1, value, weight."""
        start, length = self.offsets[groups], np.diff(self.offsets)[groups]
        rows = np.repeat(np.arange(len(groups)), length)
        at = start[rows] + np.arange(len(rows)) - np.repeat(np.cumsum(length) - length, length)
        return rows, self.values[at], self.weights[at]

    def dense(self, groups: Ints, width: int) -> Floats:
        """(B, width) float32, zero where a value never stood with the group."""
        out = np.zeros((len(groups), width), dtype=np.float32)
        rows, values, weights = self.expand(groups)
        out[rows, values] = weights
        return out


class RelationFrequency:
    """An entity by how often training has it on that side of the relation; a relation by its frequency."""

    def __init__(self, train: Ints, num_entities: int, num_relations: int) -> None:
        self.num_entities, self.num_relations = num_entities, num_relations
        head, relation, tail = train.T
        self.tails = WeightedRows.count(relation, tail, num_relations, num_entities)
        self.heads = WeightedRows.count(relation, head, num_relations, num_entities)
        self.frequency = np.bincount(relation, minlength=num_relations).astype(np.float32)

    def score_tails(self, heads: torch.Tensor, relations: torch.Tensor) -> torch.Tensor:
        """(B, N): triples of the relation that end in the entity."""
        return torch.from_numpy(self.tails.dense(relations.numpy(), self.num_entities))

    def score_heads(self, relations: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        """(B, N): triples of the relation that start at the entity."""
        return torch.from_numpy(self.heads.dense(relations.numpy(), self.num_entities))

    def score_relations(self, heads: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        """(B, R): triples of the relation, whatever the pair: the majority relation first."""
        return torch.tensor(self.frequency).expand(len(heads), -1)


class Marginals(RelationFrequency):
    """Relation prediction by the product of marginals p(r | head) p(r | tail) / p(r), smoothed.

    The marginals are what head and tail each do in training, as if independent given the relation. Five
    pseudo-triples shared out by p(r) keep unseen entities and pairs of zeros in order.
    """

    def __init__(self, train: Ints, num_entities: int, num_relations: int) -> None:
        super().__init__(train, num_entities, num_relations)
        self.by_head = WeightedRows.count(train[:, 0], train[:, 1], num_entities, num_relations)
        self.by_tail = WeightedRows.count(train[:, 2], train[:, 1], num_entities, num_relations)
        self.prior = (self.frequency + 1e-3) / (self.frequency + 1e-3).sum()

    def score_relations(self, heads: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        """(B, R): the product, scaled to sum to one over the relations."""
        from_head = self.by_head.dense(heads.numpy(), self.num_relations) + _PSEUDO * self.prior
        from_tail = self.by_tail.dense(tails.numpy(), self.num_relations) + _PSEUDO * self.prior
        product = from_head * from_tail / self.prior
        return torch.from_numpy(product / product.sum(axis=1, keepdims=True))


class InverseRule(Marginals):
    """The reverse edge: ``s(y, x)`` in training speaks for ``r(x, y)`` by the confidence of the rule r <- s.

    Confidence is the share of training triples s(y, x) for which r(x, y) is in training too; with r = s it is
    the symmetry rule. To the best confidence is added how often the candidate answers the relation at all:
    the share of its heads that have this tail (of its tails, this head; for relations, :class:`Marginals`).
    """

    def __init__(self, train: Ints, num_entities: int, num_relations: int) -> None:
        super().__init__(train, num_entities, num_relations)
        head, relation, tail = train.T
        # Edges that end in, or start at, an entity: value = the other end and the relation in one number.
        self.into = WeightedRows.count(
            tail, head * num_relations + relation, num_entities, num_entities * num_relations
        )
        self.out_of = WeightedRows.count(
            head, tail * num_relations + relation, num_entities, num_entities * num_relations
        )
        self.rules = self._rules(train)

    def _rules(self, train: Ints) -> WeightedRows:
        """Confidence of every rule with support, row = body relation, value = head relation."""
        pair = train[:, 0] * self.num_entities + train[:, 2]
        order = np.argsort(pair, kind="stable")
        self.pairs, self.pair_relations = pair[order], train[order, 1]
        rows, reverse = self._reverse_relations(train[:, 0], train[:, 2])
        rules = WeightedRows.count(reverse, train[rows, 1], self.num_relations, self.num_relations)
        body = np.repeat(np.arange(self.num_relations), np.diff(rules.offsets))
        return WeightedRows(rules.offsets, rules.values, rules.weights / self.frequency[body])

    def _reverse_relations(self, heads: Ints, tails: Ints) -> tuple[Ints, Ints]:
        """Relations of the training triples (tail, ?, head) of B pairs: row in 0..B-1, relation."""
        wanted = tails * self.num_entities + heads
        start, stop = np.searchsorted(self.pairs, wanted), np.searchsorted(self.pairs, wanted, side="right")
        length = stop - start
        rows = np.repeat(np.arange(len(wanted)), length)
        at = start[rows] + np.arange(len(rows)) - np.repeat(np.cumsum(length) - length, length)
        return rows, self.pair_relations[at]

    def _confidence(self, body: Ints, conclusion: Ints) -> Floats:
        """Confidence of each of M rules ``conclusion <- body``, 0 where it has no support."""
        owner = np.repeat(np.arange(self.num_relations), np.diff(self.rules.offsets))
        keys = owner * self.num_relations + self.rules.values
        wanted = body * self.num_relations + conclusion
        if not len(keys):
            return np.zeros(len(wanted), dtype=np.float32)
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[at] == wanted, self.rules.weights[at], 0).astype(np.float32)

    @staticmethod
    def _distinct(side: WeightedRows, relations: Ints) -> Ints:
        """Entities the relation has on a side, at least 1; (B, 1)."""
        return np.maximum(np.diff(side.offsets)[relations], 1)[:, None]

    def _add_rule(self, base: Floats, edges: WeightedRows, entities: Ints, relations: Ints) -> torch.Tensor:
        rows, packed, _ = edges.expand(entities)
        other, body = np.divmod(packed, max(self.num_relations, 1))
        return torch.from_numpy(_add_best(base, rows, other, self._confidence(body, relations[rows])))

    def score_tails(self, heads: torch.Tensor, relations: torch.Tensor) -> torch.Tensor:
        """(B, N): best rule from an edge entity -> head, plus the share of heads that have this tail."""
        base = self.tails.dense(relations.numpy(), self.num_entities)
        base /= self._distinct(self.heads, relations.numpy())
        return self._add_rule(base, self.into, heads.numpy(), relations.numpy())

    def score_heads(self, relations: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        """(B, N): best rule from an edge tail -> entity, plus the share of tails that have this head."""
        base = self.heads.dense(relations.numpy(), self.num_entities)
        base /= self._distinct(self.tails, relations.numpy())
        return self._add_rule(base, self.out_of, tails.numpy(), relations.numpy())

    def score_relations(self, heads: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        """(B, R): best rule from an edge tail -> head, plus the product of marginals."""
        base = super().score_relations(heads, tails).numpy()
        rows, body = self._reverse_relations(heads.numpy(), tails.numpy())
        inner, conclusion, confidence = self.rules.expand(body)
        return torch.from_numpy(_add_best(base, rows[inner], conclusion, confidence))


def _add_best(base: Floats, rows: Ints, columns: Ints, values: Floats) -> Floats:
    """Add to ``base[row, column]`` the greatest of the values given for it."""
    order = np.argsort(values, kind="stable")  # of several assignments to one place the last one stays
    place = rows[order] * base.shape[1] + columns[order]
    last = np.unique(place[::-1], return_index=True)[1]
    chosen = order[::-1][last]
    base[rows[chosen], columns[chosen]] += values[chosen]
    return base


BASELINES: Mapping[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline(
            "relation_frequency",
            SIDES,
            "the entities training has most often on that side of the relation; the most frequent relation",
            RelationFrequency,
        ),
        Baseline(
            "inverse_rule",
            SIDES,
            "the reverse edge in training, by the confidence of its rule; then frequency",
            InverseRule,
        ),
        Baseline("marginals", ("relation",), "p(r | head) p(r | tail) / p(r) counted in training", Marginals),
        Baseline(
            "common_neighbours",
            ("tail", "head"),
            "entities that are adjacent to both in training",
            CommonNeighbours,
            links=True,
        ),
        Baseline(
            "adamic_adar", ("tail", "head"), "the same, those with few neighbours counting more", AdamicAdar, links=True
        ),
    )
}
