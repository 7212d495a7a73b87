"""The relation classifier in the training loop."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kgray.errors import ConfigError
from kgray.graph.filter_index import KnownAnswers
from kgray.graph.graph import Graph
from kgray.graph.neighbours import Int64
from kgray.model.pair_features import PairIndex
from kgray.model.relation_scorer import RelationScorer, write_relations
from kgray.model.relations import PairBatch, RelationModel, relation_loss
from kgray.model.relations_config import RelationsConfig
from kgray.reasoning.facts import Facts
from kgray.text.vectors import Vectors
from kgray.training.batches import Piece, StepMaker
from kgray.training.config import TrainConfig
from kgray.training.task import Task
from kgray.training.worker import Worker


class PairBatchMaker(StepMaker[PairBatch]):
    """Pairs of one worker's steps. The paths of all training pairs are looked up once: they take minutes on a graph
    of hubs, and change with nothing."""

    def __init__(
        self,
        triples: Int64,
        known: KnownAnswers,
        index: PairIndex,
        texts: NDArray[np.float16] | None,
        train: TrainConfig,
        worker: Worker,
    ) -> None:
        super().__init__(triples, known, train.batch_size, train.seed, worker.rank, worker.shares(train.workers))
        self.index, self.texts = index, texts
        begin = time.monotonic()
        heads, relations, tails = triples.T
        self.paths = index.paths(heads, tails, relations)
        worker.say(
            "%d kinds of paths, %.1f for each training pair, looked up in %.0f s",
            *(index.num_bodies, len(self.paths.items) / max(len(triples), 1), time.monotonic() - begin),
        )

    def make(self, epoch: int, step: int, piece: Piece | None = None) -> PairBatch:
        positions = self._positions(epoch, step, piece)
        heads, relations, tails = (np.ascontiguousarray(column) for column in self.triples[positions].T)
        batch = PairBatch.of(self.index, heads, tails, relations, self.texts, self.paths.take(positions))
        known = torch.zeros(len(heads), self.known.num_relations, dtype=torch.bool)
        known[tuple(torch.from_numpy(part) for part in self.known.relations(heads, tails))] = True
        gold = torch.from_numpy(relations)
        known[torch.arange(len(heads)), gold] = False
        return replace(batch, relation=gold, known=known)


class RelationsTask(Task[PairBatch, RelationScorer]):
    """See :class:`Task`."""

    validated: ClassVar[tuple[str, ...]] = ("relation",)
    model: RelationModel
    batches: PairBatchMaker

    def __init__(self, model: RelationModel, batches: PairBatchMaker, answering: PairIndex) -> None:
        """answering: the same kinds of paths over the facts known when questions are asked."""
        self.model, self.batches, self.answering = model, batches, answering

    @classmethod
    def make(
        cls, graph: Graph, vectors: Vectors | None, config: RelationsConfig, train: TrainConfig, worker: Worker
    ) -> RelationsTask:
        """Raises ConfigError when texts are asked for and there are none."""
        if config.text and vectors is None:
            raise ConfigError("members.relations.model.text", True, "false, as there are no text vectors")
        triples, size = graph.triples["train"], (graph.num_entities, graph.num_relations)
        texts = vectors.entities if vectors is not None and config.text else None
        index = PairIndex.build(
            triples,
            Facts.build(triples, *size),
            hops=config.hops,
            bodies=config.bodies,
            remove=config.remove,
            seed=train.seed,
        )
        batches = PairBatchMaker(triples, graph.answers(["train"]), index, texts, train, worker)
        torch.manual_seed(train.seed)
        model = RelationModel(config, *size, index.num_bodies, 0 if texts is None else texts.shape[1])
        support = len(graph.context) > len(triples)
        answering = replace(index, facts=Facts.build(graph.context, *size)) if support else index
        return cls(model.to(worker.device), batches, answering)

    def loss(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return relation_loss(self.model, batch), {}

    def scorer(self) -> RelationScorer:
        return RelationScorer(self.model, self.answering, self.batches.texts)

    def write(
        self,
        folder: Path,
        scorer: RelationScorer,
        graph: Graph,
        history: Sequence[Mapping[str, Any]],
        info: Mapping[str, Any],
    ) -> None:
        write_relations(folder, scorer, graph, history, info)
