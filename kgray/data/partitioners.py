"""Which partition an entity goes to: streaming partitioners, in numpy and without Ray.

Entities pass by in the order of their ids' hashes; each goes where it has most *votes*, less what a partition's fill
costs (Fennel: Tsourakakis et al. 2014, with its exponent of 3/2; LDG, Stanton and Kliot 2012, weighs
votes by the room that is left instead). The stream passes several times, and from the second on every vote is known
(restreaming: Nishimura and Ugander 2013). Entities go in batches that do not see each other, which is what makes it
vectorise; the batches depend on numbers of entities and partitions alone, so the result does too.

* locality: a neighbour by a training triple, either way, votes for the partition it is in.
* relation: a training triple votes, for its head, for the partition its relation is at home in. Homes are given
  greedily, the most frequent relation first, to the partition with the fewest triples; a relation of more triples than
  a partition's share has several (DGL-KE's relation partitioning, Zheng et al. 2020).

Triples lie with their head, so partitions are balanced in triples too: the fuller of the two counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kgray.data.dictionary import I64, mix

Parts = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]
_DENSE = 1 << 22  # scores held at once
_LARGEST_BATCH = 8192
_FAR = float(1 << 40)  # worse than any number of votes is good


@dataclass(frozen=True)
class Vertices:
    """Some entities in a row. offsets (n + 1,): where in ``voters`` each one's begin; voters: entities, or relations;
    loads (n,): triples it is the head of."""

    offsets: I64
    voters: I64
    loads: I64

    def __len__(self) -> int:
        return len(self.loads)

    def rows(self, start: int, end: int) -> Vertices:
        low, high = int(self.offsets[start]), int(self.offsets[end])
        return Vertices(self.offsets[start : end + 1] - low, self.voters[low:high], self.loads[start:end])

    def then(self, other: Vertices) -> Vertices:
        """These and others after them."""
        return Vertices(
            np.concatenate([self.offsets, other.offsets[1:] + self.offsets[-1]]),
            np.concatenate([self.voters, other.voters]),
            np.concatenate([self.loads, other.loads]),
        )


def batches(pieces: Iterator[Vertices], size: int) -> Iterator[Vertices]:
    """The same entities in batches of ``size``, wherever the pieces end; the last may be smaller."""
    left: Vertices | None = None
    for piece in pieces:
        left = piece if left is None else left.then(piece)
        whole = len(left) // size * size
        for start in range(0, whole, size):
            yield left.rows(start, start + size)
        left = left.rows(whole, len(left))
    if left is not None and len(left):
        yield left


@dataclass
class Assignment:
    """parts (N,): the partition of each entity; sizes (P,): entities of each; cuts: of each pass, the share of votes
    for another partition than the one the entity went to."""

    parts: Parts
    sizes: I64
    cuts: list[float]


def assign(
    stream: Callable[[], Iterator[Vertices]],
    entities: int,
    partitions: int,
    slack: float,
    triple_slack: float,
    passes: int,
    homes: Homes | None = None,
) -> Assignment:
    """Send a stream of entities, which can be begun anew, through ``passes`` passes. ``homes``: voters are relations.

    No partition is left empty (there must be as many entities), and none has more than ``1 + slack`` times the mean.
    One that has ``1 + triple_slack`` times the mean of triples takes an entity only where no other has room.
    """
    parts = np.full(entities, -1, dtype=np.int32)
    votes = triples = 0
    for piece in stream():
        votes += len(piece.voters)
        triples += int(piece.loads.sum())
    limit = max(-(-entities // partitions), int((1 + slack) * entities / partitions))
    heaviest = (1 + triple_slack) * triples / partitions
    price = 1.5 * max(votes, 1) / (2 if homes is None else 1) / entities
    size = batch_size(entities, partitions)
    cuts: list[float] = []
    sizes = np.zeros(partitions, dtype=np.int64)
    for _ in range(passes):
        sizes, loads = np.zeros(partitions, dtype=np.int64), np.zeros(partitions, dtype=np.int64)
        first, kept = 0, 0.0
        for batch in batches(stream(), size):
            counts = _count_votes(batch, first, parts, partitions, homes)
            fill = np.maximum(sizes * (partitions / entities), loads * (partitions / max(triples, 1)))
            score = counts - price * np.sqrt(fill) - np.where(loads >= heaviest, _FAR, 0.0)
            # Where nothing else decides, entities take turns among the partitions.
            turns = (first + np.arange(len(batch))[:, None] + np.arange(partitions)) % partitions
            chosen = choose(score - 1e-7 / partitions * turns, limit - sizes)
            kept += float(counts[np.arange(len(batch)), chosen].sum())
            parts[first : first + len(batch)] = chosen
            sizes += np.bincount(chosen, minlength=partitions)
            loads += np.bincount(chosen, weights=batch.loads, minlength=partitions).astype(np.int64)
            first += len(batch)
        cuts.append(1 - kept / votes if votes else 0.0)
    _fill_empty(parts, sizes)
    return Assignment(parts, sizes, cuts)


def batch_size(entities: int, partitions: int) -> int:
    """Entities that do not see each other: few against a partition, and no more than scores may be held of."""
    near = max(16, entities // (32 * partitions))
    return max(1, min(near, _LARGEST_BATCH, _DENSE // partitions))


def _count_votes(batch: Vertices, first: int, parts: Parts, partitions: int, homes: Homes | None) -> Floats:
    """(n, P): votes of each entity of a batch; ``first``: the first one's number."""
    rows = np.repeat(np.arange(len(batch)), np.diff(batch.offsets))
    voted = parts[batch.voters] if homes is None else homes.of(batch.voters, rows + first)
    known = voted >= 0
    cells = rows[known] * partitions + voted[known]
    return np.bincount(cells, minlength=len(batch) * partitions).reshape(len(batch), partitions).astype(np.float64)


def choose(score: Floats, room: I64) -> I64:
    """The partition each of n entities goes to: the one of the highest score that has room. score: (n, P); room: (P,),
    n in all at least. Where more want in than there is room for, those go on to their next one who lose least by it.
    """
    score = score.copy()
    score[:, room <= 0] = -np.inf
    room = np.maximum(room, 0)
    chosen = score.argmax(axis=1)
    while True:
        wanted = np.bincount(chosen, minlength=len(room))
        full = np.flatnonzero(wanted > room)
        if not len(full):
            return np.asarray(chosen, dtype=np.int64)
        for part in full:
            inside = np.flatnonzero(chosen == part)
            mine = score[inside, part]
            others = score[inside]
            others[:, part] = -np.inf
            order = np.argsort(others.max(axis=1) - mine, kind="stable")
            moved = inside[order[room[part] :]]
            score[moved, part] = -np.inf
            chosen[moved] = score[moved].argmax(axis=1)


def _fill_empty(parts: Parts, sizes: I64) -> None:
    """Give every empty partition the last entity of the largest."""
    for empty in np.flatnonzero(sizes == 0):
        largest = int(sizes.argmax())
        moved = int(np.flatnonzero(parts == largest)[-1])
        parts[moved] = empty
        sizes[largest] -= 1
        sizes[empty] += 1


@dataclass(frozen=True)
class Homes:
    """The partitions each relation is at home in. offsets (R + 1,) into ``parts``, ascending for each relation."""

    offsets: I64
    parts: Parts

    @classmethod
    def build(cls, counts: Sequence[int], partitions: int) -> Homes:
        """counts: (R,) training triples of each relation."""
        share = max(sum(counts) / partitions, 1.0)
        held = np.zeros(partitions)
        found: dict[int, npt.NDArray[np.int64]] = {}
        for relation in sorted(range(len(counts)), key=lambda r: (-counts[r], r)):
            number = min(partitions, max(1, -int(-counts[relation] // share)))
            chosen = np.argsort(held, kind="stable")[:number]
            held[chosen] += counts[relation] / number
            found[relation] = np.sort(chosen)
        lists = [found[relation] for relation in range(len(counts))]
        offsets = np.cumsum([0, *map(len, lists)]).astype(np.int64)
        return cls(offsets, np.concatenate(lists).astype(np.int32) if lists else np.empty(0, np.int32))

    def of(self, relations: I64, entities: I64) -> Parts:
        """The home of a relation that is meant for an entity: the same among equal homes, (n,)."""
        number = np.diff(self.offsets)[relations]
        drawn = (mix(entities.astype(np.uint64)) % number.astype(np.uint64)).astype(np.int64)
        return np.asarray(self.parts[self.offsets[relations] + drawn], dtype=np.int32)
