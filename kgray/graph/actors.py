"""Owners of partitions as Ray actors: the one file of this room that knows Ray.

The driver starts them and holds them: they die with it, or when it lets go. An actor that is killed starts again by
itself and maps its rows anew; they never change, so a question that got lost is asked again, of a replica or of the
owner once it is back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)

from kgray.artifact import Artifact
from kgray.errors import GraphStoreError, KgrayError, TrainingError
from kgray.graph.config import StoreConfig
from kgray.graph.partitioned import PartitionedStore, Request
from kgray.graph.shard import DEGREES, Layout, Shard, mapped, shard_folder
from kgray.runtime import worker_progress

log = logging.getLogger(__name__)

LOOK_S = 5.0
"""How long an answer is waited for before its owner is looked after."""
MOST_PAUSE_S = 1.0
_LOST = (RayActorError, ObjectLostError, NodeDiedError, OutOfMemoryError)


class Owner:
    """A shard in a process of its own. Opened when first asked: an error then reaches whoever asked as itself."""

    def __init__(self, shards: Artifact, part: int) -> None:
        worker_progress()
        self.shards, self.part = shards, part

    @cached_property
    def shard(self) -> Shard:
        """Mapped, its hashes compared."""
        return Shard.open(self.shards, self.part)

    def answer(self, method: str, *arguments: Any) -> Any:
        """What the shard's method answers."""
        return getattr(self.shard, method)(*arguments)

    def size(self) -> int:
        """Bytes of the shard; there to be asked whether it is up."""
        return self.shard.nbytes


@dataclass(frozen=True)
class Owners:
    """Handles of all owners of a graph; travels to workers. actors: by partition, then replica."""

    shards: Artifact
    actors: tuple[tuple[Any, ...], ...]
    config: StoreConfig

    def connect(self, rank: int) -> PartitionedStore:
        """The graph as a training worker sees it. rank: spreads workers over replicas."""
        layout = Layout.read(self.shards)
        transport = ActorTransport(self.actors, self.config.patience_s, rank)
        degrees = mapped(self.shards.local_path(DEGREES))
        store = PartitionedStore(layout, degrees, transport, self.config.cache_mib << 20, self.config.prefetch)
        kept = store.messages.kept
        size = kept.nbytes / 2**20
        log.info("graph %s: rows of %d entities kept here, %.1f MiB", layout.version, len(kept.nodes), size)
        return store


class ActorTransport:
    """See :class:`~kgray.graph.partitioned.Transport`.

    patience_s: how long an owner (all replicas of it) may be out of reach before GraphStoreError is raised.
    """

    def __init__(self, actors: Sequence[Sequence[Any]], patience_s: float, first: int = 0) -> None:
        self.actors, self.patience_s = actors, patience_s
        self.turn = first

    def ask(self, requests: Sequence[Request]) -> list[Any]:
        """The answers, in order."""
        replica = self.turn
        waiting = [self._send(request, replica) for request in requests]
        try:
            return ray.get(waiting, timeout=LOOK_S)  # type: ignore[no-any-return]
        except (*_LOST, GetTimeoutError, RayTaskError):
            return [self._insist(one, sent, replica) for one, sent in zip(requests, waiting, strict=True)]

    def _send(self, request: Request, replica: int) -> Any:
        owners = self.actors[request.part]
        return owners[replica % len(owners)].answer.remote(request.method, *request.arguments)

    def _insist(self, request: Request, sent: Any, replica: int) -> Any:
        """The answer to one request, asked again until the patience is out; it counts from the last sign of life."""
        deadline = time.monotonic() + self.patience_s
        pause, failures = 0.05, 0
        while True:
            try:
                left = max(0.1, deadline - time.monotonic())
                # A replica may answer while this one hangs; without one there is nobody else to ask.
                several = len(self.actors[request.part]) > 1
                return ray.get(sent, timeout=min(LOOK_S, left) if several else left)
            except RayTaskError as error:
                raise (error.cause if isinstance(error.cause, KgrayError) else error) from None
            except (*_LOST, GetTimeoutError) as error:
                failures += 1
                if time.monotonic() >= deadline:
                    raise GraphStoreError(
                        f"partition {request.part} of the graph did not answer for {self.patience_s:g} s, asked "
                        f"{failures} times ({_first_line(error)}): more memory or nodes for its owner, graph.replicas "
                        "above 1, or a larger graph.patience_s"
                    ) from None
                if failures == 1:
                    log.warning("partition %d of the graph is out of reach: %s", request.part, _first_line(error))
                time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
                pause = min(2 * pause, MOST_PAUSE_S)
                replica += 1
                self.turn = replica  # the others of the next question need not find out again
                sent = self._send(request, replica)


@contextmanager
def owners(shards: Artifact, config: StoreConfig) -> Iterator[Owners]:
    """Start an actor for each partition and replica, for the length of the ``with``.

    Raises TrainingError where the cluster has too little memory for them, ArtifactError for a damaged shard.
    """
    layout = Layout.read(shards)
    sizes = [
        sum(shards.bytes_of(name) for name in shards.files(shard_folder(part) + "/")) for part in range(layout.parts)
    ]
    _check_memory(sizes, config)
    remote = ray.remote(Owner)
    actors = tuple(
        tuple(
            remote.options(
                num_cpus=0, memory=max(size, 1), max_restarts=-1, scheduling_strategy="SPREAD"
            ).remote(shards, part)
            for _ in range(config.replicas)
        )
        for part, size in enumerate(sizes)
    )
    try:
        _wait([actor for replicas in actors for actor in replicas], config.patience_s)
        log.info(
            "graph %s: %d partitions, %.1f MiB, %d actor(s) each", layout.version, layout.parts, sum(sizes) / 2**20,
            config.replicas,
        )  # fmt: skip
        yield Owners(shards, actors, config)
    finally:
        for actor in (actor for replicas in actors for actor in replicas):
            ray.kill(actor)


def _check_memory(sizes: Sequence[int], config: StoreConfig) -> None:
    wanted = sum(sizes) * config.replicas
    has = int(ray.cluster_resources().get("memory", 0))
    largest = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if max(sizes) > largest:
        raise TrainingError(
            f"a partition of the graph needs {max(sizes) / 2**30:.1f} GiB of memory, the largest node of the cluster "
            f"has {largest / 2**30:.1f}: a larger graph.partitions"
        )
    if wanted > has:
        raise TrainingError(
            f"graph.store=partitioned needs {wanted / 2**30:.1f} GiB of memory for {config.replicas} replica(s) of the "
            f"graph, the cluster has {has / 2**30:.1f}: more nodes, or a smaller graph.replicas"
        )


def _wait(actors: Sequence[Any], patience_s: float) -> None:
    """Until all are up; an error of one is raised as itself, GraphStoreError where none comes up for that long."""
    waiting = [actor.size.options(max_task_retries=-1).remote() for actor in actors]
    everyone, since = list(waiting), time.monotonic()
    while waiting:
        up, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=10.0)
        since = time.monotonic() if up else since
        if waiting:
            log.info("graph store: %d of %d actors are up", len(everyone) - len(waiting), len(everyone))
        if waiting and time.monotonic() - since > patience_s:
            raise GraphStoreError(
                f"{len(waiting)} of {len(everyone)} actors of the graph found no place, or were not up, in "
                f"{patience_s:g} s: more free memory or nodes, or a larger graph.patience_s"
            )
    for reference in everyone:
        try:
            ray.get(reference)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, KgrayError) else error) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
