"""How the rows of a graph are cut into units of embedding work, and how a piece's rows are read and
written."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kgray.artifact import Artifact, Draft
from kgray.text.vectors import RELATIONS, Half, entities_file, keys_file

RELATION_PART = -1
SMALL_UNIT, LARGE_UNIT = 4096, 32768
LARGE_GRAPH = 1_000_000


@dataclass(frozen=True)
class Piece:
    """Rows ``first .. first + count - 1`` of one input file: of an entity partition, or (``part``
    RELATION_PART) of the relations, whose ``count`` is R though they become 2R vectors. ``name``: of its
    vectors' file."""

    part: int
    first: int
    count: int
    name: str
    keys: str


Unit = tuple[Piece, ...]


def plan_units(parts: Sequence[tuple[int, int]], relations: int) -> list[Unit]:
    """Units of near-equal size. A graph that fits one unit becomes just that, its pieces whole files of the
    artifact; else pieces are chunks, to be joined afterwards. Depends on the graph alone, never on the number
    of workers, so that an interrupted job finds its chunks again."""
    rows = sum(end - start for start, end in parts)
    size = SMALL_UNIT if rows <= LARGE_GRAPH else LARGE_UNIT
    if rows + 2 * relations <= size:
        whole = [
            Piece(p, 0, end - start, entities_file(p), keys_file(p)) for p, (start, end) in enumerate(parts)
        ]
        return [(*whole, Piece(RELATION_PART, 0, relations, RELATIONS, ""))]
    units: list[Unit] = [(_chunk(RELATION_PART, 0, relations),)]
    pending: list[Piece] = []
    for part, (start, end) in enumerate(parts):
        chunks = max(1, -(-(end - start) // size))
        bounds = [(end - start) * at // chunks for at in range(chunks + 1)]
        for first, last in pairwise(bounds):
            if pending and sum(piece.count for piece in pending) + last - first > size:
                units.append(tuple(pending))
                pending = []
            pending.append(_chunk(part, first, last - first))
    units.append(tuple(pending))
    return units


def _chunk(part: int, first: int, count: int) -> Piece:
    stem = "relations" if part == RELATION_PART else f"entities-{part:05d}-{first:010d}"
    return Piece(part, first, count, f"{stem}.npy", f"{stem}.parquet" if part != RELATION_PART else "")


def unit_name(unit: Unit) -> str:
    """The file that says a unit is done, and what it counted."""
    return unit[0].name.removesuffix(".npy") + f"-{len(unit)}.json"


def read_piece(graph: Artifact, piece: Piece, columns: Sequence[str]) -> dict[str, list[str | None]]:
    """Columns of a piece's rows as text; only the row groups that hold them are read."""
    files = graph.parquet_files("relations.parquet" if piece.part == RELATION_PART else "entities")
    begin, end = piece.first, piece.first + piece.count
    tables, at = [], 0
    with graph.open(files[max(piece.part, 0)]) as stream:
        file = pq.ParquetFile(stream)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            low, high = max(begin - at, 0), min(end - at, rows)
            if low < high:
                tables.append(file.read_row_group(group, columns=list(columns)).slice(low, high - low))
            at += rows
        if not tables:
            tables = [pa.Table.from_batches([], schema=file.schema_arrow).select(list(columns))]
    table = pa.concat_tables(tables)
    return {name: [None if v is None else str(v) for v in table[name].to_pylist()] for name in columns}


class NpyWriter:
    """A float16 .npy of known shape, written a block of rows at a time into a stream."""

    def __init__(self, stream: Any, rows: int, dim: int) -> None:
        self._stream, self._left, self._dim = stream, rows, dim
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f2", "fortran_order": False, "shape": (rows, dim)}
        )
        stream.write(header.getvalue())

    def write(self, block: Half) -> None:
        if block.shape[1:] != (self._dim,) or len(block) > self._left:
            raise ValueError(f"block {block.shape} does not fit {self._left} rows of {self._dim}")
        self._left -= len(block)
        self._stream.write(np.ascontiguousarray(block, dtype="<f2").tobytes())

    def close(self) -> None:
        if self._left:
            raise ValueError(f"{self._left} rows were never written")


def write_vectors(draft: Draft, name: str, vectors: Half) -> None:
    """One whole .npy."""
    with draft.open(name) as stream:
        writer = NpyWriter(stream, len(vectors), vectors.shape[1])
        writer.write(vectors)
        writer.close()


def join_part(draft: Draft, scratch: Draft, part: int, pieces: Sequence[Piece], dim: int) -> int:
    """Joins a part's chunks, in row order, into its files of the artifact; at most one chunk is in memory.
    Returns the rows written."""
    if part == RELATION_PART:
        vectors = _read_npy(scratch, pieces[0].name)
        write_vectors(draft, RELATIONS, vectors)
        return len(vectors)
    rows = sum(piece.count for piece in pieces)
    with draft.open(entities_file(part)) as stream:
        writer = NpyWriter(stream, rows, dim)
        for piece in pieces:
            writer.write(_read_npy(scratch, piece.name))
        writer.close()
    schema = pa.schema([("text_sha", pa.binary(16))])
    with draft.open_parquet(keys_file(part), schema) as keys:
        for piece in pieces:
            keys.write_table(pq.read_table(scratch.path_of(piece.keys), filesystem=scratch.fs))
    return rows


def _read_npy(scratch: Draft, name: str) -> Half:
    with scratch.fs.open_input_stream(scratch.path_of(name)) as stream:
        array = np.load(io.BytesIO(stream.read()), allow_pickle=False)
    return np.asarray(array, dtype=np.float16)
