"""Numbers from Ray Train's controller to the run in MLflow, while training goes on. Floor 6.

Reports arrive in the controller, a process of its own; MLflow has one writer, the driver, which has imported
it already. Between them stands a queue actor, and a thread here that writes what comes out of it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kgray.lineage.tracking import Run

log = logging.getLogger(__name__)

_POLL_S = 1.0
_DRAIN_S = 10.0
_AT_ONCE = 256


@dataclass(frozen=True)
class _Send:
    """Picklable: what the controller calls. It never waits and never fails training."""

    queue: Any

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        self.queue.actor.put_nowait.remote((int(step), dict(values)))


@contextlib.contextmanager
def relay(run: Run) -> Iterator[Callable[[int, Mapping[str, float]], None] | None]:
    """A function (step, numbers) that any process of the cluster may call; None where MLflow records nothing.

    Needs a Ray session. What was sent before the block ends is written before it is left.
    """
    if run.id is None or not run.tracker.active:
        yield None
        return
    from ray.util.queue import Queue

    queue = Queue(actor_options={"num_cpus": 0})
    done = threading.Event()
    writer = threading.Thread(target=_write, args=(queue, run, done), name="kgray-metrics", daemon=True)
    writer.start()
    try:
        yield _Send(queue)
    finally:
        done.set()
        writer.join(timeout=_DRAIN_S)
        queue.shutdown(force=True)


def _write(queue: Any, run: Run, done: threading.Event) -> None:
    """Move what the queue holds to MLflow until ``done``, and then once more."""
    import ray

    last = False
    while not last:
        last = done.wait(_POLL_S)
        try:
            waiting = ray.get(queue.actor.qsize.remote(), timeout=_DRAIN_S)
            while waiting:
                take = min(waiting, _AT_ONCE)
                for step, values in ray.get(queue.actor.get_nowait_batch.remote(take), timeout=_DRAIN_S):
                    run.metrics(step, values)
                waiting -= take
        except Exception as error:
            # The numbers are in the model's history too; losing the curve in MLflow is no reason to stop
            # training.
            log.warning("numbers of this training no longer reach MLflow: %s", error)
            return
