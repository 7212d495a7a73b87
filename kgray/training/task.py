"""What a family of models brings to the one training loop; everything else there is the same for all."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from kgray.graph.graph import Graph
from kgray.model.bundle import Scorer
from kgray.text.tokens import Texts
from kgray.text.vectors import Vectors
from kgray.training.batches import StepMaker
from kgray.training.config import TrainConfig
from kgray.training.families import TrainableConfig, family_of
from kgray.training.worker import Worker


class Movable(Protocol):
    """A batch."""

    def to(self, device: torch.device) -> Self: ...


B = TypeVar("B", bound=Movable)
S = TypeVar("S", bound=Scorer)


class Task(ABC, Generic[B, S]):
    """One model to train: how it is made, fed, asked, and written.

    model: with seeded initial weights, on the worker's device. batches: its steps. Making a task may draw from torch's
    generator only after seeding it with ``train.seed``. validated: the queries by whose MRR the best epoch is chosen.
    pretrained: whether the weights it begins with already answer; they are then validated too, and kept where no epoch
    makes them better.
    """

    validated: ClassVar[tuple[str, ...]] = ("tail", "head")
    model: nn.Module
    batches: StepMaker[B]
    pretrained = False

    @classmethod
    @abstractmethod
    def make(cls, graph: Graph, read: Any, config: Any, train: TrainConfig, worker: Worker) -> Task[Any, Any]:
        """The task of this configuration; raises ConfigError where it does not fit the data.

        read: what the family reads besides the graph: Vectors, Texts, or None for nothing.
        """

    @abstractmethod
    def loss(self, batch: B) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over a batch, and its parts for the log; called under the run's autocast."""

    def entity_inputs(self) -> Sequence[nn.Module]:
        """The modules whose outputs (n, d) entities enter the model with, each called as often in every step; none
        where the model does not know entities apart."""
        return ()

    @abstractmethod
    def scorer(self) -> S:
        """The model as it is, ready to rank; dropout off, the model's mode left as it was."""

    def finish(
        self, rank: Callable[[Scorer], float], best: float, say: Callable[..., None]
    ) -> tuple[S, float]:
        """With the best weights restored: what is decided on validation triples at the very end.

        rank: the validation MRR of a scorer. best: that of the restored weights. Returns the scorer to answer by and
        its validation MRR.
        """
        return self.scorer(), best

    @property
    def halves(self) -> str:
        """What it changes when a batch is computed as two halves whose gradients are added up, for the log."""
        return (
            "Every query is asked of the same candidates as before: the gradients are those of the whole batch, up to "
            "rounding and dropout, and results stay comparable."
        )

    def smaller(self, train: TrainConfig) -> str:
        """What to set when memory runs out."""
        return f"lower train.batch_size (now {train.batch_size}; with train.accumulate raised by as much) or model.dim"

    def remedy(self, train: TrainConfig) -> str:
        """What to set when the loss becomes non-finite."""
        optimiser = train.optimiser
        return (
            f"lower train.optimiser.lr (now {optimiser.lr}) or train.optimiser.table_lr (now {optimiser.table_lr}), "
            f"set train.optimiser.clip_norm (now {optimiser.clip_norm}), or train.precision=float32"
        )

    @abstractmethod
    def write(
        self,
        folder: Path,
        scorer: S,
        graph: Graph,
        history: Sequence[Mapping[str, Any]],
        info: Mapping[str, Any],
    ) -> None:
        """Write every file of the artifact."""


def make_task(
    graph: Graph, read: Vectors | Texts | None, config: TrainableConfig, train: TrainConfig, worker: Worker
) -> Task[Any, Any]:
    """The task of whichever family the configuration is of."""
    module, _, name = family_of(config).task.partition(":")
    task: type[Task[Any, Any]] = getattr(importlib.import_module(module), name)
    return task.make(graph, read, config, train, worker)
