"""Text and Parquet to columns of strings, with the line of every row.

Each text format has one fast path (pyarrow's parser) that is taken for a block only where it is sure to give the
same rows and the same line numbers as the slow exact one, and the slow one, which also names what is wrong.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from kgray.data import ntriples
from kgray.data.bad_rows import BadRows
from kgray.data.files import Chunk, blocks, open_raw
from kgray.errors import DataError

STRING = pa.large_string()
_SEPARATOR = {"tsv": "\t", "csv": ","}


@dataclass(frozen=True)
class Shape:
    """The columns wanted, by their names in the file."""

    required: tuple[str, ...]
    """Must exist and hold something in every row."""
    present: tuple[str, ...] = ()
    """Must exist, may be empty."""
    optional: tuple[str, ...] = ()
    """May be absent; then empty."""
    extras: bool = False
    """Whether all other columns are kept, as text."""

    def wanted(self, names: Sequence[str]) -> list[str]:
        """The columns to keep of those a file has, in the file's order."""
        known = {*self.required, *self.present, *self.optional}
        return [name for name in names if self.extras or name in known]


@dataclass
class RowBlock:
    """Some rows: ``columns`` name -> (n,) large_string array without nulls, ``lines`` (n,) int64."""

    columns: dict[str, Any]
    lines: npt.NDArray[np.int64]


def check_columns(chunk: Chunk, shape: Shape, option_hint: str) -> None:
    """Whether a file with named columns has those it needs, of the right type.

    Raises DataError naming the missing column, what there is, and the option that renames columns.
    """
    missing = [name for name in (*shape.required, *shape.present) if name not in chunk.header]
    where = chunk.file.path + ("" if chunk.file.format == "parquet" else ", line 1")
    if missing:
        raise DataError(
            f"{where}: no column {', '.join(map(repr, missing))} among {', '.join(map(repr, chunk.header))}; "
            f"expected {', '.join((*shape.required, *shape.present))} (or name them in {option_hint})"
        )
    if chunk.file.format != "parquet":
        return
    import pyarrow.parquet as pq

    with open_raw(chunk.file) as raw:
        schema = pq.ParquetFile(raw).schema_arrow
    for name in (*shape.required, *shape.present, *(n for n in shape.optional if n in chunk.header)):
        kind = schema.field(name).type
        if not _is_text(kind):
            raise DataError(f"{where}: the column {name!r} has the type {kind}; expected string")


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def read_rows(chunk: Chunk, shape: Shape, names: Sequence[str], bad: BadRows) -> Iterator[RowBlock]:
    """The good rows of a chunk; the others go to ``bad``.

    ``names``: the columns of a file without a line of names. Raises DataError where the file itself is at fault.
    """
    kind = chunk.file.format
    names = list(chunk.header) or list(names)
    if kind == "parquet":
        yield from _read_parquet(chunk, shape, bad)
        return
    skip = chunk.header_line
    for line, block in blocks(chunk, quoted=kind == "csv"):
        if skip:
            _, _, block = block.partition(b"\n")
            line, skip = line + 1, False
        if kind in _SEPARATOR:
            yield _delimited(block, line, kind, names, shape, chunk.file.source, bad)
        elif kind == "ntriples":
            columns, lines = ntriples.parse(block, line, shape.required[:3], chunk.file.source, bad)
            yield RowBlock(columns, lines)
        else:
            yield _jsonl(block, line, shape, chunk.file.source, bad)


# --- TSV and CSV ----------------------------------------------------------------------------------


def _delimited(
    data: bytes, line: int, kind: str, names: Sequence[str], shape: Shape, source: int, bad: BadRows
) -> RowBlock:
    return fast_delimited(data, line, kind, names, shape) or slow_delimited(data, line, kind, names, shape, source, bad)


def fast_delimited(data: bytes, line: int, kind: str, names: Sequence[str], shape: Shape) -> RowBlock | None:
    """pyarrow's CSV parser, or None where a row is bad or its line number would not be sure."""
    data = data.rstrip(b"\r\n")
    if not data:
        return None
    if kind == "csv" and b'"' in data:
        return None  # pyarrow forgives bad quoting, and joins lines within quotes
    if b"\r" in data and data.count(b"\r") != data.count(b"\r\n"):
        return None
    try:
        str(data, "utf-8")
        table = pa.csv.read_csv(
            pa.py_buffer(data),
            read_options=pa.csv.ReadOptions(column_names=list(names), use_threads=False, block_size=len(data) + 1),
            parse_options=pa.csv.ParseOptions(delimiter=_SEPARATOR[kind], quote_char=False),
            convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(names, STRING), strings_can_be_null=False),
        )
    except (UnicodeDecodeError, pa.ArrowException, OverflowError):
        return None
    if table.num_rows != data.count(b"\n") + 1:
        return None  # blank lines
    columns = {name: _one(table.column(name)) for name in shape.wanted(names)}
    if any(_some_empty(columns[name]) for name in shape.required):
        return None
    return RowBlock(columns, line + np.arange(table.num_rows, dtype=np.int64))


def slow_delimited(
    data: bytes, line: int, kind: str, names: Sequence[str], shape: Shape, source: int, bad: BadRows
) -> RowBlock:
    """Row by row, saying of each bad one what is wrong. Blank lines are passed over."""
    wanted = shape.wanted(names)
    where = {name: n for n, name in enumerate(names)}
    needed = [(name, where[name]) for name in shape.required]
    rows: list[list[str]] = []
    lines: list[int] = []
    for at, fields, text, problem in _tsv_rows(data, line) if kind == "tsv" else _csv_rows(data, line):
        if not problem and len(fields) != len(names):
            problem = (
                f"found {len(fields)} column{'s' * (len(fields) != 1)}; expected {len(names)} ({', '.join(names)}) "
                f"separated by {'tabs' if kind == 'tsv' else 'commas'}"
            )
        if not problem:
            empty = next((name for name, n in needed if not fields[n] or fields[n].isspace()), None)
            problem = f"the column {empty!r} is empty; expected a value" if empty is not None else ""
        if problem:
            bad.add(source, at, problem, text)
            continue
        rows.append(fields)
        lines.append(at)
    columns = {name: pa.array([row[where[name]] for row in rows], STRING) for name in wanted}
    return RowBlock(columns, np.asarray(lines, dtype=np.int64))


def _tsv_rows(data: bytes, line: int) -> Iterator[tuple[int, list[str], str, str]]:
    for at, raw in enumerate(data.split(b"\n"), start=line):
        raw = raw.removesuffix(b"\r")
        if not raw:
            continue
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            yield at, [], raw.decode("utf-8", "replace"), not_utf8(error)
            continue
        yield at, text.split("\t"), text, ""


def _csv_rows(data: bytes, line: int) -> Iterator[tuple[int, list[str], str, str]]:
    csv.field_size_limit(2**31 - 1)  # a description may be longer than the 128 KiB the module stops at
    raw_lines = data.split(b"\n")
    if raw_lines[-1] == b"":
        raw_lines.pop()
    reader = csv.reader((raw.decode("utf-8", "surrogateescape") + "\n" for raw in raw_lines), strict=True)
    while True:
        start = reader.line_num
        problem = ""
        fields: list[str] = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"bad quoting ({error}); expected a field in double quotes to be closed by one"
        raw = b"\n".join(raw_lines[start : reader.line_num])
        if not problem and not fields:
            continue
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            problem = not_utf8(error)
        yield line + start, fields, raw.decode("utf-8", "replace"), problem


def not_utf8(error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are no UTF-8."""
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start + 1}); expected UTF-8 text"


# --- JSONL ----------------------------------------------------------------------------------------


def _jsonl(data: bytes, line: int, shape: Shape, source: int, bad: BadRows) -> RowBlock:
    known = (*shape.required, *shape.present, *shape.optional)
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    extras: dict[str, None] = {}
    for at, raw in enumerate(data.split(b"\n"), start=line):
        if not raw or raw.isspace():
            continue
        row, problem = _json_row(raw, shape, known)
        if problem:
            bad.add(source, at, problem, raw.decode("utf-8", "replace"))
            continue
        rows.append(row)
        lines.append(at)
        if shape.extras:
            extras.update(dict.fromkeys(row))
    wanted = dict.fromkeys((*known, *extras)) if shape.extras else known
    columns = {name: pa.array([row.get(name, "") for row in rows], STRING) for name in wanted}
    return RowBlock(columns, np.asarray(lines, dtype=np.int64))


def _json_row(raw: bytes, shape: Shape, known: Sequence[str]) -> tuple[dict[str, str], str]:
    try:
        value = json.loads(raw)
    except UnicodeDecodeError as error:
        return {}, not_utf8(error)
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON ({error}); expected one object a line"
    if not isinstance(value, dict):
        return {}, f"found JSON that is no object; expected an object with {', '.join(shape.required)}"
    row: dict[str, str] = {}
    for name in value if shape.extras else known:
        item = value.get(name)
        if item is None:
            text = ""
        elif isinstance(item, str):
            text = item
        elif name in known:
            return {}, f"the key {name!r} holds {json.dumps(item)[:60]}; expected text in quotes"
        else:
            text = json.dumps(item, ensure_ascii=False)
        if not text.isascii() and any("\ud800" <= sign <= "\udfff" for sign in text):
            return {}, f"the key {name!r} holds half a surrogate pair; expected valid Unicode"
        row[name] = text
    for name in (*shape.required, *shape.present):
        if name not in value:
            return {}, f"no key {name!r}; expected the keys {', '.join((*shape.required, *shape.present))}"
    for name in shape.required:
        if not row[name] or row[name].isspace():
            return {}, f"the key {name!r} is empty; expected a value"
    return row, ""


# --- Parquet --------------------------------------------------------------------------------------


def _read_parquet(chunk: Chunk, shape: Shape, bad: BadRows) -> Iterator[RowBlock]:
    import pyarrow.parquet as pq

    row = chunk.first_line
    wanted = shape.wanted(chunk.header)
    try:
        with open_raw(chunk.file) as raw:
            file = pq.ParquetFile(raw)
            groups = list(range(chunk.start, chunk.end or file.metadata.num_row_groups))
            for batch in file.iter_batches(batch_size=1 << 18, row_groups=groups, columns=wanted):
                yield _parquet_block(batch, row, wanted, shape, chunk.file.source, bad)
                row += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{chunk.file.path}, after row {row - 1}: damaged Parquet: {error}") from None


def _parquet_block(batch: Any, row: int, wanted: Sequence[str], shape: Shape, source: int, bad: BadRows) -> RowBlock:
    columns = {name: as_text(batch.column(name)) for name in wanted}
    keep = np.ones(batch.num_rows, dtype=bool)
    for name in shape.required:
        empty = np.asarray(_empty(columns[name]))
        for n in np.flatnonzero(empty & keep):
            text = json.dumps({k: c[int(n)].as_py() for k, c in columns.items()}, ensure_ascii=False)
            bad.add(source, row + int(n), f"the column {name!r} is empty; expected a value", text)
        keep &= ~empty
    lines = row + np.arange(batch.num_rows, dtype=np.int64)
    if not keep.all():
        columns = {name: column.filter(pa.array(keep)) for name, column in columns.items()}
        lines = lines[keep]
    return RowBlock(columns, lines)


def as_text(column: Any) -> Any:
    """An Arrow column as (n,) large_string without nulls; what is no text is written as JSON writes it."""
    column = _one(column)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not _is_text(column.type):
        values = column.to_pylist()
        texts = (None if v is None else json.dumps(v, ensure_ascii=False, default=str) for v in values)
        column = pa.array(texts, STRING)
    return pc.fill_null(column.cast(STRING), "")


def _one(column: Any) -> Any:
    if not isinstance(column, pa.ChunkedArray):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def _empty(column: Any) -> Any:
    return pc.or_(pc.equal(pc.binary_length(column), 0), pc.utf8_is_space(column))


def _some_empty(column: Any) -> bool:
    return bool(pc.any(_empty(column)).as_py())
