"""What training asks of the training graph, wherever it lies.

Two bodies: ``resident.py``, the whole graph in this process's memory or mapped into it from files that all workers of
a node share, and ``partitioned.py``, a partition's rows with each of several owners. Both give the same answers in the
same order, so a training ends with the same bits over either. What random numbers decide is decided by whoever asks,
never by whoever answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from kgray.graph.filter_index import KnownAnswers
from kgray.graph.neighbours import Int64, MessageIndex

AHEAD = 2
"""Batches made before they are used, where nothing else is said."""


class Triples(Protocol):
    """Training triples by position."""

    def __len__(self) -> int: ...
    def __getitem__(self, positions: Int64, /) -> Int64:
        """(n, 3) int64 of head, relation, tail, for (n,) positions."""
        ...


class GraphStore(ABC):
    """The training triples of a graph, and what is looked up in them.

    num_entities, num_relations: N and R. ahead: batches worth making before they are used. messages: the edges
    messages run over, their triples counted as in ``triples``. known: training answers to queries.
    """

    num_entities: int
    num_relations: int
    ahead: int = AHEAD
    messages: MessageIndex
    triples: Triples
    known: KnownAnswers

    def told(self) -> str:
        """What a reader of the log should know of its use so far; empty for nothing."""
        return ""

    @abstractmethod
    def same_pair(self, heads: Int64, tails: Int64) -> Int64:
        """Positions of all training triples between the entities of each of (n,) pairs, whichever way round, each
        once, ascending."""
