"""The one training loop. It knows nothing of Ray: a ``Worker`` tells it its rank and takes its reports.

One epoch: batches of seeded order and samples, loss under autocast, gradients averaged over the workers, clipping,
one update of all optimisers; then the filtered validation MRR by the same evaluator the test uses. The best weights
are restored at the end.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kgray.config import to_dict
from kgray.errors import ConfigError, OutOfMemoryError, TrainingError
from kgray.evaluation.counts import merge
from kgray.evaluation.ranking import filter_splits, rank_triples
from kgray.graph.graph import Graph
from kgray.graph.neighbours import Int64
from kgray.model.bundle import Scorer
from kgray.phases import brief, flat, merged, phase
from kgray.text.tokens import Texts
from kgray.text.vectors import Vectors
from kgray.training.adversarial import shifted, watched
from kgray.training.autocast import autocast_dtype
from kgray.training.batches import Piece
from kgray.training.checkpoint import Position, load_checkpoint, save_checkpoint
from kgray.training.config import TrainConfig
from kgray.training.families import TrainableConfig
from kgray.training.memory_errors import freed, out_of_memory
from kgray.training.optimisers import Optimisers
from kgray.training.probe import announce
from kgray.training.task import Task, make_task
from kgray.training.worker import Worker

METRIC = "valid.both.realistic.filtered.full.mrr"
"""What chooses the best epoch of a model of entities; of a task that validates by relations, ``valid.relation...``."""
CHECK_STEPS = 20
LOG_SECONDS = 15.0


@dataclass(frozen=True)
class Fit:
    """A finished run: the task whose model has its best weights, what it answers with, and how it went. snapshots: the
    weights at the end of each cycle but the last. phases: where its time went, rows of :func:`kgray.phases.merged`.
    parts: batches a share was computed in: two where memory had run out."""

    task: Task[Any, Any]
    scorer: Scorer
    history: Sequence[Mapping[str, float]]
    best_epoch: int
    best: float
    metric: str = METRIC
    snapshots: Sequence[Mapping[str, torch.Tensor]] = ()
    phases: Sequence[Mapping[str, Any]] = ()
    parts: int = 1

    @property
    def model(self) -> nn.Module:
        return self.task.model


class Trainer:
    """One run of the loop on one worker."""

    def __init__(
        self,
        graph: Graph,
        read: Vectors | Texts | None,
        model: TrainableConfig,
        train: TrainConfig,
        worker: Worker,
        snapshots: int = 0,
        parts: int = 1,
    ) -> None:
        """parts: batches a share of a step is computed in, more than one where memory is short."""
        if snapshots >= train.epochs:
            raise ValueError(f"{snapshots} snapshots and an end need more than {train.epochs} epochs")
        if not graph.num_train:
            raise TrainingError(f"graph {graph.version} has no training triples: nothing to learn from")
        if not len(graph.triples["valid"]):
            raise TrainingError(
                f"graph {graph.version} has no validation triples: give data.triples.valid or data.split.valid, "
                "the best epoch is chosen by them"
            )
        self.graph, self.config, self.worker = graph, train, worker
        self.task = make_task(graph, read, model, train, worker)
        self.model, self.batches = self.task.model, self.task.batches
        self.batches.ahead = self.batches.ahead if graph.store is None else graph.store.ahead
        self.batches.shares = range(worker.rank, self.batches.world, worker.world)
        self.entity_inputs = self.task.entity_inputs()
        if train.adversarial and not self.entity_inputs:
            raise ConfigError("train.adversarial", train.adversarial, "0, as this model has no vectors of entities")
        self.side = "both" if "tail" in self.task.validated else "relation"
        self.metric = METRIC.replace("both", self.side)
        updates = -(-self.batches.steps // train.accumulate)
        self.ends = [train.epochs * (cycle + 1) // (snapshots + 1) for cycle in range(snapshots + 1)]
        epochs = [end - start for start, end in zip([0, *self.ends], self.ends, strict=False)]
        self.optimisers = Optimisers(self.model, train.optimiser, [updates * length for length in epochs])
        self.autocast = autocast_dtype(train.precision, worker.device)
        self.known = graph.answers(filter_splits("valid"))
        self.valid = self._valid_share()
        self.position = Position(parts=parts)
        self.batches.parts = parts
        self._pending: list[tuple[int, dict[str, torch.Tensor]]] = []
        shares = self.batches.size // train.batch_size
        self.run = {
            "graph": graph.version,
            "model": to_dict(model),
            "train": {k: v for k, v in to_dict(train).items() if k not in _NOT_IDENTITY},
            **({"snapshots": snapshots} if snapshots else {}),
            **({"shares": shares} if shares > 1 else {}),
        }
        # Initial weights above are the same on all ranks. One share draws its dropout as a stream, whose state is in
        # the checkpoint; of several, each seeds its own in every step, whoever computes it.
        torch.manual_seed(self._dropout_seed(0, worker.rank))

    def _valid_share(self) -> Int64:
        triples = self.graph.triples["valid"]
        if self.config.valid_triples is not None and self.config.valid_triples < len(triples):
            generator = np.random.default_rng(self.config.seed)
            triples = triples[np.sort(generator.permutation(len(triples))[: self.config.valid_triples])]
        return triples[self.worker.rank :: self.worker.world]

    def _dropout_seed(self, step: int, share: int) -> int:
        place = [self.config.seed, self.position.epoch, step, share]
        return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint of the same run."""
        state = load_checkpoint(folder, self.run)
        parts = max(self.position.parts, state["position"].get("parts", 1))
        self.position = Position(**{**state["position"], "parts": parts})
        self.batches.parts = parts
        self.model.load_state_dict(state["model"])
        self.optimisers.load_state_dict(state["optimisers"])
        torch.set_rng_state(state["rng"])
        states, own = state["cuda_rng"], self.worker.device.index or 0
        if self.worker.device.type == "cuda" and self.worker.rank == 0 and own < len(states):
            torch.cuda.set_rng_state(states[own], self.worker.device)
        self.worker.say("resumed at epoch %d, step %d", self.position.epoch, self.position.step)

    def fit(self) -> Fit:
        """Train until the epochs or the patience run out.

        Raises TrainingError on a non-finite loss, OutOfMemoryError where memory runs out with batches halved already.
        """
        with self.worker.watch.running():
            return self._fit()

    def _fit(self) -> Fit:
        at = self.position
        if self.task.pretrained and not at.history:
            at.history.append({"epoch": -1.0, **self._validate()})
            self.worker.say("before training: %s %.4f", self.metric, at.best)
        self._account("resume" if at.phases else "start")
        while at.epoch < self.config.epochs and not self._impatient():
            started = time.monotonic()
            self._epoch()
            row = {"epoch": float(at.epoch), **{f"train.{k}": v / at.steps for k, v in at.loss_sum.items()}}
            seconds = time.monotonic() - started
            at.epoch, at.step, at.steps, at.loss_sum = at.epoch + 1, 0, 0, {}
            if at.epoch % self.config.evaluate_every == 0 or at.epoch in self.ends:
                row |= self._validate()
            if at.epoch in self.ends[:-1]:
                at.snapshots.append(_copy(self.model))
            at.history.append(row)
            spent = self._account(f"epoch {at.epoch}")
            self._tell(row, seconds, spent)
            self._checkpoint(row | flat(spent))
        return self._finish()

    def finish_with(self, weights: Mapping[str, torch.Tensor]) -> Fit:
        """The run as if it had ended with these weights, without a step."""
        with self.worker.watch.running():
            self.model.load_state_dict(weights)
            self.position.history.append({"epoch": -1.0, **self._validate()})
            return self._finish()

    def _impatient(self) -> bool:
        # In cycles, the learning rate that rises anew makes validations worse for a while, and is meant to.
        return len(self.ends) == 1 and self.position.stale >= self.config.patience

    def _account(self, part: str) -> dict[str, Any]:
        """Note where the time since the last call went; the row of all ranks."""
        spent = self.worker.watch.take()
        self.worker.spent(spent)
        row = merged(part, self.worker.gather(spent))
        self.position.phases.append(row)
        return row

    def _epoch(self) -> None:
        """Take the steps of one epoch that are still to take; where memory runs out, those left with halved batches."""
        self.model.train()
        while True:
            try:
                return self._steps()
            except Exception as error:
                # Several workers must begin anew together: whoever started them does that (see distributed.py).
                reason = out_of_memory(error)
                if reason is None or (self.worker.world > 1 and self.position.parts == 1):
                    raise
            # Only here is the error gone, and with it what the broken step had in memory.
            freed()
            self._halve(reason)

    def _halve(self, reason: str) -> None:
        """Compute the share of a step in two batches from now on; raises OutOfMemoryError where that is so already."""
        at, size = self.position, self.config.batch_size
        if at.parts > 1 or size < 2:
            raise OutOfMemoryError(f"{reason}, with half a batch at a time; {self.task.smaller(self.config)}")
        at.parts = self.batches.parts = 2
        self._pending = [(step, parts) for step, parts in self._pending if step < at.step]
        for parameter in self.model.parameters():
            parameter.grad = None
        self.worker.say(
            "out of memory at epoch %d, step %d (%s): from here on a batch of %d is computed as two halves whose "
            "gradients are added up. %s", at.epoch, at.step, reason, size, self.task.halves,
        )  # fmt: skip

    def _steps(self) -> None:
        at, config = self.position, self.config
        last = self.batches.steps - 1
        said = time.monotonic()
        batches = self.batches.epoch(at.epoch, at.step, watch=self.worker.watch)
        for step in range(at.step, last + 1):
            self._pending.append((step, self.compute(step, batches)))
            update = (step + 1) % config.accumulate == 0 or step == last
            if not update:
                continue
            self.worker.average_gradients(self.model.parameters(), self.batches.world)
            self._move()
            at.step = step + 1
            due = config.checkpoint_steps and (step + 1) % config.checkpoint_steps == 0 and step != last
            if due or step == last or len(self._pending) >= CHECK_STEPS:
                self._settle()
            if due:
                self._checkpoint({"epoch": float(at.epoch), "step": float(at.step)})
            if time.monotonic() - said > LOG_SECONDS and at.steps:
                said = time.monotonic()
                loss = at.loss_sum["loss"] / at.steps
                self.worker.say("epoch %d: step %d of %d, loss %.4f", at.epoch, at.step, last + 1, loss)
        batches.close()  # its thread has ended: what it spent can be told

    def _move(self) -> None:
        try:
            with phase("optimiser"):
                self.optimisers.step()
        except Exception as error:
            reason = out_of_memory(error)
            if reason is None:
                raise
            # Some weights have moved and some have not: such a step cannot be taken again.
            raise OutOfMemoryError(f"{reason}, while the weights were moved; lower model.dim") from None

    def compute(self, step: int, batches: Iterator[Any]) -> dict[str, torch.Tensor]:
        """Add the gradients of this worker's shares of a step to the weights'; losses, summed over its shares."""
        total: dict[str, torch.Tensor] = {}
        for piece in self.batches.pieces(step):
            with phase("waiting"):
                batch = next(batches)
            if self.batches.world > 1:
                torch.manual_seed(self._dropout_seed(step, piece.share))
            for name, value in self._gradients(batch.to(self.worker.device), piece).items():
                total[name] = total[name] + value if name in total else value
        return total

    def _gradients(self, batch: Any, piece: Piece) -> dict[str, torch.Tensor]:
        """Add the gradients of one batch to the weights'; its loss and the parts of it."""
        if not self.config.adversarial:
            return self._backward(batch, piece)
        with watched(self.entity_inputs) as seen:
            parts = self._backward(batch, piece)
        with shifted(self.entity_inputs, seen, self.config.adversarial):
            return {**parts, "adversarial": self._backward(batch, piece)["loss"]}

    def _backward(self, batch: Any, piece: Piece) -> dict[str, torch.Tensor]:
        """Losses are means over triples: that of a part of a share counts by its number of them."""
        weight = piece.triples / piece.of
        kind, dtype = self.worker.device.type, self.autocast
        with phase("forward"), torch.autocast(kind, dtype, enabled=dtype is not None):
            loss, parts = self.task.loss(batch)
        with phase("backward"):
            (loss * weight / self.config.accumulate).backward()  # type: ignore[no-untyped-call]
        return {name: value * weight for name, value in {"loss": loss.detach(), **parts}.items()}

    def _settle(self) -> None:
        """Add finished losses, means over all shares, to the epoch's. Read in groups: each read makes a GPU wait."""
        at = self.position
        broken, own = "", []
        with phase("backward"):  # on a GPU this is where its kernels are waited for
            own = [{name: float(value) for name, value in parts.items()} for _, parts in self._pending]
        for (step, _), values in zip(self._pending, own, strict=True):
            if not broken and not all(math.isfinite(v) for v in values.values()):
                broken = f"epoch {at.epoch}, step {step} (" + ", ".join(f"{k}={v}" for k, v in values.items()) + ")"
        self._pending = []
        # All workers stop together: one that went on would wait in the next exchange for ever.
        told = self.worker.gather((broken, own))
        for steps in zip(*(values for _, values in told), strict=True):
            for name in steps[0]:
                mean = sum(values[name] for values in steps) / self.batches.world
                at.loss_sum[name] = at.loss_sum.get(name, 0.0) + mean
            at.steps += 1
        broken = next((b for b, _ in told if b), "")
        if broken:
            raise TrainingError(f"the loss became non-finite at {broken}: {self.task.remedy(self.config)}")

    def _validate(self) -> dict[str, float]:
        at = self.position
        with phase("evaluation", whole=True):
            metrics = self._rank(self.task.scorer())
        if metrics[self.metric] > at.best:
            at.best, at.best_epoch, at.stale = metrics[self.metric], at.epoch, 0
            at.best_weights = _copy(self.model)
        else:
            at.stale += 1
        return metrics

    def _rank(self, scorer: Scorer) -> dict[str, float]:
        """Validation metrics over all workers' shares."""
        counts = rank_triples(scorer, self.valid, self.known, split="valid", tasks=self.task.validated)
        whole = merge(self.worker.gather(counts))
        return {k: float(v) for k, v in whole.metrics().items() if f".{self.side}." in k}

    def _tell(self, row: Mapping[str, float], seconds: float, spent: Mapping[str, Any]) -> None:
        at = self.position
        left = (self.config.epochs - at.epoch) * seconds
        name = self.metric
        mrr = f", {name} {row[name]:.4f} (best {at.best:.4f} of epoch {at.best_epoch})" if name in row else ""
        self.worker.say(
            "epoch %d of %d: loss %.4f%s; %.0f s (%s), at most %.0f s left",
            at.epoch, self.config.epochs, row["train.loss"], mrr, seconds, brief(spent), left,
        )  # fmt: skip

    def _checkpoint(self, metrics: Mapping[str, float]) -> None:
        with phase("checkpointing", whole=True):
            if self.worker.rank != 0:
                return self.worker.report(metrics, None)
            with tempfile.TemporaryDirectory(prefix="kgray-checkpoint-") as folder:
                model, optimisers = self.model.state_dict(), self.optimisers.state_dict()
                save_checkpoint(Path(folder), self.run, self.position, model, optimisers)
                return self.worker.report(metrics, Path(folder))

    def _finish(self) -> Fit:
        at = self.position
        if at.best_weights:
            self.model.load_state_dict(at.best_weights)
        why = "patience ran out" if self._impatient() else "all epochs done"
        told = why, at.epoch, at.best_epoch, self.metric, at.best
        self.worker.say("%s after epoch %d: weights of epoch %d restored (%s %.4f)", *told)
        self.model.eval()
        with phase("evaluation", whole=True):
            scorer, best = self.task.finish(lambda scorer: self._rank(scorer)[self.metric], at.best, self.worker.say)
        self._account("end")
        how = self.metric, at.snapshots, at.phases, at.parts
        return Fit(self.task, scorer, at.history, at.best_epoch, best, *how)


def _copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}


_NOT_IDENTITY = (
    *("workers", "least_workers", "device", "cpus_per_worker", "max_failures", "checkpoint_steps", "preflight"),
)
"""Keys of TrainConfig that say where and how safely a run happens, not what it computes."""


def fit(
    graph: Graph,
    read: Vectors | Texts | None,
    model: TrainableConfig,
    train: TrainConfig,
    worker: Worker | None = None,
    resume: Path | None = None,
    snapshots: int = 0,
    parts: int = 1,
) -> Fit:
    """Train on one worker; call it directly in a notebook or a script, or under Ray Train with its worker.

    read: what the model reads besides the graph: text vectors, or (where the encoder itself learns) texts.
    resume: the folder of a checkpoint of the same run, or None to start. snapshots: how many weights to keep on the
    way, the learning rate falling once more than that; there is no early stopping then. parts: see :class:`Trainer`.
    """
    worker = worker or Worker(train.device)
    with worker.watch.running():
        trainer = Trainer(graph, read, model, train, worker, snapshots, parts)
        if resume is not None:
            trainer.resume(resume)
        elif train.preflight != "off":
            announce(trainer)
        return trainer.fit()
