"""Triples: from rows to task-local codes, and from those to dense ids parted by the entities they touch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kgray.data.bad_rows import BadRows, kept_details
from kgray.data.config import SPLITS, STORED, ColumnsConfig, DataConfig
from kgray.data.dictionary import U64, bucket_cuts, encode_columns, hash_triples, split_of
from kgray.data.files import SYNTHETIC, Chunk
from kgray.data.partition import Layout
from kgray.data.rows import Shape, read_rows
from kgray.data.scratch import Scratch, as_numpy
from kgray.data.synthetic import SyntheticGraph
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
class TriplesRead:
    """What the driver is told of a reading task: small."""

    rows: int
    bad: BadRows
    relations: list[str]
    relation_rows: list[int]
    """Training triples of each of them."""


def triple_shape(columns: ColumnsConfig) -> Shape:
    """The columns triples are read from."""
    names = (columns.head, columns.relation, columns.tail, columns.split)
    return Shape(tuple(name for name in names if name is not None))


def read_triples(scratch: Scratch, number: int, chunks: Sequence[Chunk], data: DataConfig, buckets: int) -> TriplesRead:
    """Read chunks into codes of the task's own. Writes ``rows/number``, the triples, and ``ids/number``: the entities
    in the order of the codes, (hash, id), with their hashes and whether a training triple holds them; a batch a bucket.

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
    del parts
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
    relation_rows = np.bincount(relation[train], minlength=len(relations.ids))
    scratch.write_arrays(
        f"rows/{number}",
        head=heads.astype(np.uint32),
        relation=relation.astype(np.int32),
        tail=tails.astype(np.uint32),
        split=splits,
        source=sources,
        line=lines,
    )
    seen = {"id": entities.ids, "hash": pa.array(entities.hashes), "in_train": pa.array(in_train)}
    scratch.write(f"ids/{number}", pa.record_batch(seen), bucket_cuts(entities.hashes, buckets))
    return TriplesRead(len(lines), bad, relations.ids.to_pylist(), relation_rows.tolist())


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


def _blocks(chunk: Chunk, data: DataConfig, bad: BadRows) -> Iterator[tuple[Any, ...]]:
    """(head, relation, tail, split, line, source) of each block of good rows; split -1: still to be drawn."""
    if chunk.file.format == SYNTHETIC:
        yield from _drawn(chunk, data)
        return
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


def _drawn(chunk: Chunk, data: DataConfig) -> Iterator[tuple[Any, ...]]:
    """The same of a synthetic graph."""
    graph = SyntheticGraph.of(data)
    if graph is None or chunk.end is None:
        raise ValueError(f"no synthetic triples: {data.triples!r}, {chunk}")
    for head, relation, tail, start in graph.blocks(chunk.start, chunk.end):
        lines = start + 1 + np.arange(len(head), dtype=np.int64)
        yield head, relation, tail, np.full(len(head), -1, dtype=np.int8), lines, chunk.file.source


@dataclass
class Encoding:
    """What every encoding task must know: small tables, the same for all."""

    layout: Layout
    offsets: list[int]
    """First id of each hash bucket, in the order of hashes."""
    renumbered: bool
    """Whether a partitioner gave other ids (``numbers``, see partitioning.py)."""
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
    scratch: Scratch, number: int, relation_names: Sequence[str], encoding: Encoding, data: DataConfig
) -> TriplesEncoded:
    """Dense ids for a reading task's triples. Writes ``own/number``, a batch for each cell of those with their head in
    it, in the order of the file, and ``foreign/number``, of those with their tail alone in it.

    Of drawn splits, a held-out triple whose head, tail or relation no training triple holds goes to train.
    """
    ids, seen = places_of(scratch, number, encoding.offsets, encoding.renumbered)
    relation_map = np.asarray([encoding.relation_ids.get(name, -1) for name in relation_names], dtype=np.int32)
    local = read_rows_of(scratch, f"rows/{number}")
    found = Triples(
        ids[local.head], relation_map[local.relation], ids[local.tail], local.split.copy(), local.source, local.line
    )
    bad = BadRows(kept_details(data))
    good = (found.head >= 0) & (found.relation >= 0) & (found.tail >= 0)
    if not good.all():
        names = scratch.read_all(f"ids/{number}").column("id")
        _tell(bad, local, found, np.flatnonzero(~good), names, relation_names)
    moved = 0
    if encoding.divided:
        lone = np.flatnonzero(good & (local.split > 0))
        kept = seen[local.head[lone]] & seen[local.tail[lone]] & encoding.relation_in_train[found.relation[lone]]
        found.split[lone[~kept]] = 0
        moved = len(lone) - int(kept.sum())
    if not good.all():
        found = found[good]
    layout = encoding.layout
    head_cell, tail_cell = layout.cell_of(found.head), layout.cell_of(found.tail)
    order, bounds = grouped(head_cell, layout.num_cells)
    write_rows(scratch, f"own/{number}", found[order], bounds, layout.id_type)
    away = np.flatnonzero(head_cell != tail_cell)
    order, bounds = grouped(tail_cell[away], layout.num_cells)
    order = away[order]
    scratch.write_arrays(
        f"foreign/{number}",
        bounds,
        head=found.head[order].astype(layout.id_type),
        relation=found.relation[order],
        tail=found.tail[order].astype(layout.id_type),
        split=found.split[order],
    )
    return TriplesEncoded(bad, moved)


def places_of(scratch: Scratch, number: int, offsets: Sequence[int], renumbered: bool) -> tuple[I64, Bools]:
    """Of each entity of a reading task, in the order of its codes: the dense id, -1 of one that has none, and whether a
    training triple anywhere holds it."""
    ids, seen = [], []
    for bucket, offset in enumerate(offsets):
        batch = scratch.read(f"places/{bucket}", number)
        rank = as_numpy(batch.column("rank")).astype(np.int64)
        if renumbered and len(rank):
            numbers = scratch.column(f"numbers/{bucket}", "number")
            ids.append(np.append(numbers, -1)[rank])  # -1, nobody's rank, is the last place
        else:
            ids.append(np.where(rank < 0, -1, rank + offset))
        seen.append(as_numpy(batch.column("seen")))
    return _join(ids, np.int64), _join(seen, np.bool_)


def _tell(bad: BadRows, local: Triples, found: Triples, rows: I64, ids: Any, relation_names: Sequence[str]) -> None:
    """Which part of these triples no table knows."""
    for n in rows:
        values = (
            ("entity", found.head[n], ids[int(local.head[n])].as_py(), "head"),
            ("relation", found.relation[n], relation_names[int(local.relation[n])], "relation"),
            ("entity", found.tail[n], ids[int(local.tail[n])].as_py(), "tail"),
        )
        table, _, name, column = next(value for value in values if value[1] < 0)
        split = STORED[int(local.split[n])]
        reason = f"the {column} {name!r} of this {split} triple has no row in the {table} table; expected one"
        bad.add(int(local.source[n]), int(local.line[n]), reason, "\t".join(value[2] for value in values))


def grouped(groups: npt.NDArray[np.uint16], number: int) -> tuple[I64, list[int]]:
    """An order that brings equal groups together, each in the order it was in, and where each begins, (number + 1,)."""
    order = np.argsort(groups, kind="stable")  # of 16 bits a radix sort
    return order, [0, *np.cumsum(np.bincount(groups, minlength=number)).tolist()]


def write_rows(scratch: Scratch, name: str, rows: Triples, bounds: Sequence[int] | None, id_type: Any) -> None:
    """Write triples, a batch between bounds."""
    columns = {field: getattr(rows, field) for field in _FIELDS}
    columns["head"], columns["tail"] = rows.head.astype(id_type), rows.tail.astype(id_type)
    scratch.write_arrays(name, bounds, **columns)


def read_rows_of(scratch: Scratch, name: str, number: int = 0) -> Triples:
    """A batch of triples."""
    batch = scratch.read(name, number)
    columns = {field: as_numpy(batch.column(field)) for field in _FIELDS}
    return Triples(**columns | {end: columns[end].astype(np.int64) for end in ("head", "tail")})


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
