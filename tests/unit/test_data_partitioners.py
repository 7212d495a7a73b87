"""Streaming partitioners against the same rules in plain loops, and what every division must keep to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from kgray.data.partitioners import Homes, Vertices, assign, batch_size, batches, choose

MASK = 2**64 - 1


def stream_of(edges: list[tuple[int, int]], entities: int, pieces: int = 1) -> Iterator[Vertices]:
    """Both ends of every edge vote for each other, loops for nobody; an edge is its first end's load."""
    bounds = [entities * n // pieces for n in range(pieces + 1)]
    for low, high in pairwise(bounds):
        voters = [[b for a, b in edges if a == v != b] + [a for a, b in edges if b == v != a] for v in range(low, high)]
        yield Vertices(
            np.cumsum([0, *map(len, voters)]),
            np.asarray([u for one in voters for u in one], dtype=np.int64),
            np.asarray([sum(a == v != b for a, b in edges) for v in range(low, high)], dtype=np.int64),
        )


def slow_choice(scores: list[list[float]], room: list[int]) -> list[int]:
    """Everyone goes where they like it best; where there is no room, those who lose least go on."""
    closed: list[set[int]] = [{p for p, left in enumerate(room) if left <= 0} for _ in scores]

    def best(row: int) -> int:
        open_parts = [p for p in range(len(room)) if p not in closed[row]]
        return max(open_parts, key=lambda p: (scores[row][p], -p))

    chosen = [best(row) for row in range(len(scores))]
    while True:
        full = [p for p in range(len(room)) if chosen.count(p) > max(room[p], 0)]
        if not full:
            return chosen
        for part in full:
            inside = [row for row in range(len(scores)) if chosen[row] == part]

            def loss(row: int, part: int = part) -> float:
                others = [s for p, s in enumerate(scores[row]) if p != part and p not in closed[row]]
                return max(others, default=-math.inf) - scores[row][part]

            for row in sorted(inside, key=loss)[room[part] :]:
                closed[row].add(part)
                chosen[row] = best(row)


@pytest.mark.parametrize("seed", range(20))
def test_choice_equals_plain_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, parts = int(rng.integers(1, 30)), int(rng.integers(1, 6))
    score = rng.random((rows, parts))
    room = rng.multinomial(rows + int(rng.integers(0, 5)), np.full(parts, 1 / parts))
    found = choose(score, room)
    assert found.tolist() == slow_choice(score.tolist(), room.tolist())
    assert (np.bincount(found, minlength=parts) <= room).all()


def slow_assign(edges: list[tuple[int, int]], entities: int, partitions: int, slack: float, passes: int) -> list[int]:
    neighbours: list[list[int]] = [[] for _ in range(entities)]
    loads = [0] * entities
    for a, b in edges:
        if a != b:
            neighbours[a].append(b)
            neighbours[b].append(a)
            loads[a] += 1
    votes, triples = sum(map(len, neighbours)), sum(loads)
    limit = max(math.ceil(entities / partitions), int((1 + slack) * entities / partitions))
    price, size = 1.5 * max(votes, 1) / 2 / entities, batch_size(entities, partitions)
    parts = [-1] * entities
    for _ in range(passes):
        sizes, load = [0] * partitions, [0] * partitions
        for start in range(0, entities, size):
            batch = range(start, min(start + size, entities))
            by_size, by_load = partitions / entities, partitions / max(triples, 1)
            fill = [max(sizes[p] * by_size, load[p] * by_load) for p in range(partitions)]
            scores = [
                [
                    sum(parts[u] == p for u in neighbours[v])
                    - price * math.sqrt(fill[p])
                    - (2.0**40 if load[p] >= 1.2 * triples / partitions else 0.0)
                    - 1e-7 / partitions * ((v + p) % partitions)
                    for p in range(partitions)
                ]
                for v in batch
            ]
            chosen = slow_choice(scores, [limit - one for one in sizes])
            for v, p in zip(batch, chosen, strict=True):
                parts[v] = p
                sizes[p] += 1
                load[p] += loads[v]
    return parts


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pieces", [1, 3])
def test_assignment_equals_plain_loops(seed: int, pieces: int) -> None:
    rng = np.random.default_rng(seed)
    edges = [tuple(edge) for edge in rng.integers(0, 60, (150, 2)).tolist()]
    found = assign(lambda: stream_of(edges, 60, pieces), 60, 3, 0.1, 0.2, 3)
    assert found.parts.tolist() == slow_assign(edges, 60, 3, 0.1, 3)
    assert found.sizes.tolist() == np.bincount(found.parts, minlength=3).tolist()
    inside = [found.parts[a] == found.parts[b] for a, b in edges if a != b]
    assert len(found.cuts) == 3 and 0 <= found.cuts[-1] <= 1 and 0 < sum(inside) < len(inside)


def test_batches_do_not_follow_pieces() -> None:
    edges = [tuple(edge) for edge in np.random.default_rng(0).integers(0, 50, (90, 2)).tolist()]
    whole = list(batches(stream_of(edges, 50, 1), 8))
    for pieces in (2, 7, 50):
        for one, other in zip(whole, batches(stream_of(edges, 50, pieces), 8), strict=True):
            for name in ("offsets", "voters", "loads"):
                assert np.array_equal(getattr(one, name), getattr(other, name))


def ring(communities: int, size: int, seed: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(seed)
    place = rng.permutation(communities * size)
    edges = []
    for n in range(communities * size):
        for _ in range(4):
            near = n // size * size + int(rng.integers(size))
            other = near if rng.random() < 0.9 else int(rng.integers(len(place)))
            edges.append((int(place[n]), int(place[other])))
    return edges


def test_communities_are_found() -> None:
    """Sixteen communities in four partitions: by chance three edges of four are cut, of the true division a tenth."""
    edges = ring(16, 25, 0)
    found = assign(lambda: stream_of(edges, 400), 400, 4, 0.05, 0.2, 10)
    cut = np.mean([found.parts[a] != found.parts[b] for a, b in edges if a != b])
    assert cut < 0.35
    assert found.sizes.max() <= 105
    # What a pass says it cut is by votes for where neighbours were before; of the last pass it is near the truth.
    assert found.cuts[-1] == pytest.approx(cut, abs=0.1)


@pytest.mark.parametrize("partitions", [1, 2, 7, 40])
def test_limits_hold_and_no_partition_is_empty(partitions: int) -> None:
    """A hub of most edges, loops, entities without an edge, as many partitions as entities."""
    hub = [(0, n) for n in range(1, 30)] * 3 + [(5, 5)] * 50
    for slack in (0.0, 0.5):
        found = assign(lambda: stream_of(hub, 40), 40, partitions, slack, slack, 4)
        sizes = np.bincount(found.parts, minlength=partitions)
        assert sizes.min() >= 1
        assert sizes.max() <= max(math.ceil(40 / partitions), int((1 + slack) * 40 / partitions))


def test_no_votes_at_all_are_dealt_out_evenly() -> None:
    found = assign(lambda: stream_of([], 100), 100, 4, 0.05, 0.2, 2)
    assert found.sizes.max() - found.sizes.min() <= 8
    assert found.cuts == [0.0, 0.0]


def test_homes_are_spread_by_frequency() -> None:
    homes = Homes.build([100, 10, 10, 10, 10, 0], 4)
    lists = [homes.parts[a:b].tolist() for a, b in zip(homes.offsets[:-1], homes.offsets[1:], strict=True)]
    assert lists[0] == [0, 1, 2]  # 100 of 140 triples are more than two shares of 35
    assert lists[1] == lists[2] == lists[3] == [3]
    assert len(lists[4]) == len(lists[5]) == 1
    entities = np.arange(1000)
    chosen = homes.of(np.zeros(1000, dtype=np.int64), entities)
    assert np.bincount(chosen, minlength=4)[:3].min() > 250 and not (chosen == 3).any()
    assert np.array_equal(homes.of(np.zeros(5, dtype=np.int64), entities[:5]), chosen[:5])


def test_relations_come_together() -> None:
    """Eight relations, each of heads of its own: a partition has few of them."""
    relation = np.repeat(np.arange(8), 50)
    order = np.random.default_rng(0).permutation(400)
    homes = Homes.build([100] * 8, 4)

    def stream() -> Iterator[Vertices]:
        yield Vertices(np.arange(401) * 2, np.repeat(relation[order], 2), np.full(400, 2))

    found = assign(stream, 400, 4, 0.05, 0.2, 3, homes)
    for number in range(8):
        held = np.bincount(found.parts[relation[order] == number], minlength=4)
        assert held.max() >= 45
    assert found.sizes.max() <= 105
