"""The text encoder in the training loop: contrastive, on the training triples (Wang et al. 2022, "SimKGC")."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kgray.errors import ConfigError, TrainingError
from kgray.graph.graph import Graph
from kgray.graph.sampler import step_generator
from kgray.model.contrastive import ContrastiveBatch, TextScorer, contrastive_loss
from kgray.model.text_encoder import TunedEncoder
from kgray.text.tokens import Texts, mentions, pack
from kgray.text.tuning_config import TuningConfig
from kgray.training.autocast import autocast_dtype
from kgray.training.batches import Piece, StepMaker
from kgray.training.config import TrainConfig
from kgray.training.task import Task
from kgray.training.worker import Worker

HISTORY = "history.json"


class ContrastiveMaker(StepMaker[ContrastiveBatch]):
    """Queries and candidates of one worker's steps.

    The candidates of a step are all entities of all workers' triples, each once and shared out evenly, so that it does
    not matter how many workers a global batch is spread over. Triples of an entity without text teach nothing and are
    left out.
    """

    def __init__(
        self, graph: Graph, texts: Texts, config: TuningConfig, train: TrainConfig, rank: int = 0, world: int = 1
    ) -> None:
        triples = graph.triples["train"]
        has_text = texts.tokens.lengths[: texts.num_entities] > 0
        triples = triples[has_text[triples[:, 0]] & has_text[triples[:, 2]]]
        if not len(triples):
            raise TrainingError("no training triple has text on both sides: nothing to tune the encoder with")
        # Of all training triples: an answer is true whether or not this one teaches anything.
        known = graph.answers(["train"])
        super().__init__(triples, known, train.batch_size, train.seed, rank, world, config.epoch_triples)
        # More workers or fewer only spread the same triples; each step has one set of candidates for all of them.
        self.size = train.batch_size * max(train.workers, world)
        self.texts, self.config = texts, config
        self._column = np.full(texts.num_entities, -1, dtype=np.int64)

    def make(self, epoch: int, step: int, piece: Piece | None = None) -> ContrastiveBatch:
        piece = piece or Piece(self.rank)
        generator = step_generator(self.seed, epoch, step, piece.share)
        heads, relations, tails = self.triples[self._positions(epoch, step, piece)].T
        # Candidates are shared by the workers, who compute the same part of their shares at the same time.
        everyone = [self._positions(epoch, step, replace(piece, share=share)) for share in range(self.world)]
        candidates = np.unique(self.triples[np.concatenate(everyone)][:, [0, 2]])
        shares = np.array_split(candidates, self.world)
        asked, answers = np.concatenate([heads, tails]), np.concatenate([tails, heads])
        ways = np.concatenate([relations, relations + self.known.num_relations])
        packed = pack(
            self.texts,
            np.concatenate([asked, shares[self.rank]]),
            np.concatenate([self.texts.num_entities + ways, np.full(len(shares[self.rank]), -1)]),
            drop=self.config.word_dropout,
            generator=generator,
            without=mentions(self.texts, asked, answers) if self.config.mask_mentions else None,
        )
        self._column[candidates] = np.arange(len(candidates))
        rows, entities = self.other_answers(heads, relations, tails)
        columns, gold = self._column[entities], self._column[answers]
        self._column[candidates] = -1
        inside = columns >= 0
        return ContrastiveBatch(
            packed=packed,
            shares=[len(share) for share in shares],
            gold=torch.from_numpy(gold),
            known_query=torch.from_numpy(rows[inside]),
            known_candidate=torch.from_numpy(columns[inside]),
        )


class EncoderTask(Task[ContrastiveBatch, TextScorer]):
    """See :class:`Task`."""

    model: TunedEncoder
    batches: ContrastiveMaker
    pretrained = True

    def __init__(self, model: TunedEncoder, batches: ContrastiveMaker, worker: Worker) -> None:
        self.model, self.batches, self.worker = model, batches, worker

    @classmethod
    def make(
        cls, graph: Graph, texts: Texts | None, config: TuningConfig, train: TrainConfig, worker: Worker
    ) -> EncoderTask:
        """Raises ConfigError without texts, and what :class:`TunedEncoder` raises."""
        if texts is None:
            raise ConfigError("text.tuning", config.mode, "null, as there are no texts")
        torch.manual_seed(train.seed)
        dtype = autocast_dtype(train.precision, worker.device) or torch.float32
        batches = ContrastiveMaker(graph, texts, config, train, worker.rank, worker.world)
        model = TunedEncoder(texts, config, dtype).to(worker.device)
        model.store_lower(worker.say)
        return cls(model, batches, worker)

    def loss(self, batch: ContrastiveBatch) -> tuple[Tensor, dict[str, Tensor]]:
        vectors = self.model(batch.packed)
        own = len(batch.gold)
        candidates = self.worker.gather_rows(vectors[own:], batch.shares)
        known = batch.known_query, batch.known_candidate
        scale = self.model.log_scale.exp()
        loss = contrastive_loss(vectors[:own], candidates, batch.gold, known, scale, self.batches.config.margin)
        return loss, {"temperature": 1 / scale.detach()}

    def scorer(self) -> TextScorer:
        """Every worker reads its share of the entities."""
        count = self.model.texts.num_entities
        shares = np.array_split(np.arange(count, dtype=np.int64), self.worker.world)
        own = self.model.encode(shares[self.worker.rank]).to(self.worker.device)
        entities = self.worker.gather_rows(own, [len(share) for share in shares])
        return TextScorer(self.model, entities.cpu())

    @property
    def halves(self) -> str:
        return (
            "The global batch and the schedule stay, but the candidates of a query are the entities of its half alone, "
            f"as with text.tuning.batch_size={self.batches.batch_size // 2}: results are close to those of whole "
            "batches, not the same."
        )

    def smaller(self, train: TrainConfig) -> str:
        return f"lower text.tuning.batch_size (now {train.batch_size}), or set text.tuning.mode to last_layers or lora"

    def remedy(self, train: TrainConfig) -> str:
        return f"lower text.tuning.lr (now {train.optimiser.lr}), or set train.precision=float32"

    def write(
        self,
        folder: Path,
        scorer: TextScorer,
        graph: Graph,
        history: Sequence[Mapping[str, Any]],
        info: Mapping[str, Any],
    ) -> None:
        """A Hugging Face folder, and ``history.json`` with how it went."""
        self.model.save(folder)
        (folder / HISTORY).write_text(json.dumps({**info, "history": list(history)}, indent=1) + "\n")
