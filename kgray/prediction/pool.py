"""Work on a pool of Ray actors that may die: each item once to the end, each actor's state made once.

Ray Data's actor pool retries for ever what kills its worker, and Ray's own ``ActorPool`` not at all. Here all that a
worker was asked when it died is suspect, and given to another alone; of whom a worker died that had nothing else to do
counts an attempt, and after some the job ends and names it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from kgray.errors import ClusterError
from kgray.runtime import remote_errors

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

ATTEMPTS = 3
"""Workers that may die of an item alone before it is given up."""

_IN_FLIGHT = 2
"""Items given to a worker at once: it need not wait for the driver between them."""


_SAY_EVERY_S = 30.0


class _Body:
    """What runs in the actor."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        from kgray.runtime import worker_progress

        worker_progress()
        self._work = make()

    def ready(self) -> None:
        """Answered once the actor has its place on a node."""

    def work(self, item: Any) -> Any:
        return self._work(item)


@dataclass(eq=False)
class _Worker(Generic[Item]):
    """An actor, what was asked of it, oldest first, and whether it has a place on a node."""

    actor: Any
    starting: Any
    asked: dict[Any, Item] = field(default_factory=dict)
    ready: bool = False


class Pool(Generic[Item, Result]):
    """A context manager: leaving it ends the actors.

    make: called in each actor, gives the function that is called with each item. size: actors; they are spread over the
    nodes of the cluster, with one CPU each. An actor that finds no place does not hold up the others.
    """

    def __init__(self, make: Callable[[], Callable[[Item], Result]], size: int) -> None:
        self._make = make
        self._size = size
        self._workers: list[_Worker[Item]] = []
        self._stillborn = 0

    def __enter__(self) -> Pool[Item, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers.clear()

    def run(self, items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        """Items with their results, in the order in which they are done.

        Raises what the function raises, and ClusterError for an item that ATTEMPTS workers died of.
        """
        import ray

        waiting = deque(items)
        attempts: dict[Item, int] = {}  # of suspects
        left = len(items)
        while left:
            while len(self._workers) < min(self._size, left):
                self._start()
            self._hand_out(waiting, attempts)
            watched = {w.starting: w for w in self._workers if not w.ready}
            watched |= {answer: w for w in self._workers for answer in w.asked}
            done, _ = ray.wait(list(watched), num_returns=1, timeout=_SAY_EVERY_S)
            if not done:
                if not any(worker.ready for worker in self._workers):
                    log.info("waiting for a free CPU of the cluster")
                continue
            worker = watched[done[0]]
            try:
                with remote_errors():
                    result = ray.get(done[0])
            except _deaths() as error:
                self._bury(worker, error, waiting, attempts)
                continue
            if done[0] is worker.starting:
                worker.ready = True
                continue
            left -= 1
            yield worker.asked.pop(done[0]), result

    def _start(self) -> None:
        import ray

        actor = ray.remote(_Body).options(num_cpus=1, max_restarts=0, scheduling_strategy="SPREAD").remote(self._make)
        self._workers.append(_Worker(actor, actor.ready.remote()))

    def _hand_out(self, waiting: deque[Item], suspects: Container[Item]) -> None:
        """To the least busy first, so that the last items are spread; suspects to workers that do nothing else."""
        while waiting:
            free = [w for w in self._workers if w.ready and not any(item in suspects for item in w.asked.values())]
            worker = min(free, key=lambda w: len(w.asked), default=None)
            if worker is None or len(worker.asked) >= (1 if waiting[0] in suspects else _IN_FLIGHT):
                return
            item = waiting.popleft()
            worker.asked[worker.actor.work.remote(item)] = item

    def _bury(
        self, worker: _Worker[Item], error: Exception, waiting: deque[Item], attempts: dict[Item, int]
    ) -> None:
        """Take back what a dead worker was asked."""
        import ray

        self._workers.remove(worker)
        ray.kill(worker.actor)  # it may only be out of reach
        items = list(worker.asked.values())
        waiting.extendleft(reversed(items))
        reason = " ".join(str(error).split())[:300]
        if not items:
            self._stillborn += 1
            if self._stillborn >= ATTEMPTS * self._size:
                raise ClusterError(f"workers die before they begin: {reason}") from error
            return
        for item in items:
            attempts[item] = attempts.get(item, 0) + (len(items) == 1)
        if attempts[items[0]] >= ATTEMPTS:
            raise ClusterError(f"{ATTEMPTS} workers died, one after the other, of {items[0]}: {reason}") from error
        log.warning("a worker died (%s); what it had not finished is given to another", reason)


def _deaths() -> tuple[type[Exception], ...]:
    """What Ray raises where a worker or its node is gone."""
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

    return (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)
