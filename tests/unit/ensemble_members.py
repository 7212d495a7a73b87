"""Members made by hand for the tests of the ensemble, and the candidates a gate is fitted on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from kgray.graph.filter_index import FilterIndex
from kgray.model.candidates import Candidates, collect
from kgray.model.ensemble import score
from kgray.model.gate import TrainingFacts

ENTITIES, RELATIONS = 60, 2


class TableScorer:
    """Scores out of two tables (N, R, N), one a direction."""

    tasks = ("tail", "head", "relation")

    def __init__(self, forward: np.ndarray, backward: np.ndarray | None = None) -> None:
        self.forward = torch.tensor(forward, dtype=torch.float32)
        self.backward = self.forward if backward is None else torch.tensor(backward, dtype=torch.float32)
        self.num_entities, self.num_relations, _ = self.forward.shape

    def score_tails(self, heads: torch.Tensor, relations: torch.Tensor) -> torch.Tensor:
        return self.forward[heads, relations]

    def score_heads(self, relations: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        return self.backward[:, relations, tails].T

    def score_relations(self, heads: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        return (self.forward[heads, :, tails] + self.backward[heads, :, tails]) / 2

    def score_triples(self, heads: torch.Tensor, relations: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        return (self.forward[heads, relations, tails] + self.backward[heads, relations, tails]) / 2


def triples(seed: int, count: int = 900) -> np.ndarray:
    draw = np.random.default_rng(seed)
    columns = [draw.integers(0, size, count) for size in (ENTITIES, RELATIONS, ENTITIES)]
    return np.unique(np.stack(columns, axis=1), axis=0)


def table(facts: np.ndarray, *, signal: tuple[float, float], seed: int, scale: float = 1.0) -> TableScorer:
    """Noise, with ``signal`` added to the facts of each relation, all of it times ``scale``."""
    scores = np.random.default_rng(seed).normal(size=(ENTITIES, RELATIONS, ENTITIES))
    for relation, strength in enumerate(signal):
        mine = facts[facts[:, 1] == relation]
        scores[mine[:, 0], relation, mine[:, 2]] += strength
    return TableScorer(scores * scale)


def gathered(
    members: Mapping[str, TableScorer],
    valid: np.ndarray,
    train: np.ndarray,
    *,
    tasks: tuple[str, ...] = ("tail", "head"),
    best: int = 8,
    sampled: int = 16,
) -> Candidates:
    """What the fit sees of these validation triples."""
    facts = TrainingFacts.of(train, ENTITIES, RELATIONS)
    known = FilterIndex.build(np.concatenate([train, valid]), ENTITIES, RELATIONS)
    head, relation, tail = torch.from_numpy(valid).unbind(1)
    given = {"tail": (head, relation), "head": (relation, tail), "relation": (head, tail)}
    return Candidates.concatenate(
        [
            collect(
                task,
                torch.from_numpy(valid),
                {name: score(member, task, *given[task]) for name, member in members.items()},
                known,
                facts,
                best=best,
                sampled=sampled,
                seed=0,
            )
            for task in tasks
        ]
    )
