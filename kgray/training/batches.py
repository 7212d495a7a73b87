"""Steps of training: which triples, which candidates, which neighbours.

Everything is drawn from (seed, epoch, step, rank), so any step of any run can be made again on its own: that is what
the sampler position in a checkpoint means.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from kgray.graph.filter_index import KnownAnswers
from kgray.graph.members import Members
from kgray.graph.neighbours import Int64
from kgray.graph.sampler import NeighbourSampler, step_generator
from kgray.graph.store import AHEAD, GraphStore, Triples
from kgray.model.config import ModelConfig
from kgray.model.fused import Neighbourhood
from kgray.model.objectives import Batch
from kgray.phases import Phases, counted, phase
from kgray.reasoning.facts import spread

B = TypeVar("B")
Batches: TypeAlias = Generator[B, None, None]


@dataclass(frozen=True, slots=True)
class Piece:
    """What a worker computes at once of a step: a share of its triples, or a part of one.

    share: its number, 0 to world - 1. part, parts: which part of it. triples, of: how many it has, and its share.
    """

    share: int
    part: int = 0
    parts: int = 1
    triples: int = 1
    of: int = 1


class StepMaker(ABC, Generic[B]):
    """Steps of one worker, whatever a batch of them holds.

    triples: T training triples; known is built from the same ones. limit: triples an epoch, drawn anew for each; None
    takes all.

    The triples of a step are split into ``world`` shares, and everything in a share's batch is drawn by the number of
    the share: which worker computes it changes nothing. shares: those this worker takes, in turn; as made, the one of
    its rank. parts: how many batches a share is computed in.
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
        self.size = batch_size * world
        self.shares: Sequence[int] = (rank,)
        self.parts = 1
        self._order: tuple[int, Int64] | None = None

    @property
    def steps(self) -> int:
        """Steps an epoch, the same for every rank; the last one may be smaller."""
        return -(-self.per_epoch // self.size)

    @abstractmethod
    def make(self, epoch: int, step: int, piece: Piece | None = None) -> B:
        """The batch of one step: that piece of it, by default the share of this worker's rank."""

    def pieces(self, step: int) -> list[Piece]:
        """What this worker computes of a step, in turn; as many on every worker that has as many shares."""
        triples = min(self.size, self.per_epoch - step * self.size)
        parts = self.parts if triples >= self.parts * self.world else 1
        pieces = []
        for share in self.shares:
            whole = max(1, _length(triples, share, self.world))
            pieces += [Piece(share, part, parts, _length(whole, part, parts), whole) for part in range(parts)]
        return pieces

    def _positions(self, epoch: int, step: int, piece: Piece | None = None) -> Int64:
        """Positions of the triples of a piece; every triple is in exactly one an epoch."""
        piece = piece or Piece(self.rank)
        positions = self._share(epoch, step, piece.share)
        if piece.parts > 1:
            positions = np.array_split(positions, piece.parts)[piece.part]
        return positions

    def _share(self, epoch: int, step: int, share: int) -> Int64:
        """Positions of the triples of a whole share."""
        together = self._together(epoch, step)
        positions = np.array_split(together, self.world)[share]
        # A last step with fewer triples than workers: an empty batch would have no loss, so one is seen twice.
        return positions if len(positions) else together[:1]

    def _together(self, epoch: int, step: int) -> Int64:
        """Positions of all ranks' triples in the step."""
        if self._order is None or self._order[0] != epoch:
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
            self._order = (epoch, generator.permutation(len(self.triples))[: self.per_epoch])
        return self._order[1][step * self.size : (step + 1) * self.size]

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

    def epoch(self, epoch: int, first_step: int = 0, watch: Phases | None = None) -> Batches[B]:
        """Batches of the pieces of each step from ``first_step`` on, made by a thread, at most :attr:`ahead` of them
        before their use.

        watch: told what that takes; it may be looked at once this is closed.
        """
        sampling = Phases() if watch is None else watch.ahead()
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
                with sampling.running():
                    for step in range(first_step, self.steps):
                        for piece in self.pieces(step):
                            if stop.is_set():
                                return
                            with phase("sampling"):
                                counted("triples", piece.triples)
                                batch = self.make(epoch, step, piece)
                            put(batch)
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
        self._touched = None if self.one_vs_all else self._share_of_steps(pseudo)
        self._log_inclusion: dict[int, torch.Tensor] = {}

    def _share_of_steps(self, pseudo: Int64 | None) -> NDArray[np.float64]:
        """(N,) chance that a triple drawn holds an entity."""
        # An edge into an entity for each triple it is head of and each it is tail of.
        degrees = self.store.messages.degrees.astype(np.int64)
        if pseudo is not None and len(pseudo):
            degrees = degrees + np.bincount(pseudo[:, [0, 2]].ravel(), minlength=self.num_entities)
        return np.minimum(degrees / max(len(self.triples), 1), 1.0)

    def _inclusion(self, parts: int) -> torch.Tensor | None:
        """(N,) log probability that an entity is among the candidates of a share that is computed in so many parts;
        None where all always are."""
        if self._touched is not None and parts not in self._log_inclusion:
            absent = (1 - self._touched) ** (self.batch_size / parts) * (1 - self.negatives / self.candidates)
            known = torch.from_numpy(np.log(np.maximum(1 - absent, 1e-9)).astype(np.float32))
            self._log_inclusion[parts] = known
        return self._log_inclusion.get(parts)

    def make(self, epoch: int, step: int, piece: Piece | None = None) -> Batch:
        """The batch of one step; the messages of the whole share's triples are withheld, be it computed in parts."""
        piece = piece or Piece(self.rank)
        generator = step_generator(self.seed, epoch, step, piece.share)
        positions = self._positions(epoch, step, piece)
        heads, relations, tails = self.triples[positions].T
        seeds = self._candidates(heads, tails, generator)
        blocks = []
        if self.sampler is not None:
            own = positions if piece.parts == 1 else self._share(epoch, step, piece.share)
            if self.by_pair:
                ends = self.triples[own]
                own = self.store.same_pair(ends[:, 0], ends[:, 2])
            own = own[own < len(self.store.triples)]  # pseudo-labels, which follow, carry no messages
            blocks = self.sampler.sample(seeds, generator, exclude=own)
        local = self._local
        local[seeds] = np.arange(len(seeds))
        head, tail = local[heads], local[tails]
        known_query, known_candidate = self._known(heads, relations, tails, seeds)
        local[seeds] = -1
        inclusion = self._inclusion(piece.parts)
        return Batch(
            neighbourhood=Neighbourhood.of(torch.from_numpy(seeds), blocks),
            head=torch.from_numpy(np.concatenate([head, tail])),
            relation=torch.from_numpy(np.concatenate([relations, relations + self.num_relations])),
            tail=torch.from_numpy(np.concatenate([tail, head])),
            known_query=torch.from_numpy(known_query),
            known_candidate=torch.from_numpy(known_candidate),
            log_inclusion=None if inclusion is None else inclusion[torch.from_numpy(seeds)],
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


def _length(whole: int, part: int, parts: int) -> int:
    """How many of ``whole`` things np.array_split puts into a part."""
    return whole // parts + (part < whole % parts)


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
