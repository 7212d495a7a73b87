"""Hashing and dictionary encoding against plain Python."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgray.data import dictionary
from kgray.data.dictionary import (
    STRING,
    bucket_bounds,
    bucket_slices,
    encode_columns,
    hash_strings,
    hash_triples,
    join_sorted,
    look_up,
    split_of,
)

MASK = 2**64 - 1
ODD = 0x9E3779B97F4A7C15
texts = st.lists(
    st.text(max_size=12).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text)), max_size=40
)


def slow_mix(x: int) -> int:
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & MASK
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def slow_hash(text: str) -> int:
    data = text.encode()
    total = sum((byte + 1) * pow(ODD, n, 2**64) for n, byte in enumerate(data))
    return slow_mix((total + len(data) * ODD) & MASK)


@given(texts, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_hash_equals_plain_python(strings: list[str], skip: int) -> None:
    array = pa.array(strings, STRING)
    assert hash_strings(array).tolist() == [slow_hash(text) for text in strings]
    assert hash_strings(array.slice(skip)).tolist() == [slow_hash(text) for text in strings[skip:]]


def test_hash_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    strings = ["", "abc", "x" * 50, "", "é", "y" * 9]
    monkeypatch.setattr(dictionary, "_SLICE_BYTES", 7)
    assert hash_strings(pa.array(strings, STRING)).tolist() == [slow_hash(text) for text in strings]


@given(texts, texts, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_encoding_equals_plain_python(first: list[str], second: list[str], step: int) -> None:
    def blocks(strings: list[str]) -> list[pa.Array]:
        return [pa.array(strings[n : n + step], STRING) for n in range(0, len(strings), step)]

    codes = encode_columns([blocks(first), blocks(second)])
    order = sorted({*first, *second}, key=lambda text: (slow_hash(text), text.encode()))
    assert codes.ids.to_pylist() == order
    assert codes.hashes.tolist() == [slow_hash(text) for text in order]
    for strings, column in zip((first, second), codes.columns, strict=True):
        assert [order[code] for code in column] == strings


@given(st.lists(texts, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_joining_equals_plain_python(lists: list[list[str]]) -> None:
    parts = []
    for strings in lists:
        codes = encode_columns([[pa.array(strings, STRING)]])
        parts.append((codes.ids, codes.hashes))
    merged, places = join_sorted(parts)
    wanted = sorted({text for strings in lists for text in strings}, key=lambda text: (slow_hash(text), text.encode()))
    assert merged.to_pylist() == wanted
    for (ids, _), place in zip(parts, places, strict=True):
        assert [wanted[n] for n in place] == ids.to_pylist()


@pytest.mark.parametrize("kept_bits", [0, 1, 2])
def test_equal_hashes_are_not_taken_for_equal_ids(kept_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if almost every hash were another one's too."""
    full = hash_strings
    monkeypatch.setattr(dictionary, "hash_strings", lambda strings: full(strings) & np.uint64((1 << kept_bits) - 1))
    lists = [["a", "b", "c", "d", "e"], ["c", "x", "a"], [], ["e", "y"]]
    parts = []
    for strings in lists:
        codes = encode_columns([[pa.array(strings, STRING)]])
        assert sorted(codes.ids.to_pylist()) == sorted(strings)
        parts.append((codes.ids, codes.hashes))
    merged, places = join_sorted(parts)
    assert sorted(merged.to_pylist()) == ["a", "b", "c", "d", "e", "x", "y"]
    for (ids, _), place in zip(parts, places, strict=True):
        assert [merged[int(n)].as_py() for n in place] == ids.to_pylist()


@pytest.mark.parametrize("buckets", [1, 2, 3, 7, 256])
def test_buckets_cover_all_hashes_in_order(buckets: int) -> None:
    bounds = bucket_bounds(buckets)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, 2**64, buckets + 1)
    hashes = np.sort(np.random.default_rng(0).integers(0, MASK, 500, dtype=np.uint64, endpoint=True))
    slices = bucket_slices(hashes, buckets)
    assert [slices[0][0], slices[-1][1]] == [0, 500]
    for n, (start, end) in enumerate(slices):
        assert all(bounds[n] <= int(one) < bounds[n + 1] for one in hashes[start:end])


def test_look_up() -> None:
    found = look_up(pa.array(["b", "x", "a"], STRING), pa.array(["a", "b"], STRING))
    assert found.tolist() == [1, -1, 0]
    assert look_up(pa.array(["b"], STRING), pa.array([], STRING)).tolist() == [-1]


def test_drawn_splits_have_their_shares_and_follow_the_seed() -> None:
    hashes = hash_strings(pa.array([f"t{n}" for n in range(20000)], STRING))
    splits = split_of(hashes, 3, 0.1, 0.2)
    shares = np.bincount(splits, minlength=3) / len(splits)
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.015)
    assert (split_of(hashes, 4, 0.1, 0.2) != splits).mean() > 0.3
    assert split_of(hashes, 3, 0.0, 0.0).max() == 0


def test_triple_hash_tells_the_places_apart() -> None:
    a, b = (np.asarray([n], dtype=np.uint64) for n in (1, 2))
    hashes = {int(hash_triples(x, y, z)[0]) for x in (a, b) for y in (a, b) for z in (a, b)}
    assert len(hashes) == 8
