"""When memory runs out: it is known for what it is, and the batch is halved once.

python3 -m pytest tests/unit/test_training_memory.py
"""

from __future__ import annotations

import logging
import mmap
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from kept_checkpoints import Keeping
from model_graphs import ONE_VS_ALL, SMALL, TRAIN, graph, vectors

from kgray.errors import OutOfMemoryError
from kgray.training.fused_task import FusedTask
from kgray.training.loop import fit
from kgray.training.memory_errors import out_of_memory

TOO_MUCH = 1 << 55


def caught(what: Any) -> BaseException:
    try:
        what()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_real_failures_of_allocation_are_known() -> None:
    told = out_of_memory(caught(lambda: torch.empty(TOO_MUCH, dtype=torch.uint8)))
    assert told is not None and "34,359,738,368 MiB more" in told
    assert out_of_memory(caught(lambda: np.empty(TOO_MUCH, dtype=np.uint8))) is not None
    assert out_of_memory(caught(lambda: mmap.mmap(-1, TOO_MUCH))) is not None
    assert out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")) == (
        "the GPU has no room: Tried to allocate 2.00 GiB"
    )


def test_nothing_else_is() -> None:
    for error in (RuntimeError("shape mismatch"), ValueError("memory"), KeyError("DefaultCPUAllocator"), OSError(28)):
        assert out_of_memory(error) is None


def test_what_ray_wraps_is_found() -> None:
    from ray.exceptions import OutOfMemoryError as Killed
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

    inner = caught(lambda: torch.empty(TOO_MUCH, dtype=torch.uint8))
    assert out_of_memory(UserExceptionWithTraceback(inner, "Traceback ...")) is not None
    killed = Killed("Task was killed due to the node running low on memory.")
    assert "memory monitor" in str(out_of_memory(WorkerHealthCheckFailedError("lost", killed)))
    assert out_of_memory(WorkerHealthCheckFailedError("lost", RuntimeError("connection reset"))) is None


class Short:
    """A model whose loss allocates more than there is where more than ``most`` queries are asked at once."""

    def __init__(self, most: int, after: int = 0) -> None:
        self.most, self.after, self.failed, self.calls = most, after, 0, 0
        self.loss = FusedTask.loss

    def __call__(self, task: Any, batch: Any) -> Any:
        self.calls += 1
        if len(batch.head) > self.most and self.calls > self.after:
            self.failed += 1
            torch.empty(TOO_MUCH, dtype=torch.uint8)
        return self.loss(task, batch)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_batch_is_halved_once_and_training_goes_on(
    accumulate: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO, "kgray")
    model = replace(ONE_VS_ALL, dropout=0.0, gnn=replace(SMALL.gnn, dropout=0.0))
    model = replace(model, structure=replace(model.structure, drop=0.0), text=replace(model.text, dropout=0.0))
    config = replace(TRAIN, accumulate=accumulate, epochs=2)
    undisturbed = fit(graph(), vectors(), model, config)
    short = Short(most=16, after=2)  # 16 triples are 32 queries
    monkeypatch.setattr(FusedTask, "loss", lambda task, batch: short(task, batch))
    worker = Keeping(tmp_path)
    halved = fit(graph(), vectors(), model, config, worker)
    assert short.failed == 1 and halved.parts == 2
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("out of memory")]
    assert "a batch of 16 is computed as two halves" in line and "results stay comparable" in line
    # The same candidates and no dropout: the same training, but for the order of sums.
    for name, value in undisturbed.model.state_dict().items():
        torch.testing.assert_close(halved.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    losses = [[row["train.loss"] for row in done.history] for done in (undisturbed, halved)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    resumed = fit(graph(), vectors(), model, config, resume=worker.kept[0])
    assert resumed.parts == 2 and short.failed == 1, "it is remembered"


def test_a_second_time_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    short = Short(most=4)
    monkeypatch.setattr(FusedTask, "loss", lambda task, batch: short(task, batch))
    with pytest.raises(OutOfMemoryError, match=r"half a batch at a time; lower train\.batch_size \(now 16"):
        fit(graph(), vectors(), SMALL, TRAIN)
    assert short.failed == 2
