"""Steps of training: which triples, which candidates, which neighbours.

Everything is drawn from (seed, epoch, step, rank), so any step of any run can be made again on its own: that is what
the sampler position in a checkpoint means.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import numpy as np
import torch

from kgray.graph.filter_index import KnownAnswers
from kgray.graph.members import Members
from kgray.graph.neighbours import Int64
from kgray.graph.sampler import NeighbourSampler, step_generator
from kgray.graph.store import AHEAD, GraphStore, Triples
from kgray.model.config import ModelConfig
from kgray.model.fused import Neighbourhood
from kgray.model.objectives import Batch
from kgray.reasoning.facts import spread

B = TypeVar("B")


class StepMaker(ABC, Generic[B]):
    """Steps of one worker, whatever a batch of them holds.

    triples: T training triples; known is built from the same ones. limit: triples an epoch, drawn anew for each; None
    takes all.
    """

    ahead = AHEAD

    def __init__(
        self,
        triples: Triples,
        known: KnownAnswers,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        limit: int | None = None,
    ) -> None:
        self.triples = triples
        self.per_epoch = len(triples) if limit is None else min(limit, len(triples))
        self.known = known
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self._order: tuple[int, Int64] | None = None

    @property
    def steps(self) -> int:
        """Steps an epoch, the same for every rank; the last one may be smaller."""
        return -(-self.per_epoch // (self.batch_size * self.world))

    @abstractmethod
    def make(self, epoch: int, step: int) -> B:
        """The batch of one step."""

    def _positions(self, epoch: int, step: int) -> Int64:
        """Positions of this rank's triples in the step; every triple is in exactly one batch an epoch."""
        together = self._together(epoch, step)
        share = np.array_split(together, self.world)[self.rank]
        # A last step with fewer triples than workers: an empty batch would have no loss, so one is seen twice.
        return share if len(share) else together[:1]

    def _together(self, epoch: int, step: int) -> Int64:
        """Positions of all ranks' triples in the step."""
        if self._order is None or self._order[0] != epoch:
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
            self._order = (epoch, generator.permutation(len(self.triples))[: self.per_epoch])
        size = self.batch_size * self.world
        return self._order[1][step * size : (step + 1) * size]

    def other_answers(
        self, heads: Int64, relations: Int64, tails: Int64, among: Members | None = None
    ) -> tuple[Int64, Int64]:
        """Training answers other than the gold one to b triples' tail queries (rows from 0) and head queries (rows
        from b): query rows and entities. among: the only entities wanted; None wants all.

        What several triples ask is looked up once: half a batch may ask for the neighbours of one hub of millions.
        """
        rows_t, entities_t = _once(self.known.tails, heads, relations, among)
        rows_h, entities_h = _once(self.known.heads, relations, tails, among)
        other_t, other_h = entities_t != tails[rows_t], entities_h != heads[rows_h]
        rows = np.concatenate([rows_t[other_t], rows_h[other_h] + len(heads)])
        return rows, np.concatenate([entities_t[other_t], entities_h[other_h]])

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[B]:
        """Batches from ``first_step`` on, made by a thread, at most :attr:`ahead` of them before their use."""
        ready: queue.Queue[B | BaseException | None] = queue.Queue(maxsize=self.ahead)
        stop = threading.Event()

        def put(item: B | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return
                except queue.Full:
                    continue

        def produce() -> None:
            try:
                for step in range(first_step, self.steps):
                    if stop.is_set():
                        return
                    put(self.make(epoch, step))
                put(None)
            except BaseException as error:  # handed to the consumer, who raises it
                put(error)

        thread = threading.Thread(target=produce, daemon=True, name="kgray-batches")
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()


class BatchMaker(StepMaker[Batch]):
    """Batches of the fused model.

    pseudo: (P, 3) int64 targets after the training triples; they carry no messages. known: answers to training and
    pseudo triples; None where there are no more than the store's. pool: entities that may be candidates, None for all.
    """

    def __init__(
        self,
        store: GraphStore,
        model: ModelConfig,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        pool: Int64 | None = None,
        pseudo: Int64 | None = None,
        known: KnownAnswers | None = None,
    ) -> None:
        targets: Triples = store.triples if pseudo is None or not len(pseudo) else Appended(store.triples, pseudo)
        super().__init__(targets, known or store.known, batch_size, seed, rank, world)
        self.store = store
        self.ahead = store.ahead
        self.config = model
        self.pool = pool
        self.num_relations = store.num_relations
        self.num_entities = store.num_entities
        self.sampler = NeighbourSampler(store.messages, model.gnn.fanouts) if model.gnn.kind != "none" else None
        self.by_pair = model.gnn.remove == "pair"
        self.one_vs_all = model.objective.kind == "one_vs_all"
        self.candidates = self.num_entities if pool is None else len(pool)
        self.negatives = min(model.objective.negatives, self.candidates)
        self._local = np.full(self.num_entities, -1, dtype=np.int64)
        self._log_inclusion = None if self.one_vs_all else self._inclusion(pseudo)

    def _inclusion(self, pseudo: Int64 | None) -> torch.Tensor:
        """(N,) log probability that an entity is among a step's candidates."""
        # An edge into an entity for each triple it is head of and each it is tail of.
        degrees = self.store.messages.degrees.astype(np.int64)
        if pseudo is not None and len(pseudo):
            degrees = degrees + np.bincount(pseudo[:, [0, 2]].ravel(), minlength=self.num_entities)
        touched = np.minimum(degrees / max(len(self.triples), 1), 1.0)
        absent = (1 - touched) ** self.batch_size * (1 - self.negatives / self.candidates)
        return torch.from_numpy(np.log(np.maximum(1 - absent, 1e-9)).astype(np.float32))

    def make(self, epoch: int, step: int) -> Batch:
        """The batch of one step."""
        generator = step_generator(self.seed, epoch, step, self.rank)
        positions = self._positions(epoch, step)
        heads, relations, tails = self.triples[positions].T
        seeds = self._candidates(heads, tails, generator)
        blocks = []
        if self.sampler is not None:
            own = self.store.same_pair(heads, tails) if self.by_pair else positions
            own = own[own < len(self.store.triples)]  # pseudo-labels, which follow, carry no messages
            blocks = self.sampler.sample(seeds, generator, exclude=own)
        local = self._local
        local[seeds] = np.arange(len(seeds))
        head, tail = local[heads], local[tails]
        known_query, known_candidate = self._known(heads, relations, tails, seeds)
        local[seeds] = -1
        return Batch(
            neighbourhood=Neighbourhood.of(torch.from_numpy(seeds), blocks),
            head=torch.from_numpy(np.concatenate([head, tail])),
            relation=torch.from_numpy(np.concatenate([relations, relations + self.num_relations])),
            tail=torch.from_numpy(np.concatenate([tail, head])),
            known_query=torch.from_numpy(known_query),
            known_candidate=torch.from_numpy(known_candidate),
            log_inclusion=None if self._log_inclusion is None else self._log_inclusion[torch.from_numpy(seeds)],
        )

    def _candidates(self, heads: Int64, tails: Int64, generator: np.random.Generator) -> Int64:
        if self.one_vs_all:
            return np.arange(self.num_entities) if self.pool is None else self.pool
        negatives = generator.integers(0, self.candidates, self.negatives)
        if self.pool is not None:
            negatives = self.pool[negatives]
        return np.unique(np.concatenate([heads, tails, negatives]))

    def _known(self, heads: Int64, relations: Int64, tails: Int64, seeds: Int64) -> tuple[Int64, Int64]:
        """Query rows and candidate columns of training answers other than the gold one."""
        everybody = len(seeds) == self.num_entities
        rows, entities = self.other_answers(heads, relations, tails, None if everybody else Members(seeds))
        return rows, self._local[entities]


class Appended:
    """Triples, and others after them."""

    def __init__(self, first: Triples, more: Int64) -> None:
        self.first, self.more = first, more

    def __len__(self) -> int:
        return len(self.first) + len(self.more)

    def __getitem__(self, positions: Int64) -> Int64:
        after = positions >= len(self.first)
        rows = np.empty((len(positions), 3), dtype=np.int64)
        rows[~after] = self.first[positions[~after]]
        rows[after] = self.more[positions[after] - len(self.first)]
        return rows


def _once(
    lookup: Callable[[Int64, Int64, Members | None], tuple[Int64, Int64]],
    first: Int64,
    second: Int64,
    among: Members | None,
) -> tuple[Int64, Int64]:
    """``lookup(first, second, among)``, each distinct question asked once."""
    asked, which = np.unique(np.stack([first, second], axis=1), axis=0, return_inverse=True)
    left, right = np.ascontiguousarray(asked.T)
    rows, answers = lookup(left, right, among)
    lengths = np.bincount(rows, minlength=len(asked))
    starts = np.cumsum(lengths) - lengths
    which = which.reshape(-1)
    again, place = spread(starts[which], lengths[which])
    return again, answers[place]
