"""How long a training will take, from a few of its first steps; what follows has the same bits as without."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch
from torch import nn

from kgray.phases import phase
from kgray.training.memory_errors import out_of_memory

if TYPE_CHECKING:
    from kgray.training.loop import Trainer

STEPS = 3
"""Of which the first is not timed: it makes what later ones find made."""

_WORTH = 100
"""A probe must cost at most one in so many steps of the training."""


def announce(trainer: Trainer) -> None:
    """Log how long the training will take, where it is long enough for that to be worth asking."""
    total = trainer.config.epochs * trainer.batches.steps
    if total < _WORTH * STEPS:
        return
    try:
        seconds = seconds_a_step(trainer)
    except Exception as error:
        if out_of_memory(error) is None or trainer.worker.world > 1:
            raise
        seconds = None  # training comes to the same step, and halves the batch
    if seconds is not None:
        trainer.worker.say("%s", told(trainer, seconds))


def told(trainer: Trainer, seconds: float) -> str:
    """In words."""
    config, steps = trainer.config, trainer.batches.steps
    return (
        f"time: {1000 * seconds:.0f} ms a step, {steps} steps an epoch: {minutes(seconds * steps)} an epoch, at most "
        f"{minutes(seconds * steps * config.epochs)} for train.epochs={config.epochs}, validation and checkpoints apart"
    )


def minutes(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def seconds_a_step(trainer: Trainer, steps: int = STEPS) -> float | None:
    """The mean of the steps after the first, on real data, gradients exchanged and all; None where the loss is not
    finite, which training itself then tells. To be called by every rank, before training.

    Weights, optimisers, statistics of batch normalisation and random streams are left as they were.
    """
    steps = min(steps, trainer.batches.steps)
    norms = [m for m in trainer.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    devices = [trainer.worker.device] if trainer.worker.device.type == "cuda" else []
    batches = trainer.batches.epoch(0)
    was_training = trainer.model.training
    trainer.model.train()
    times = []
    try:
        with phase("preflight", whole=True), torch.random.fork_rng(devices):
            for step in range(steps):
                begin = time.perf_counter()
                loss = float(trainer.compute(step, batches)["loss"])
                if not all(trainer.worker.gather(math.isfinite(loss))):
                    return None
                trainer.worker.average_gradients(trainer.model.parameters(), trainer.batches.world)
                trainer.optimisers.rehearse()
                times.append(time.perf_counter() - begin)
    finally:
        batches.close()
        for parameter in trainer.model.parameters():
            parameter.grad = None
        trainer.optimisers.forget()
        for norm, buffers in zip(norms, before, strict=True):
            for name, value in buffers.items():
                norm.get_buffer(name).copy_(value)
        trainer.model.train(was_training)
    timed = times[1:] or times
    slowest: float = max(trainer.worker.gather(sum(timed) / len(timed)))
    return slowest
