"""Dictionary encoding: strings to dense ids, the same whatever the number of workers and blocks.

Dense ids follow the order of (hash of the id, id). A hash bucket is a range of hashes, so buckets sorted each for
itself and laid end to end are the whole order, however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

STRING = pa.large_string()
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

_MULTIPLIER = 0x9E3779B97F4A7C15
_SLICE_BYTES = 8 << 20


def mix(values: U64) -> U64:
    """The finaliser of SplitMix64 (Steele et al. 2014), elementwise: a bijection that spreads every bit."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_strings(strings: Any) -> U64:
    """A 64-bit hash of each string's UTF-8 bytes: a polynomial in an odd constant, mixed.

    strings: (n,) large_string without nulls. Returns (n,) uint64. The same on every machine; collisions are
    harmless, for nothing takes equal hashes for equal strings.
    """
    offsets = np.frombuffer(strings.buffers()[1], dtype=np.int64)[strings.offset : strings.offset + len(strings) + 1]
    hashes = np.empty(len(strings), dtype=np.uint64)
    if not len(strings):
        return hashes
    buffer = strings.buffers()[2]
    data = np.frombuffer(buffer, dtype=np.uint8) if buffer is not None else np.empty(0, np.uint8)
    lengths = np.diff(offsets)
    powers = _powers(int(lengths.max()))
    start = 0
    while start < len(strings):
        end = int(np.searchsorted(offsets, offsets[start] + _SLICE_BYTES, side="right")) - 1
        end = max(end, start + 1)
        low, high = int(offsets[start]), int(offsets[end])
        starts = offsets[start:end] - low
        position = np.arange(high - low) - np.repeat(starts, lengths[start:end])
        terms = np.zeros(high - low + 1, dtype=np.uint64)
        np.cumsum((data[low:high].astype(np.uint64) + np.uint64(1)) * powers[position], out=terms[1:])
        sums = terms[offsets[start + 1 : end + 1] - low] - terms[starts]
        hashes[start:end] = mix(sums + lengths[start:end].astype(np.uint64) * np.uint64(_MULTIPLIER))
        start = end
    return hashes


def _powers(longest: int) -> U64:
    factors = np.full(max(longest, 1), _MULTIPLIER, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors)


def bucket_bounds(buckets: int) -> list[int]:
    """First hash of each bucket, and 2**64."""
    return [(b << 64) // buckets for b in range(buckets + 1)]


def bucket_slices(hashes: U64, buckets: int) -> list[tuple[int, int]]:
    """Where each bucket lies in sorted hashes: (start, end)."""
    return list(pairwise(bucket_cuts(hashes, buckets)))


def bucket_cuts(hashes: U64, buckets: int) -> list[int]:
    """Where each bucket begins in sorted hashes, and their number."""
    inner = np.asarray(bucket_bounds(buckets)[1:-1], dtype=np.uint64)
    return [0, *np.searchsorted(hashes, inner, side="left").tolist(), len(hashes)]


@dataclass
class Codes:
    """Strings of several columns as codes into one list: ``ids`` (u,) sorted by (hash, id), ``hashes`` (u,) uint64,
    ``columns``: each (n,) int64 codes."""

    ids: Any
    hashes: U64
    columns: list[I64]


def encode_columns(columns: Sequence[Sequence[Any]]) -> Codes:
    """Encode columns (each a list of large_string blocks, plain or dictionary-encoded) against all their strings."""
    parts = [block.dictionary_encode() for column in columns for block in column]
    if not parts:
        return Codes(pa.array([], STRING), np.empty(0, np.uint64), [np.empty(0, np.int64) for _ in columns])
    if not all(part.dictionary.equals(parts[0].dictionary) for part in parts[1:]):
        parts = pa.chunked_array(parts).unify_dictionaries().chunks
    values = parts[0].dictionary
    hashes = hash_strings(values)
    order = sort_by_hash(values, hashes)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    chunks = iter(parts)
    encoded = []
    for column in columns:
        codes = [place[np.asarray(next(chunks).indices)] for _ in column]
        encoded.append(np.concatenate(codes) if codes else np.empty(0, np.int64))
    return Codes(values.take(pa.array(order)), hashes[order], encoded)


def sort_by_hash(ids: Any, hashes: U64) -> I64:
    """The order of strings by (hash, string). Returns (n,) int64 indices."""
    fast = np.argsort(hashes)
    ordered = hashes[fast]
    if not (ordered[1:] == ordered[:-1]).any():
        return fast
    table = pa.table({"hash": pa.array(hashes), "id": ids})
    order = pc.sort_indices(table, sort_keys=[("hash", "ascending"), ("id", "ascending")])
    return np.asarray(order).astype(np.int64)


def join_sorted(parts: Sequence[tuple[Any, U64]]) -> tuple[Any, list[I64]]:
    """The dictionary of several lists of ids, each with its hashes and sorted by them.

    Returns the distinct ids in the order of (hash, id), and for each list where its ids are there, (n,) int64. A merge
    of sorted hashes; strings are only compared, to be sure that equal hashes are equal ids.
    """
    distinct = np.unique(np.concatenate([hashes for _, hashes in parts])) if parts else np.empty(0, np.uint64)
    places = [np.searchsorted(distinct, hashes).astype(np.int64) for _, hashes in parts]
    example = np.empty(len(distinct), dtype=np.int64)
    start = 0
    for place in places:
        example[place] = start + np.arange(len(place))
        start += len(place)
    every = pa.concat_arrays([ids for ids, _ in parts]) if parts else pa.array([], STRING)
    merged = every.take(pa.array(example))
    for (ids, _), place in zip(parts, places, strict=True):
        if not pc.all(pc.equal(ids, merged.take(pa.array(place)))).as_py():
            merged = encode_columns([[ids for ids, _ in parts]]).ids  # two ids of one hash
            return merged, [look_up(ids, merged) for ids, _ in parts]
    return merged, places


def look_up(ids: Any, dictionary: Any) -> I64:
    """Place of each of ``ids`` in ``dictionary`` (unique strings), -1 where it has none. Returns (n,) int64."""
    found = pc.fill_null(pc.index_in(ids, value_set=dictionary), -1)
    return np.asarray(found).astype(np.int64)


def split_of(triple_hashes: U64, seed: int, valid: float, test: float) -> npt.NDArray[np.int8]:
    """The split of each triple from its hash: 0 train, 1 valid, 2 test. Returns (n,) int8."""
    salted = mix(triple_hashes + mix(np.asarray([seed], dtype=np.uint64) + np.uint64(_MULTIPLIER)))
    share = (salted >> np.uint64(11)).astype(np.float64) / float(1 << 53)
    splits = np.zeros(len(share), dtype=np.int8)
    splits[share < valid + test] = 1
    splits[share < test] = 2
    return splits


def hash_triples(heads: U64, relations: U64, tails: U64) -> U64:
    """One hash of three; the places are told apart. All (n,) uint64."""
    return mix(heads + mix(relations + mix(tails + np.uint64(_MULTIPLIER))))
