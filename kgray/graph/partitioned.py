"""The training graph with its owners, seen from a training worker: each question goes to whoever can answer it.

All that a step asks of one owner at a time travels as one request, one a hop of a sampled neighbourhood. The worker
keeps the degrees of all entities (mapped, shared by the node) and the rows of as many of the busiest ones as it is
allowed to hold. How requests travel is a :class:`Transport`'s business: Ray actors in ``actors.py``, a function
call in tests.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kgray.graph.filter_index import checked, only
from kgray.graph.members import Members
from kgray.graph.neighbours import Edges, Int64, Ints, narrow, row_positions
from kgray.graph.shard import Layout, Rows
from kgray.graph.store import AHEAD, GraphStore


class Request(NamedTuple):
    """A question to the owner of a partition: a method of :class:`Shard` and its arguments, arrays or None."""

    part: int
    method: str
    arguments: tuple[Any, ...]


class Transport(Protocol):
    """Asks several owners at once."""

    def ask(self, requests: Sequence[Request]) -> list[Any]:
        """Their answers, in order; raises GraphStoreError where an owner does not answer within the limit."""
        ...


@dataclass
class Traffic:
    """What was asked since the worker began, by purpose: ``hop 0`` (the nearest) and on, ``triples``, ``known``...

    sent and received are bytes of arrays; kept: rows that the cache answered; seconds: waiting for answers.
    """

    requests: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """One line: requests, bytes and waiting by purpose."""
        return "; ".join(
            f"{name}: {row['requests']:.0f} requests, {(row['sent'] + row['received']) / 2**20:.1f} MiB, "
            f"{row['seconds']:.1f} s" + (f", {row['kept']:.0f} rows kept here" if row["kept"] else "")
            for name, row in self.table().items()
        )

    def table(self) -> dict[str, dict[str, float]]:
        """By purpose: requests, sent, received, kept, seconds."""
        names = sorted(self.requests.keys() | self.kept.keys())
        parts = ("requests", "sent", "received", "kept", "seconds")
        return {name: {part: getattr(self, part)[name] for part in parts} for name in names}


class Desk:
    """Sends requests by a transport, and keeps count."""

    def __init__(self, layout: Layout, transport: Transport) -> None:
        self.layout, self.transport, self.traffic = layout, transport, Traffic()

    def ask(self, purpose: str, requests: Sequence[Request]) -> list[Any]:
        """The answers, in order."""
        if not requests:
            return []
        began = time.monotonic()
        answers = self.transport.ask(requests)
        count = self.traffic
        count.seconds[purpose] += time.monotonic() - began  # type: ignore[assignment]
        count.requests[purpose] += len(requests)
        count.sent[purpose] += sum(_nbytes(request.arguments) for request in requests)
        count.received[purpose] += sum(_nbytes(answer) for answer in answers)
        return answers


class PartitionedStore(GraphStore):
    """See the module's text.

    degrees: (N,) integers of all entities. cache_bytes: rows of the busiest entities kept here. ahead: batches worth
    making before they are used.
    """

    messages: RemoteMessages
    triples: RemoteTriples
    known: RemoteAnswers

    def __init__(
        self, layout: Layout, degrees: Ints, transport: Transport, cache_bytes: int = 0, ahead: int = AHEAD
    ) -> None:
        self.num_entities, self.num_relations, self.ahead = layout.num_entities, layout.num_relations, ahead
        self.desk = Desk(layout, transport)
        self.messages = RemoteMessages(self.desk, degrees, busiest_rows(self.desk, degrees, cache_bytes))
        self.triples = RemoteTriples(self.desk)
        self.known = RemoteAnswers(self.desk, degrees)

    @property
    def traffic(self) -> Traffic:
        """What was asked so far."""
        return self.desk.traffic

    def told(self) -> str:
        return str(self.traffic)

    def same_pair(self, heads: Int64, tails: Int64) -> Int64:
        low, high = np.minimum(heads, tails), np.maximum(heads, tails)
        _, triples, _ = _edges_between(self.desk, low, high)
        return np.unique(triples)


class RemoteTriples:
    """See :class:`~kgray.graph.store.Triples`."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def __len__(self) -> int:
        return self.desk.layout.num_triples

    def __getitem__(self, positions: Int64, /) -> Int64:
        layout = self.desk.layout
        shares = list(_by_owner(layout.owner_of_triple(positions), layout.parts))
        requests = [
            Request(part, "facts", (positions[place].astype(narrow(layout.num_triples)),)) for part, place in shares
        ]
        rows = np.empty((len(positions), 3), dtype=np.int64)
        for (_, place), answer in zip(shares, self.desk.ask("triples", requests), strict=True):
            rows[place] = answer
        return rows


class RemoteMessages:
    """See :class:`~kgray.graph.neighbours.MessageIndex`. kept: rows that need not be asked for."""

    def __init__(self, desk: Desk, degrees: Ints, kept: Rows) -> None:
        self.desk, self.degrees, self.kept = desk, degrees, kept
        self.num_entities, self.num_triples = desk.layout.num_entities, desk.layout.num_triples
        # Nobody is kept who has fewer edges: most entities are turned away by that.
        self._least = int(self.degrees_of(kept.nodes).min(initial=np.iinfo(np.int64).max))

    def degrees_of(self, nodes: Int64) -> Int64:
        """(n,) int64 of (n,) entity ids."""
        return self.degrees[nodes].astype(np.int64)

    def edges(self, whole: Int64, hubs: Int64, drawn: Int64, hop: int = 0) -> Edges:
        """See :class:`~kgray.graph.neighbours.MessageIndex`."""
        lengths, here, purpose = self.degrees_of(whole), self.desk.layout.parts, f"hop {hop}"
        whole, lengths = whole[lengths > 0], lengths[lengths > 0]  # whose rows are empty need not be asked for
        share = self._shares(self._owners(whole, lengths), self._owners(hubs, self.degrees_of(hubs)))
        asked = {p: self._request(p, whole[a], hubs[b], drawn[b]) for p, (a, b) in share.items() if p < here}
        answers: dict[int, Edges] = dict(zip(asked, self.desk.ask(purpose, list(asked.values())), strict=True))
        if here in share:
            a, b = share[here]
            answers[here] = self.kept.take(self.kept.slots(whole[a]), self.kept.slots(hubs[b]), drawn[b])
            self.desk.traffic.kept[purpose] += len(a) + len(b)
        return _joined(answers, share, lengths, drawn.shape)

    def _shares(self, whole: Int64, hubs: Int64) -> dict[int, tuple[Int64, Int64]]:
        """By owner: places among the entities whose rows are wanted whole, and among those of drawn positions."""
        parts = self.desk.layout.parts
        wholes, drawns = dict(_by_owner(whole, parts)), dict(_by_owner(hubs, parts))
        return {p: (wholes.get(p, _NONE), drawns.get(p, _NONE)) for p in sorted(wholes.keys() | drawns.keys())}

    def _owners(self, nodes: Int64, degrees: Int64) -> Int64:
        """Partition of each, or P for those kept here."""
        owners = self.desk.layout.owner(nodes)
        busy = np.flatnonzero(degrees >= self._least)
        owners[busy[self.kept.slots(nodes[busy]) >= 0]] = self.desk.layout.parts
        return owners

    def _request(self, part: int, whole: Int64, hubs: Int64, drawn: Int64) -> Request:
        ids = narrow(self.num_entities)
        most = int(drawn.max(initial=0)) + 1
        return Request(part, "edges", (whole.astype(ids), hubs.astype(ids), drawn.astype(narrow(most))))


class RemoteAnswers:
    """See :class:`~kgray.graph.filter_index.KnownAnswers`; training facts only."""

    def __init__(self, desk: Desk, degrees: Ints) -> None:
        self.desk, self.degrees = desk, degrees
        self.num_entities, self.num_relations = desk.layout.num_entities, desk.layout.num_relations

    def tails(
        self, heads: npt.ArrayLike, relations: npt.ArrayLike, among: Members | None = None
    ) -> tuple[Int64, Int64]:
        """Known tails of B queries: rows and entities, both ascending."""
        return self._known(self._entities(heads), self._relations(relations) + self.num_relations, among)

    def heads(
        self, relations: npt.ArrayLike, tails: npt.ArrayLike, among: Members | None = None
    ) -> tuple[Int64, Int64]:
        """Known heads of B queries."""
        return self._known(self._entities(tails), self._relations(relations), among)

    def _entities(self, ids: npt.ArrayLike) -> Int64:
        return checked("entity", ids, self.num_entities)

    def _relations(self, ids: npt.ArrayLike) -> Int64:
        return checked("relation", ids, self.num_relations)

    def relations(self, heads: npt.ArrayLike, tails: npt.ArrayLike) -> tuple[Int64, Int64]:
        """Known relations of B queries."""
        rows, _, relations = _edges_between(self.desk, self._entities(heads), self._entities(tails))
        if not self.desk.layout.undirected:
            outward = relations >= self.num_relations
            rows, relations = rows[outward], relations[outward]
        keys = np.unique(rows * self.num_relations + relations % self.num_relations)
        return np.divmod(keys, max(self.num_relations, 1))

    def _known(self, entities: Int64, relations: Int64, among: Members | None) -> tuple[Int64, Int64]:
        share = list(_by_owner(self.desk.layout.owner(entities), self.desk.layout.parts))
        requests = [self._request(part, entities[place], relations[place], among) for part, place in share]
        rows, found = [_NONE], [_NONE]
        for (_, place), (row, entity) in zip(share, self.desk.ask("known", requests), strict=True):
            rows.append(place[row])
            found.append(entity.astype(np.int64))
        row, entity = np.concatenate(rows), np.concatenate(found)
        order = np.argsort(row, kind="stable")  # each owner's are in order already
        return only((row[order], entity[order]), among)

    def _request(self, part: int, entities: Int64, relations: Int64, among: Members | None) -> Request:
        ids = narrow(self.num_entities)
        # The candidates travel along where there are fewer of them than there can be answers to send back.
        most = int(self.degrees[np.unique(entities)].sum(dtype=np.int64))
        wanted = among.numbers.astype(ids) if among is not None and len(among.numbers) < most else None
        arguments = (entities.astype(ids), relations.astype(narrow(2 * self.num_relations)), wanted)
        return Request(part, "known", arguments)


_NONE = np.empty(0, dtype=np.int64)


def _joined(
    answers: dict[int, Edges], share: dict[int, tuple[Int64, Int64]], lengths: Int64, drawn: tuple[int, ...]
) -> Edges:
    """The answers in the order of the question: whole rows of these lengths, then (b, k) drawn positions."""
    starts = np.cumsum(lengths) - lengths
    total, width = int(lengths.sum()), drawn[1] if len(drawn) > 1 else 0
    kinds = [[part.dtype for part in answer] for answer in answers.values()] or [[np.dtype(np.int64)] * 3]
    joined = [np.empty(total + drawn[0] * width, dtype=kind) for kind in kinds[0]]
    for owner, answer in answers.items():
        whole, hubs = share[owner]
        places = np.concatenate(
            [row_positions(starts[whole], lengths[whole]), (total + hubs[:, None] * width + np.arange(width)).ravel()]
        )
        for column, values in zip(joined, answer, strict=True):
            column[places] = values
    return Edges(*joined)


def busiest_rows(desk: Desk, degrees: Ints, room: int) -> Rows:
    """The rows of the entities of highest degree, as many as fit into ``room`` bytes."""
    per_edge = sum(
        np.dtype(narrow(limit)).itemsize
        for limit in (desk.layout.num_entities, 2 * desk.layout.num_relations, desk.layout.num_triples)
    )
    if room <= 0 or not len(degrees):
        return Rows.none()
    # No more can fit than if all were as small as the smallest that matters; the rest need not be sorted.
    most = min(len(degrees), max(1, room // (16 + per_edge)))
    busiest = np.argpartition(degrees, len(degrees) - most)[len(degrees) - most :]
    busiest = busiest[np.lexsort((busiest, -degrees[busiest].astype(np.int64)))]
    sizes = 16 + degrees[busiest].astype(np.int64) * per_edge
    fits = sizes <= room  # a hub larger than the room leaves it to the next
    busiest, sizes = busiest[fits], sizes[fits]
    nodes = np.sort(busiest[np.cumsum(sizes) <= room])
    nodes = nodes[degrees[nodes] > 0]
    if not len(nodes):
        return Rows.none()
    ids = narrow(desk.layout.num_entities)
    nothing = (_NONE.astype(ids), np.empty((0, 0), dtype=np.int16))
    share = list(_by_owner(desk.layout.owner(nodes), desk.layout.parts))
    answers = desk.ask("cache", [Request(part, "edges", (nodes[p].astype(ids), *nothing)) for part, p in share])
    # Partitions are ranges of ids, so their rows stand one after another as the ids do.
    edges = Edges(*(np.concatenate(column) for column in zip(*answers, strict=True)))
    offsets = np.concatenate([[0], np.cumsum(degrees[nodes].astype(np.int64))])
    return Rows(nodes, offsets, edges)


def _edges_between(desk: Desk, entities: Int64, others: Int64) -> tuple[Int64, Int64, Int64]:
    """Edges into each of ``entities`` from the one beside it: row, triple, relation; int64."""
    ids = narrow(desk.layout.num_entities)
    share = list(_by_owner(desk.layout.owner(entities), desk.layout.parts))
    requests = [Request(part, "pairs", (entities[p].astype(ids), others[p].astype(ids))) for part, p in share]
    rows, triples, relations = [_NONE], [_NONE], [_NONE]
    for (_, place), (row, relation, triple) in zip(share, desk.ask("pairs", requests), strict=True):
        rows.append(place[row])
        triples.append(triple.astype(np.int64))
        relations.append(relation.astype(np.int64))
    return np.concatenate(rows), np.concatenate(triples), np.concatenate(relations)


def _by_owner(owner: Int64, parts: int) -> Iterator[tuple[int, Int64]]:
    """Each partition that owns something (P stands for this worker), and the places of what it owns."""
    if not len(owner):
        return
    order = np.argsort(owner.astype(narrow(parts + 1)), kind="stable")
    counts = np.bincount(owner, minlength=parts + 1)
    ends = np.cumsum(counts)
    for part in np.flatnonzero(counts).tolist():
        yield part, order[ends[part] - counts[part] : ends[part]]


def _nbytes(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    return sum(_nbytes(one) for one in value) if isinstance(value, tuple) else 0
