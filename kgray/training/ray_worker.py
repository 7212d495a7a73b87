"""A worker of Ray Train, and what runs in its controller. Knows Ray; imported where Ray is."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
from ray.util import metrics

from kgray.artifact.filesystem import exists, join, read_bytes, resolve, write_bytes
from kgray.phases import Spent
from kgray.training.checkpoint import PREFIX
from kgray.training.memory_errors import out_of_memory
from kgray.training.worker import Worker

log = logging.getLogger(__name__)


class RayWorker(Worker):
    """Reports to Ray Train, and what it spent as Ray's metrics. model: the label of those, the version it trains.

    ``ray_kgray_train_phase_seconds_total{model, rank, phase}`` and ``ray_kgray_train_counted_total{model, rank, what}``
    grow once an epoch, on the metrics port of the node.
    """

    def __init__(self, model: str) -> None:
        device = ray.train.torch.get_device()
        super().__init__("cuda" if device.type == "cuda" else "cpu")
        self.device = device
        # An attempt never writes where an earlier one did: Ray prunes by path, and would take both.
        self._attempt = secrets.token_hex(2)
        tags = {"model": model, "rank": str(self.rank)}
        self._seconds = metrics.Counter(
            "kgray_train_phase_seconds", "Seconds of a training worker by phase.", tag_keys=(*tags, "phase")
        )
        self._counted = metrics.Counter(
            "kgray_train_counted", "What a training worker went through.", tag_keys=(*tags, "what")
        )
        for counter in (self._seconds, self._counted):
            counter.set_default_tags(tags)

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        """The name is that of the next step to take, so that names sort by age."""
        epoch = int(metrics["epoch"]) + (0 if "step" in metrics else 1)
        name = f"{PREFIX}{epoch:04d}-step-{int(metrics.get('step', 0)):08d}-{self._attempt}"
        kept = None if checkpoint is None else ray.train.Checkpoint.from_directory(str(checkpoint))
        ray.train.report({k: float(v) for k, v in metrics.items()}, checkpoint=kept, checkpoint_dir_name=name)

    def spent(self, spent: Spent) -> None:
        for name, seconds in spent.seconds.items():
            if seconds > 0:  # Ray refuses to count nothing
                self._seconds.inc(seconds, {"phase": name})
        for name, number in spent.counts.items():
            if number > 0:
                self._counted.inc(number, {"what": name})


@dataclass(frozen=True)
class Halving:
    """Whether memory ran out in an earlier attempt at a run; kept beside its checkpoints. run: URI of its folder."""

    run: str

    def reason(self) -> str | None:
        """What ran out, or None."""
        filesystem, path = resolve(join(self.run, "halved.txt"))
        return read_bytes(filesystem, path).decode() if exists(filesystem, path) else None

    def decide(self, reason: str) -> None:
        """Every attempt from now on computes its batches as two halves."""
        filesystem, path = resolve(join(self.run, "halved.txt"))
        write_bytes(filesystem, path, reason.encode())


def reporter(on_metrics: Callable[[int, Mapping[str, float]], None] | None, halving: Halving) -> Any:
    """What Ray Train's controller, which outlives its workers, is to do: pass numbers on, and see why a worker died."""

    class Reporter(ray.train.UserCallback):  # type: ignore[misc]
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            row = {k: v for k, v in metrics[0].items() if isinstance(v, float)}
            if on_metrics is not None and "step" not in row:
                on_metrics(int(row["epoch"]), row)

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for rank, error in worker_exceptions.items():
                reason = out_of_memory(error)
                if reason is not None and halving.reason() is None:
                    halving.decide(f"worker {rank}: {reason}")

    return Reporter()
