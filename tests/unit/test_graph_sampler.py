"""The vectorised sampler against plain Python, and the promise that target edges carry no message.

python3 -m pytest tests/unit/test_graph_sampler.py
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgray.graph.neighbours import NeighbourIndex
from kgray.graph.sampler import Block, NeighbourSampler, step_generator

N, R = 12, 3
triples_of = st.lists(
    st.tuples(st.integers(0, N - 1), st.integers(0, R - 1), st.integers(0, N - 1)), unique=True, max_size=60
).map(lambda rows: np.array(rows, dtype=np.int64).reshape(-1, 3))


def slow_edges(triples: np.ndarray) -> dict[int, Counter[tuple[int, int]]]:
    """For each entity its incoming (source, relation), reciprocal ones from R on."""
    into: dict[int, Counter[tuple[int, int]]] = {e: Counter() for e in range(N)}
    for h, r, t in triples.tolist():
        into[t][(h, r)] += 1
        into[h][(t, r + R)] += 1
    return into


def edges_of(block: Block) -> dict[int, Counter[tuple[int, int]]]:
    found: dict[int, Counter[tuple[int, int]]] = {}
    for s, t, r in zip(block.source, block.target, block.relation, strict=True):
        found.setdefault(int(block.nodes[t]), Counter())[(int(block.nodes[s]), int(r))] += 1
    return found


@settings(max_examples=60, deadline=None)
@given(triples_of, st.sets(st.integers(0, N - 1), min_size=1))
def test_all_neighbours_equal_the_slow_index(triples: np.ndarray, seeds: set[int]) -> None:
    sampler = NeighbourSampler(NeighbourIndex.build(triples, N, R), [-1])
    (block,) = sampler.sample(np.array(sorted(seeds)), step_generator(0, 0, 0, 0))
    slow = slow_edges(triples)
    assert block.nodes[: block.num_targets].tolist() == sorted(seeds)
    assert len(np.unique(block.nodes)) == len(block.nodes)
    found = edges_of(block)
    assert {e: found.get(e, Counter()) for e in seeds} == {e: slow[e] for e in seeds}


@settings(max_examples=60, deadline=None)
@given(triples_of, st.integers(1, 5), st.integers(0, 3))
def test_a_fan_out_draws_distinct_edges_of_the_entity(triples: np.ndarray, fanout: int, step: int) -> None:
    sampler = NeighbourSampler(NeighbourIndex.build(triples, N, R), [fanout])
    (block,) = sampler.sample(np.arange(N), step_generator(0, 0, step, 0))
    found, slow = edges_of(block), slow_edges(triples)
    for entity in range(N):
        drawn = found.get(entity, Counter())
        assert drawn.total() == min(fanout, slow[entity].total())
        assert not drawn - slow[entity], "an edge drawn twice, or one that does not exist"


def test_every_neighbour_of_a_hub_is_equally_likely() -> None:
    spokes, fanout, rounds = 20, 5, 4000
    triples = np.array([[0, 0, i] for i in range(1, spokes + 1)])
    sampler = NeighbourSampler(NeighbourIndex.build(triples, spokes + 1, 1), [fanout])
    seen = np.zeros(spokes + 1)
    for step in range(rounds):
        (block,) = sampler.sample(np.array([0]), step_generator(0, 0, step, 0))
        seen[block.nodes[block.source]] += 1
    share = seen[1:] / rounds
    # Four standard deviations of a binomial share around 1/4.
    assert np.abs(share - fanout / spokes).max() < 4 * np.sqrt(0.25 * 0.75 / rounds)


@settings(max_examples=60, deadline=None)
@given(triples_of.filter(len), st.data())
def test_excluded_triples_carry_no_message_in_either_direction(triples: np.ndarray, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(triples)))
    removed = np.arange(count)
    sampler = NeighbourSampler(NeighbourIndex.build(triples, N, R), [-1, -1])
    blocks = sampler.sample(np.arange(N), step_generator(0, 0, 0, 0), exclude=removed)
    slow = slow_edges(triples[count:])
    for block in blocks:
        assert {e: c for e, c in edges_of(block).items() if c} == {e: c for e, c in slow.items() if c}
    again = sampler.sample(np.arange(N), step_generator(0, 0, 0, 0))
    assert len(again[-1].source) == 2 * len(triples), "an exclusion outlived its step"


def test_hops_nest_and_are_reproducible() -> None:
    triples = np.random.default_rng(0).integers(0, [200, R, 200], (900, 3))
    sampler = NeighbourSampler(NeighbourIndex.build(triples, 200, R), [4, 3])
    seeds = np.array([5, 3, 8])
    outer, inner = sampler.sample(seeds, step_generator(1, 2, 3, 4))
    assert inner.nodes[: inner.num_targets].tolist() == seeds.tolist()
    assert outer.nodes[: outer.num_targets].tolist() == inner.nodes.tolist()
    again = sampler.sample(seeds, step_generator(1, 2, 3, 4))
    for one, two in zip((outer, inner), again, strict=True):
        assert one.nodes.tolist() == two.nodes.tolist() and one.source.tolist() == two.source.tolist()
    other = sampler.sample(seeds, step_generator(1, 2, 4, 4))
    assert other[0].nodes.tolist() != outer.nodes.tolist()


def test_ids_outside_the_graph_are_refused() -> None:
    with pytest.raises(ValueError, match="outside 2 entities"):
        NeighbourIndex.build(np.array([[0, 0, 2]]), 2, 1)
    with pytest.raises(ValueError, match="fan-outs"):
        NeighbourSampler(NeighbourIndex.build(np.array([[0, 0, 1]]), 2, 1), [0])
