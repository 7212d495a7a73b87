"""Triples: from rows to task-local codes, and from those to dense ids parted by the entities they touch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kgray.data.bad_rows import BadRows, kept_details
from kgray.data.config import SPLITS, STORED, ColumnsConfig, DataConfig
from kgray.data.dictionary import U64, bucket_slices, encode_columns, hash_triples, split_of
from kgray.data.files import Chunk
from kgray.data.partition import partition_of
from kgray.data.rows import Shape, read_rows
from kgray.data.unseen import split_by_entity

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
_FIELDS = ("head", "relation", "tail", "split", "source", "line")


@dataclass
class Triples:
    """Rows of a graph, all arrays (n,): head, tail, line int64; relation, source int32; split int8 (0 train,
    1 valid, 2 test, 3 support)."""

    head: I64
    relation: npt.NDArray[np.int32]
    tail: I64
    split: npt.NDArray[np.int8]
    source: npt.NDArray[np.int32]
    line: I64

    def __len__(self) -> int:
        return len(self.head)

    def __getitem__(self, rows: Any) -> Triples:
        return Triples(*(getattr(self, name)[rows] for name in _FIELDS))


def concat(parts: Sequence[Triples]) -> Triples:
    """Triples of several parts as one, in their order."""
    if not parts:
        empty = np.empty(0, np.int64)
        return Triples(empty, empty.astype(np.int32), empty, empty.astype(np.int8), empty.astype(np.int32), empty)
    return Triples(*(np.concatenate([getattr(part, name) for part in parts]) for name in _FIELDS))


@dataclass
class LocalTriples:
    """What one reading task found: triples in codes of its own, ``ids`` (u,) the entities sorted by (hash, id)."""

    triples: Triples
    ids: Any
    hashes: U64


@dataclass
class TriplesRead:
    """What the driver is told of it: small."""

    rows: int
    bad: BadRows
    relations: list[str]
    relation_in_train: list[bool]
    buckets: list[tuple[int, int]] = field(default_factory=list)


def triple_shape(columns: ColumnsConfig) -> Shape:
    """The columns triples are read from."""
    names = (columns.head, columns.relation, columns.tail, columns.split)
    return Shape(tuple(name for name in names if name is not None))


def read_triples(chunks: Sequence[Chunk], data: DataConfig, buckets: int) -> tuple[Any, ...]:
    """Read chunks into codes. Returns TriplesRead, LocalTriples, and for each hash bucket its part of the entities:
    (ids, in_train), in the order of the local codes.

    Raises DataError where a file as a whole is at fault.
    """
    bad = BadRows(kept_details(data))
    parts = [part for chunk in chunks for part in _blocks(chunk, data, bad)]
    entities = encode_columns([[p[0] for p in parts], [p[2] for p in parts]])
    relations = encode_columns([[p[1] for p in parts]])
    heads, tails = entities.columns
    relation = relations.columns[0]
    lines = _join([p[4] for p in parts], np.int64)
    sources = _join([np.full(len(p[4]), p[5], dtype=np.int32) for p in parts], np.int32)
    splits = _join([p[3] for p in parts], np.int8)
    if data.undirected:
        heads, tails = _turned(heads, tails, entities.hashes)
    divide = splits < 0
    if data.split.by == "entities":
        splits = split_by_entity(entities.hashes, heads, relations.hashes[relation], tails, data.split)
    elif divide.any():
        hashed = hash_triples(
            entities.hashes[heads[divide]],
            relations.hashes[relation[divide]],
            entities.hashes[tails[divide]],
        )
        splits[divide] = split_of(hashed, data.split.seed, data.split.valid, data.split.test)
    train = splits == 0
    in_train = np.zeros(len(entities.ids), dtype=bool)
    in_train[heads[train]] = in_train[tails[train]] = True
    relation_in_train = np.zeros(len(relations.ids), dtype=bool)
    relation_in_train[relation[train]] = True
    slices = bucket_slices(entities.hashes, buckets)
    told = TriplesRead(len(lines), bad, relations.ids.to_pylist(), relation_in_train.tolist(), slices)
    local = LocalTriples(
        Triples(heads, relation.astype(np.int32), tails, splits, sources, lines),
        entities.ids,
        entities.hashes,
    )
    shared = [(_copy(entities.ids, start, end), in_train[start:end].copy()) for start, end in slices]
    return (told, local, *shared)


def _turned(heads: I64, tails: I64, hashes: U64) -> tuple[I64, I64]:
    """Either of (a, b) and (b, a) the same way round everywhere, but by no order of a and b: a model could learn which
    entities stand on the right more often than not. Codes follow (hash, id), so they order a pair alike in all tasks.
    """
    low, high = np.minimum(heads, tails), np.maximum(heads, tails)
    # Any odd factor spreads the low bits of both upwards; the top bit is then as good as a coin.
    coin = ((hashes[low] * np.uint64(3) ^ hashes[high]) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(63)
    flip = coin.astype(bool)
    return np.where(flip, high, low), np.where(flip, low, high)


def _join(parts: list[Any], kind: Any) -> Any:
    return np.concatenate(parts) if parts else np.empty(0, kind)


def _copy(ids: Any, start: int, end: int) -> Any:
    """A slice that does not drag its whole parent along when it is sent."""
    if start == 0 and end == len(ids):
        return ids
    return ids.take(pa.array(np.arange(start, end)))


def _blocks(chunk: Chunk, data: DataConfig, bad: BadRows) -> Iterator[tuple[Any, ...]]:
    """(head, relation, tail, split, line, source) of each block of good rows; split -1: still to be drawn."""
    columns = data.columns
    shape = triple_shape(columns)
    role = chunk.file.role
    fixed = SPLITS.index(role) if role in SPLITS else -1
    for block in read_rows(chunk, shape, shape.required, bad):
        values = block.columns
        lines = block.lines
        splits = np.full(len(lines), fixed, dtype=np.int8)
        if columns.split is not None and columns.split in values:
            given = values[columns.split]
            found = pc.fill_null(pc.index_in(given, value_set=pa.array(SPLITS, given.type)), -1)
            splits = np.asarray(found).astype(np.int8)
            unknown = splits < 0
            for n in np.flatnonzero(unknown):
                reason = f"unknown split {given[int(n)].as_py()!r}; expected {', '.join(SPLITS)}"
                text = "\t".join(values[name][int(n)].as_py() for name in shape.required)
                bad.add(chunk.file.source, int(lines[n]), reason, text)
            if unknown.any():
                keep = pa.array(~unknown)
                values = {name: column.filter(keep) for name, column in values.items()}
                lines, splits = lines[~unknown], splits[~unknown]
        if len(lines):
            # Encoded at once: of a large compressed file the codes may be held, the text may not.
            names = (columns.head, columns.relation, columns.tail)
            head, relation, tail = (values[name].dictionary_encode() for name in names)
            yield head, relation, tail, splits, lines, chunk.file.source


@dataclass
class Encoding:
    """What every encoding task must know: small tables, the same for all."""

    ranges: list[tuple[int, int]]
    """The id range of each partition."""
    offsets: list[int]
    """First id of each hash bucket."""
    relation_ids: dict[str, int]
    relation_in_train: Bools
    """(R,) whether a relation has a training triple."""
    divided: bool
    """Whether splits were drawn here, so that a held-out triple may go back to train."""


@dataclass
class TriplesEncoded:
    """What the driver is told of it."""

    bad: BadRows
    moved_to_train: int


def encode_triples(
    local: LocalTriples,
    relation_names: Sequence[str],
    encoding: Encoding,
    data: DataConfig,
    places: Sequence[tuple[I64, Bools]],
) -> tuple[Any, ...]:
    """Dense ids for a task's triples. ``places``: for each bucket (rank in the bucket or -1, seen in train) of the
    task's entities there. Returns TriplesEncoded, and for each partition the triples with head or tail in it.

    Of drawn splits, a held-out triple whose head, tail or relation no training triple holds goes to train.
    """
    ids = np.concatenate(
        [np.where(rank < 0, -1, rank + start) for (rank, _), start in zip(places, encoding.offsets, strict=True)]
    )
    seen = np.concatenate([flags for _, flags in places])
    relation_map = np.asarray([encoding.relation_ids.get(name, -1) for name in relation_names], dtype=np.int32)
    rows = local.triples
    found = Triples(
        ids[rows.head], relation_map[rows.relation], ids[rows.tail], rows.split.copy(), rows.source, rows.line
    )
    bad = BadRows(kept_details(data))
    good = (found.head >= 0) & (found.relation >= 0) & (found.tail >= 0)
    for n in np.flatnonzero(~good):
        values = (
            ("entity", found.head[n], local.ids[int(rows.head[n])].as_py(), "head"),
            ("relation", found.relation[n], relation_names[int(rows.relation[n])], "relation"),
            ("entity", found.tail[n], local.ids[int(rows.tail[n])].as_py(), "tail"),
        )
        table, _, name, column = next(value for value in values if value[1] < 0)
        split = STORED[int(rows.split[n])]
        reason = f"the {column} {name!r} of this {split} triple has no row in the {table} table; expected one"
        bad.add(int(rows.source[n]), int(rows.line[n]), reason, "\t".join(value[2] for value in values))
    moved = 0
    if encoding.divided:
        lone = good & (rows.split > 0)
        lone &= ~(seen[rows.head] & seen[rows.tail] & encoding.relation_in_train[found.relation])
        found.split[lone] = 0
        moved = int(lone.sum())
    if not good.all():
        found = found[good]
    head_part = partition_of(found.head, encoding.ranges)
    tail_part = partition_of(found.tail, encoding.ranges)
    parts = [found[(head_part == p) | (tail_part == p)] for p in range(len(encoding.ranges))]
    return (TriplesEncoded(bad, moved), *parts)


def deduplicate(triples: Triples) -> tuple[Triples, Bools]:
    """Each triple of a split once, the first by (source, line), in that order.

    Returns the kept ones, and of the given ones which were dropped, (n,) bool.
    """
    rows = triples
    order = np.lexsort((rows.line, rows.source, rows.tail, rows.relation, rows.head, rows.split))
    ordered = rows[order]
    same = np.zeros(len(rows), dtype=bool)
    same[1:] = (
        (ordered.head[1:] == ordered.head[:-1])
        & (ordered.relation[1:] == ordered.relation[:-1])
        & (ordered.tail[1:] == ordered.tail[:-1])
        & (ordered.split[1:] == ordered.split[:-1])
    )
    dropped = np.zeros(len(rows), dtype=bool)
    dropped[order[same]] = True
    kept = rows[~dropped]
    return kept[np.lexsort((kept.line, kept.source))], dropped


def triple_table(triples: Triples) -> Any:
    """The columns a graph artifact holds."""
    return pa.table(
        {
            "head": pa.array(triples.head, pa.int64()),
            "relation": pa.array(triples.relation, pa.int32()),
            "tail": pa.array(triples.tail, pa.int64()),
            "source": pa.array(triples.source, pa.int32()),
            "line": pa.array(triples.line, pa.int64()),
        }
    )
