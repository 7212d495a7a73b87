"""Entities the graph does not have: their states from a text and a few facts, without training anything.

A new entity gets the id N. Its text vector stands beside the stored ones, its facts are the edges it hears from, and
the network makes its state of both exactly as it does for the graph's own entities; a structural vector it has none.
It listens only: the states of its neighbours, and of all candidates, are those the graph's own facts gave them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kgray.graph.neighbours import Int64, NeighbourIndex
from kgray.graph.sampler import Block, NeighbourSampler, step_generator
from kgray.model.fused import FusedModel, Neighbourhood, States
from kgray.model.states import INFERENCE_SEED, StateScorer, join
from kgray.text.vectors import Half

NEW = -1
"""Stands for the new entity itself in its facts."""


def _no_facts() -> Int64:
    return np.empty((0, 3), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Newcomer:
    """An entity by what is said of it. facts: (k, 3) int64 head, relation, tail, one end of each NEW."""

    name: str
    description: str = ""
    facts: Int64 = field(default_factory=_no_facts)

    def without(self, fact: int) -> Newcomer:
        """The same entity but for the fact at that position."""
        return Newcomer(self.name, self.description, np.delete(self.facts, fact, axis=0))


Part = int | Newcomer
"""A part of a query: an id, or an entity the graph does not have."""


class FusedNewcomers:
    """What one fused model says of new entities. Thread-safe.

    model: restored weights on the CPU, scorer: its stored states. read: name and description to a text vector; None
    where the model reads no text. context: facts known when a question is asked, needed where messages come over more
    than one hop.
    """

    def __init__(
        self,
        model: FusedModel,
        scorer: StateScorer,
        read: Callable[[str, str], Half] | None,
        context: NeighbourIndex | None = None,
    ) -> None:
        if model.text is not None and read is None:
            raise ValueError("a model that reads text needs something that makes vectors of texts")
        self.fanouts = model.config.gnn.inference_fanouts if model.gnn is not None else ()
        if len(self.fanouts) > 1 and context is None:
            raise ValueError(f"messages over {len(self.fanouts)} hops need the graph's own facts")
        self.model, self.scorer, self.read = model, scorer, read
        self.samplers = [NeighbourSampler(context, [fanout]) for fanout in self.fanouts] if context is not None else []
        self._lock = threading.Lock()  # samplers keep scratch arrays

    def knows(self, one: Newcomer) -> bool:
        """Whether anything said of the entity reaches the model."""
        return self.model.text is not None or (self.model.gnn is not None and len(one.facts) > 0)

    @torch.no_grad()
    def states(self, one: Newcomer) -> States:
        """As head of a query and as candidate, (1, w) float32 each.

        Raises EncoderError where its text cannot be read.
        """
        new_text = None
        if self.model.text is not None and self.read is not None:
            new_text = torch.from_numpy(self.read(one.name, one.description))[None]
        with self._lock:
            blocks = self._blocks(one.facts)
            hood = Neighbourhood.of(torch.tensor([self.scorer.num_entities]), blocks)
            states = [states for _, states in self.model.encode(hood, new_text)]
        return States(join([s.head for s in states]).float(), join([s.tail for s in states]).float())

    @torch.no_grad()
    def score(self, task: str, first: int | States, second: int | States) -> Tensor:
        """Scores (C,) of all candidates; first, second: the given parts in the order head, relation, tail."""
        if task == "relation":
            ends = [self._stored(part) if isinstance(part, int) else part for part in (first, second)]
            heads, tails = (torch.cat([end[i] for end in ends]) for i in range(2))
            return self._over(heads, tails).score_relations(torch.tensor([0]), torch.tensor([1]))[0]
        anchor, relation = (first, second) if task == "tail" else (second, first)
        if isinstance(anchor, int) or not isinstance(relation, int):
            raise ValueError("a query names a new entity and a relation of the graph")
        asked, zero = torch.tensor([relation]), torch.tensor([0])
        scorer = self._over(anchor.head, self.scorer.tails)
        return (scorer.score_tails(zero, asked) if task == "tail" else scorer.score_heads(asked, zero))[0]

    def _stored(self, entity: int) -> States:
        return States(self.scorer.heads[entity][None], self.scorer.tails[entity][None])

    def _over(self, heads: Tensor, tails: Tensor) -> StateScorer:
        """The model's own way to score, over other states."""
        return StateScorer(heads, tails, self.scorer.relations, self.scorer.decoders)

    def _blocks(self, facts: Int64) -> list[Block]:
        """The neighbourhood of the new entity, outermost hop first, drawn as :func:`encode_all` draws."""
        new, real = self.scorer.num_entities, self.scorer.num_relations
        sources, relations = incoming(facts, real)
        generator = step_generator(INFERENCE_SEED, 0, new, 0)
        blocks: list[Block] = []
        targets = np.array([new])
        for hop, fanout in enumerate(self.fanouts):
            drawn = np.arange(len(sources))
            if 0 <= fanout < len(sources):
                drawn = np.sort(generator.choice(len(sources), fanout, replace=False))
            own, others = sources[drawn], targets[1:]
            around = self.samplers[hop].sample(others, generator)[0] if len(others) else _nothing()
            fresh = np.setdiff1d(own, around.nodes)
            nodes = np.concatenate([[new], around.nodes, fresh])
            order = np.argsort(nodes)
            blocks.append(
                Block(
                    nodes,
                    len(targets),
                    np.concatenate([order[np.searchsorted(nodes, own, sorter=order)], around.source + 1]),
                    np.concatenate([np.zeros(len(own), dtype=np.int64), around.target + 1]),
                    np.concatenate([relations[drawn], around.relation]),
                )
            )
            targets = nodes
        return blocks[::-1]


def incoming(facts: Int64, num_relations: int) -> tuple[Int64, Int64]:
    """The neighbours (k,) a new entity hears from and the relations, 0..2R-1, in the order of :class:`NeighbourIndex`;
    a fact given twice counts once."""
    facts = facts[np.sort(np.unique(facts, axis=0, return_index=True)[1])] if len(facts) else facts
    as_tail, as_head = facts[facts[:, 2] == NEW], facts[facts[:, 0] == NEW]
    sources = np.concatenate([as_tail[:, 0], as_head[:, 2]])
    return sources, np.concatenate([as_tail[:, 1], as_head[:, 1] + num_relations])


def answers_given(task: str, parts: Sequence[Part]) -> Int64:
    """Candidates (k,) int64 that the facts given of the new entities answer the query with."""
    found: set[int] = set()
    for place, one in enumerate(parts):
        if not isinstance(one, Newcomer):
            continue
        other = parts[1 - place]
        for head, relation, tail in one.facts.tolist():
            end = NEW if isinstance(other, Newcomer) else other
            if task == "relation":
                if (head, tail) == ((NEW, end) if place == 0 else (end, NEW)):
                    found.add(relation)
            elif relation == other and (head if task == "tail" else tail) == NEW:
                found.add(tail if task == "tail" else head)
    return np.array(sorted(found), dtype=np.int64)


def _nothing() -> Block:
    none = np.empty(0, dtype=np.int64)
    return Block(none, 0, none, none, none)
