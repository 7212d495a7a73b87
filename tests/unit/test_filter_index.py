"""FilterIndex against a dictionary of sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kgray.graph.filter_index import FilterIndex

N, R = 7, 3
triple = st.tuples(st.integers(0, N - 1), st.integers(0, R - 1), st.integers(0, N - 1))


def grouped(rows: np.ndarray, values: np.ndarray, size: int) -> list[list[int]]:
    answer: list[list[int]] = [[] for _ in range(size)]
    for row, value in zip(rows.tolist(), values.tolist(), strict=True):
        answer[row].append(value)
    return answer


@settings(max_examples=60, deadline=None)
@given(st.lists(triple, max_size=40))
def test_every_lookup_equals_the_sets(triples: list[tuple[int, int, int]]) -> None:
    index = FilterIndex.build(np.array(triples, dtype=np.int64).reshape(-1, 3), N, R)
    known = set(triples)
    h, r = (a.ravel() for a in np.meshgrid(np.arange(N), np.arange(R), indexing="ij"))
    assert grouped(*index.tails(h, r), N * R) == [
        sorted(t for t in range(N) if (a, b, t) in known) for a, b in zip(h, r, strict=True)
    ]
    assert grouped(*index.heads(r, h), N * R) == [
        sorted(x for x in range(N) if (x, b, a) in known) for a, b in zip(h, r, strict=True)
    ]
    x, y = (a.ravel() for a in np.meshgrid(np.arange(N), np.arange(N), indexing="ij"))
    assert grouped(*index.relations(x, y), N * N) == [
        sorted(b for b in range(R) if (p, b, q) in known) for p, q in zip(x, y, strict=True)
    ]
    assert index.num_triples == len(known)
    assert {tuple(t) for t in index.triples().tolist()} == known


def test_contains_duplicates_tensors_and_repeated_queries() -> None:
    triples = np.array([[0, 1, 2], [0, 1, 2], [0, 1, 3], [2, 0, 0]], dtype=np.int32)
    index = FilterIndex.build(triples, N, R)
    rows, tails = index.tails(torch.tensor([0, 5, 0]), torch.tensor([1, 1, 1]))
    assert rows.tolist() == [0, 0, 2, 2]
    assert tails.tolist() == [2, 3, 2, 3]
    assert rows.dtype == tails.dtype == np.int64
    assert index.contains([0, 0, 2, 2], [1, 0, 0, 0], [3, 2, 0, 1]).tolist() == [True, False, True, False]


def test_arrays_round_trip_without_copy() -> None:
    index = FilterIndex.build(np.array([[0, 1, 2], [4, 2, 2]]), N, R)
    arrays = index.to_arrays()
    again = FilterIndex.from_arrays(arrays)
    assert (again.num_entities, again.num_relations) == (N, R)
    assert again.by_head_tail.values is arrays["relations.values"]
    assert again.triples().tolist() == index.triples().tolist()
    with pytest.raises(KeyError):
        FilterIndex.from_arrays({})


@pytest.mark.parametrize("bad", [[0, 0, N], [-1, 0, 0], [0, R, 0]])
def test_ids_out_of_range_are_refused(bad: list[int]) -> None:
    with pytest.raises(ValueError, match="outside"):
        FilterIndex.build(np.array([bad]), N, R)
    index = FilterIndex.build(np.array([[1, 0, 0]]), N, R)
    with pytest.raises(ValueError, match="outside"):
        index.tails([0], [R])  # 0 * R + R is the key of (1, 0)


def test_empty_index_and_huge_graphs() -> None:
    index = FilterIndex.build(np.zeros((0, 3)), N, R)
    assert index.tails([1, 2], [0, 0])[0].size == 0
    assert not index.contains([1], [0], [0]).any()
    with pytest.raises(ValueError, match="63-bit"):
        FilterIndex.build(np.zeros((0, 3)), 2**40, 3)
