"""A bundle made by hand: any scores you like, ties included, over a small graph with awkward names."""

from __future__ import annotations

import numpy as np
import torch

from kgray.graph.filter_index import FilterIndex


class TableBundle:
    """Scores come out of one table (N, R, N): tails and heads of different halves, so that a mix-up shows."""

    tasks: tuple[str, ...] = ("tail", "head", "relation")

    def __init__(self, entities: int = 40, relations: int = 5, *, seed: int = 0, levels: int = 0) -> None:
        rng = np.random.default_rng(seed)
        shape = (entities, relations, entities)
        draw = rng.integers(0, levels, (2, *shape)) if levels else rng.normal(size=(2, *shape))
        self.forward, self.backward = torch.tensor(draw, dtype=torch.float32)
        self.num_entities, self.num_relations = entities, relations
        self.entity_ids = [f"e{i:02d}" for i in range(entities)]
        self.entity_names = [f"entity {i}" for i in range(entities)]
        self.entity_names[3] = self.entity_names[4] = "twin"
        self.entity_names[5] = "e06"  # a name that is another row's id: the id wins
        self.relation_ids = [f"r{i}" for i in range(relations)]
        self.relation_names = [f"relation_{i}" for i in range(relations)]
        size = 6 * entities
        self.triples = np.stack(
            [
                rng.integers(0, entities, size),
                rng.integers(0, relations, size),
                rng.integers(0, entities, size),
            ],
            axis=1,
        )
        self.known = FilterIndex.build(self.triples, entities, relations)
        self.model_version, self.graph_version = "0123456789abcdef", "fedcba9876543210"
        self.calibration = None
        self.info = {"metrics": {"valid.both.realistic.filtered.full.mrr": 0.5, "broken": float("nan")}}

    def score_tails(self, heads: torch.Tensor, relations: torch.Tensor) -> torch.Tensor:
        return self.forward[heads, relations]

    def score_heads(self, relations: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        return self.backward[:, relations, tails].T

    def score_relations(self, heads: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        return (self.forward[heads, :, tails] + self.backward[heads, :, tails]) / 2

    def score_triples(
        self, heads: torch.Tensor, relations: torch.Tensor, tails: torch.Tensor
    ) -> torch.Tensor:
        return (self.forward[heads, relations, tails] + self.backward[heads, relations, tails]) / 2
