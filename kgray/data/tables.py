"""Entity and relation tables: reading them, and merging them with the ids the triples hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kgray.data.bad_rows import BadRows, kept_details
from kgray.data.config import ColumnsConfig, DataConfig
from kgray.data.dictionary import (
    I64,
    STRING,
    bucket_cuts,
    hash_strings,
    join_sorted,
    look_up,
    sort_by_hash,
)
from kgray.data.files import Chunk
from kgray.data.rows import Shape, read_rows
from kgray.data.scratch import Scratch, as_numpy

_OWN = ("external_id", "name", "description", "type")
_HASH, _SOURCE, _LINE = "\0hash", "\0source", "\0line"
"""Columns that never leave an ingest; no file has such names."""


def table_shape(columns: ColumnsConfig) -> Shape:
    """The columns of an entity or relation table."""
    return Shape((columns.id,), optional=(columns.name, columns.description, columns.type), extras=True)


@dataclass
class TableRead:
    """What the driver is told of a table chunk: ``columns`` in the order of the file."""

    rows: int
    bad: BadRows
    columns: list[str]


def read_table(scratch: Scratch, name: str, chunks: Sequence[Chunk], data: DataConfig, buckets: int) -> TableRead:
    """Rows of a table, renamed to external_id, name, description, type, extras, written to scratch as ``name``, a batch
    for each hash bucket."""
    bad = BadRows(kept_details(data))
    shape = table_shape(data.columns)
    parts = []
    for chunk in chunks:
        for block in read_rows(chunk, shape, (), bad):
            columns = {_rename(name, data.columns): column for name, column in block.columns.items()}
            columns[_HASH] = pa.array(hash_strings(columns["external_id"]))
            columns[_SOURCE] = pa.array(np.full(len(block.lines), chunk.file.source, dtype=np.int32))
            columns[_LINE] = pa.array(block.lines)
            parts.append(pa.table(columns))
    table = merge_tables(parts)
    hashes = np.asarray(table.column(_HASH)).astype(np.uint64)
    order = np.argsort(hashes, kind="stable")
    scratch.write(name, table.take(pa.array(order)), bucket_cuts(hashes[order], buckets))
    extras = [column for column in table.column_names if column not in (_HASH, _SOURCE, _LINE)]
    return TableRead(table.num_rows, bad, extras)


def _rename(name: str, columns: ColumnsConfig) -> str:
    own = {
        columns.id: "external_id",
        columns.name: "name",
        columns.description: "description",
        columns.type: "type",
    }
    if name in own:
        return own[name]
    return f"extra_{name}" if name in (*_OWN, "id") else name


def merge_tables(parts: Sequence[Any]) -> Any:
    """Tables one after the other; a column some lack is empty there."""
    empty = pa.table(
        {
            "external_id": pa.array([], STRING),
            _HASH: pa.array([], pa.uint64()),
            _SOURCE: pa.array([], pa.int32()),
            _LINE: pa.array([], pa.int64()),
        }
    )
    names = dict.fromkeys(name for part in (empty, *parts) for name in part.column_names)
    filled = []
    for part in (empty, *parts):
        missing = [name for name in names if name not in part.column_names]
        for name in missing:
            part = part.append_column(name, pa.array(np.full(part.num_rows, "", dtype=object), STRING))
        filled.append(part.select(list(names)))
    return pa.concat_tables(filled)


@dataclass
class BucketMerged:
    """What the driver is told of one hash bucket of entities."""

    entities: int
    bad: BadRows
    missing_name: int
    missing_description: int
    missing_text: int


def merge_bucket(
    scratch: Scratch, bucket: int, tables: int, reading: int, data: DataConfig, paths: Sequence[str]
) -> BucketMerged:
    """One bucket of the dictionary: ``entities/bucket``, its entities in id order (external_id, name, description,
    type, extras), and ``places/bucket``, a batch for each reading task: where its entities are (rank int32, -1: in
    no table) and whether a training triple of any task holds them.

    tables: tasks that read the entity table, 0 where there is none; reading: tasks that read triples.
    """
    bad = BadRows(kept_details(data))
    parts = [scratch.read(f"ids/{task}", bucket) for task in range(reading)]
    if tables:
        rows = [pa.Table.from_batches([scratch.read(f"table/{task}", bucket)]) for task in range(tables)]
        entities = unique_rows(merge_tables(rows), bad, paths)
        ids = combined(entities.column("external_id"))
        ranks = [look_up(part.column("id"), ids) for part in parts]
    else:
        ids, ranks = join_sorted([(part.column("id"), as_numpy(part.column("hash"))) for part in parts])
        entities = pa.table({"external_id": ids})
    count = entities.num_rows
    blank = pa.array(np.full(count, "", dtype=object), STRING)
    for name in _OWN[1:]:
        if name not in entities.column_names:
            entities = entities.append_column(name, blank)
    in_train = np.zeros(count, dtype=bool)
    for rank, part in zip(ranks, parts, strict=True):
        in_train[rank[(rank >= 0) & as_numpy(part.column("in_train"))]] = True
    no_name, no_text = is_blank(entities.column("name")), is_blank(entities.column("description"))
    scratch.write(f"entities/{bucket}", entities)
    every = np.concatenate(ranks) if ranks else np.empty(0, dtype=np.int64)
    seen = np.where(every < 0, False, in_train[every]) if count else every >= 0
    bounds = [0, *np.cumsum([len(rank) for rank in ranks]).tolist()]
    scratch.write_arrays(f"places/{bucket}", bounds, rank=every.astype(np.int32), seen=seen)
    return BucketMerged(count, bad, int(no_name.sum()), int(no_text.sum()), int((no_name & no_text).sum()))


def unique_rows(table: Any, bad: BadRows, paths: Sequence[str]) -> Any:
    """Rows sorted by (hash, id); of rows of one id the first in file order, the others bad."""
    keys = [(name, "ascending") for name in (_HASH, "external_id", _SOURCE, _LINE)]
    table = table.take(pc.sort_indices(table, sort_keys=keys)).combine_chunks()
    ids = combined(table.column("external_id"))
    repeated = np.zeros(len(ids), dtype=bool)
    if len(ids) > 1:
        repeated[1:] = np.asarray(pc.equal(ids.slice(1), ids.slice(0, len(ids) - 1)))
    if repeated.any():
        firsts = np.maximum.accumulate(np.where(repeated, -1, np.arange(len(ids))))
        for n in np.flatnonzero(repeated):
            first, again = (
                (int(table.column(_SOURCE)[int(row)].as_py()), int(table.column(_LINE)[int(row)].as_py()))
                for row in (firsts[n], n)
            )
            name = ids[int(n)].as_py()
            place = f"line {first[1]}" if first[0] == again[0] else f"{paths[first[0]]}, line {first[1]}"
            bad.add(*again, f"the id {name!r} has a row already in {place}; expected each id once", name)
        table = table.filter(pa.array(~repeated))
    return table.drop_columns([_HASH, _SOURCE, _LINE])


def is_blank(column: Any) -> Any:
    """Which texts are empty or white space. Returns (n,) bool."""
    column = combined(column)
    return np.asarray(pc.or_(pc.equal(pc.binary_length(column), 0), pc.utf8_is_space(column)))


def combined(column: Any) -> Any:
    """A column as one array."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def output_columns(read: Iterable[TableRead]) -> list[str]:
    """Columns of the written table: the fixed ones, then extras in the order the files have them."""
    extras = dict.fromkeys(name for part in read for name in part.columns if name not in _OWN)
    return ["id", *_OWN, *extras]


def named(table: Any, first_id: int, columns: Sequence[str]) -> Any:
    """Rows as they are written: ids from ``first_id``, the external id for a name that is blank, all ``columns``."""
    ids: I64 = np.arange(first_id, first_id + table.num_rows, dtype=np.int64)
    values: dict[str, Any] = {"id": pa.array(ids)}
    for name in columns[1:]:
        if name not in table.column_names:
            values[name] = pa.array(np.full(table.num_rows, "", dtype=object), pa.string())
            continue
        column = table.column(name)
        if name == "name":
            blank = pa.array(is_blank(column))
            column = pc.if_else(blank, combined(table.column("external_id")), combined(column))
        values[name] = column.cast(pa.string())
    return pa.table(values)


def name_buckets(scratch: Scratch, bucket: int, buckets: int) -> None:
    """Names given (not blank) to the entities of a bucket, to ``names/bucket``, a batch a hash bucket of names."""
    names = combined(scratch.read_all(f"entities/{bucket}").column("name"))
    names = names.filter(pa.array(~is_blank(names)))
    hashes = hash_strings(names)
    order = sort_by_hash(names, hashes)
    sorted_names = pa.record_batch({"name": names.take(pa.array(order))})
    scratch.write(f"names/{bucket}", sorted_names, bucket_cuts(hashes[order], buckets))


def duplicate_names(scratch: Scratch, bucket: int, buckets: int) -> tuple[int, int]:
    """(names that several entities bear, entities that bear them) among one bucket of names."""
    parts = [scratch.read(f"names/{n}", bucket).column("name") for n in range(buckets)]
    counts = np.asarray(pc.value_counts(pa.chunked_array(parts, STRING)).field("counts"))
    shared = counts[counts > 1]
    return len(shared), int(shared.sum())


@dataclass
class RelationTable:
    """The relations of a graph: ``codes`` external id -> dense id, ``table`` as it is written."""

    codes: dict[str, int]
    table: Any
    without_text: list[str]
    shared_names: list[str]


def relation_table(
    rows: Sequence[Any] | None,
    read: Sequence[TableRead],
    used: Iterable[str],
    bad: BadRows,
    paths: Sequence[str],
) -> RelationTable:
    """Relations in the order of their ids' UTF-8 bytes. ``rows``: of the relation table, None if there is none;
    then they are those ``used`` in triples. Repeated ids go to ``bad``."""
    if rows is None:
        table = pa.table({"external_id": pa.array(list(used), STRING)})
    else:
        table = unique_rows(merge_tables(rows), bad, paths)
    table = table.take(pc.sort_indices(table, sort_keys=[("external_id", "ascending")])).combine_chunks()
    ids = table.column("external_id").to_pylist()
    for name in ("name", "description"):
        if name not in table.column_names:
            table = table.append_column(name, pa.array([""] * len(ids), STRING))
    columns = [name for name in output_columns(read) if name != "type"]
    if "type" in table.column_names:
        columns.insert(4, "type")
    written = named(table, 0, columns)
    blank = is_blank(table.column("name")) & is_blank(table.column("description"))
    names = written.column("name").to_pylist()
    return RelationTable(
        codes={name: n for n, name in enumerate(ids)},
        table=written,
        without_text=[name for name, lacks in zip(ids, blank, strict=True) if lacks],
        shared_names=sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else [],
    )
