"""The path model in the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kgray.errors import ConfigError
from kgray.graph.filter_index import KnownAnswers
from kgray.graph.graph import Graph
from kgray.graph.neighbours import Int64
from kgray.graph.sampler import step_generator
from kgray.model.path_scorer import PathScorer, write_paths
from kgray.model.paths import PathBatch, PathModel, path_loss
from kgray.model.paths_config import PathsConfig
from kgray.text.vectors import Vectors
from kgray.training.batches import Piece, StepMaker
from kgray.training.config import TrainConfig
from kgray.training.task import Task
from kgray.training.worker import Worker


class PathBatchMaker(StepMaker[PathBatch]):
    """Queries of one worker's steps. triples: (T, 3) int64, those ``known`` is built from."""

    def __init__(
        self,
        triples: Int64,
        known: KnownAnswers,
        config: PathsConfig,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(triples, known, batch_size, seed, rank, world)
        self.config = config

    def make(self, epoch: int, step: int, piece: Piece | None = None) -> PathBatch:
        piece = piece or Piece(self.rank)
        positions = self._positions(epoch, step, piece)
        heads, relations, tails = self.triples[positions].T
        known_query, known_entity = self.other_answers(heads, relations, tails)
        return PathBatch(
            head=torch.from_numpy(np.concatenate([heads, tails])),
            relation=torch.from_numpy(np.concatenate([relations, relations + self.known.num_relations])),
            tail=torch.from_numpy(np.concatenate([tails, heads])),
            triple=torch.from_numpy(np.concatenate([positions, positions])),
            known_query=torch.from_numpy(known_query),
            known_entity=torch.from_numpy(known_entity),
            withheld=self._withheld(epoch, step, piece.share),
        )

    def _withheld(self, epoch: int, step: int, share: int) -> Tensor | None:
        """(T,) bool, or None for nothing; the same for all parts of a share."""
        if not self.config.edge_drop and not self.config.remove_batch:
            return None
        withheld = np.zeros(len(self.triples), dtype=bool)
        if self.config.edge_drop:
            generator = step_generator(self.seed, epoch, step, share)
            withheld = generator.random(len(self.triples), dtype=np.float32) < self.config.edge_drop
        if self.config.remove_batch:
            withheld[self._share(epoch, step, share)] = True
        return torch.from_numpy(withheld)


class PathsTask(Task[PathBatch, PathScorer]):
    """See :class:`Task`."""

    model: PathModel
    batches: PathBatchMaker

    def __init__(self, model: PathModel, batches: PathBatchMaker, answering: PathModel | None = None) -> None:
        """answering: the same model over the facts known when questions are asked, where those are more."""
        self.model, self.batches = model, batches
        self.answering = answering

    @classmethod
    def make(
        cls, graph: Graph, vectors: Vectors | None, config: PathsConfig, train: TrainConfig, worker: Worker
    ) -> PathsTask:
        """The path model reads no text: ``vectors`` must be None; raises ConfigError otherwise."""
        if vectors is not None:
            raise ConfigError("vectors", vectors, "null: the path model reads the graph alone")
        torch.manual_seed(train.seed)
        model = PathModel(config, graph.message_index(), graph.num_relations).to(worker.device)
        batches = PathBatchMaker(
            graph.triples["train"],
            graph.answers(["train"]),
            config,
            train.batch_size,
            train.seed,
            worker.rank,
            worker.shares(train.workers),
        )
        answering = None
        if graph.trained_entities() is not None:
            answering = PathModel(config, graph.inference_index(), graph.num_relations).to(worker.device)
        return cls(model, batches, answering)

    def loss(self, batch: PathBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = path_loss(self.model, batch)
        return loss, {}

    def scorer(self) -> PathScorer:
        if self.answering is None:
            return PathScorer(self.model)
        self.answering.load_state_dict(self.model.state_dict())
        return PathScorer(self.answering)

    def write(
        self,
        folder: Path,
        scorer: PathScorer,
        graph: Graph,
        history: Sequence[Mapping[str, Any]],
        info: Mapping[str, Any],
    ) -> None:
        write_paths(folder, self.model, graph, history, info)
