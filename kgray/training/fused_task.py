"""The fused model in the training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kgray.errors import ConfigError
from kgray.graph.graph import PSEUDO, Graph
from kgray.graph.neighbours import MessageIndex
from kgray.graph.resident import ResidentStore
from kgray.model.bundle import Scorer, write_bundle
from kgray.model.config import ModelConfig
from kgray.model.fused import FusedModel
from kgray.model.objectives import LOSSES, Batch, batch_loss
from kgray.model.states import EncodedViews, StateScorer, encode_all, scorer_of
from kgray.text.vectors import Vectors
from kgray.training.batches import BatchMaker
from kgray.training.config import TrainConfig
from kgray.training.task import Task
from kgray.training.worker import Worker

STRUCTURE_WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5)


def build_model(graph: Graph, vectors: Vectors | None, config: ModelConfig, seed: int) -> FusedModel:
    """A model with seeded initial weights for this graph; raises ConfigError when it needs text and there is none,
    or a slot names no known part."""
    if config.text.kind != "none" and vectors is None:
        raise ConfigError("model.text.kind", config.text.kind, "'none', as there are no text vectors (text is null)")
    LOSSES.get(config.objective.loss)  # an unknown one is told now, not in the first step
    torch.manual_seed(seed)
    index = graph.message_index() if graph.store is None else graph.store.messages
    entity_text = relation_text = None
    if vectors is not None and config.text.kind != "none":
        entity_text = torch.from_numpy(np.array(vectors.entities))
        relation_text = torch.from_numpy(np.array(vectors.relations))
    has_edges = torch.from_numpy(index.degrees > 0)
    return FusedModel(config, graph.num_relations, has_edges, entity_text, relation_text)


class FusedTask(Task[Batch, StateScorer]):
    """See :class:`Task`. index: the message graph its states are computed over."""

    model: FusedModel
    batches: BatchMaker

    def __init__(self, model: FusedModel, batches: BatchMaker, index: MessageIndex) -> None:
        self.model, self.batches, self.index = model, batches, index

    @classmethod
    def make(
        cls, graph: Graph, vectors: Vectors | None, config: ModelConfig, train: TrainConfig, worker: Worker
    ) -> FusedTask:
        store = graph.store or ResidentStore.of(graph)
        graph = replace(graph, store=store)
        model = build_model(graph, vectors, config, train.seed).to(worker.device)
        pool = graph.trained_entities()
        batches = BatchMaker(
            store,
            config,
            train.batch_size,
            train.seed,
            worker.rank,
            worker.shares(train.workers),
            pool,
            graph.triples[PSEUDO],
            graph.answers(["train", PSEUDO]),
        )
        return cls(model, batches, store.messages if pool is None else graph.inference_index())

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return batch_loss(self.model, batch, self.model.config.objective)

    def entity_inputs(self) -> Sequence[nn.Module]:
        return self.model.entity_inputs()

    @property
    def halves(self) -> str:
        if self.batches.one_vs_all:
            return super().halves
        size = self.batches.batch_size
        return (
            "The global batch and the schedule stay, but a half is asked of its own entities and the share's negatives "
            f"alone, as with train.batch_size={size // 2}: results are close to those of whole batches, not the same."
        )

    def scorer(self) -> StateScorer:
        return scorer_of(self.model, self.index)

    def finish(
        self, rank: Callable[[Scorer], float], best: float, say: Callable[..., None]
    ) -> tuple[StateScorer, float]:
        encoded = encode_all(self.model, self.index)
        if len(encoded.heads) > 1:
            best = self._weigh_views(encoded, rank, say)
        return encoded.scorer(float(self.model.structure_weight)), best

    def _weigh_views(
        self, encoded: EncodedViews, rank: Callable[[Scorer], float], say: Callable[..., None]
    ) -> float:
        """Set the weight of the structural view to the one that ranks the validation triples best; their MRR.

        The structural view is surer of the training triples than of any other, so its weight cannot be learned there.
        """
        tried = {weight: rank(encoded.scorer(weight)) for weight in STRUCTURE_WEIGHTS}
        weight = max(tried, key=lambda w: tried[w])
        self.model.structure_weight.fill_(weight)
        curve = ", ".join(f"{w:g}: {mrr:.4f}" for w, mrr in tried.items())
        say("weight of the structural view %g (validation MRR by weight: %s)", weight, curve)
        return tried[weight]

    def write(
        self,
        folder: Path,
        scorer: StateScorer,
        graph: Graph,
        history: Sequence[Mapping[str, Any]],
        info: Mapping[str, Any],
    ) -> None:
        write_bundle(folder, self.model, scorer, graph, history, info)
