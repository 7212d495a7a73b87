"""Input files: finding them, opening them (plain or compressed), and cutting them into chunks that tasks read.

Lines are counted as an editor counts them (from 1, ended by ``\\n``), in Parquet rows from 1; every row keeps its
file and line through the whole ingest.
"""

from __future__ import annotations

import csv
import lzma
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs

from kgray.artifact.filesystem import resolve
from kgray.errors import DataError

CHUNK_BYTES = 64 << 20
"""About how much of a file one task reads, where the format lets it be cut (plain TSV, JSONL, N-Triples, Parquet)."""

BLOCK_BYTES = 16 << 20
"""How much text is parsed at a time: what bounds the memory of a reading task."""

SYNTHETIC = "synthetic"
"""The format of triples that are drawn: chunks are ranges of their numbers, and there is no file."""

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz"}
FORMATS = {
    ".tsv": "tsv", ".tab": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".parquet": "parquet", ".pq": "parquet", ".nt": "ntriples", ".ntriples": "ntriples",
}  # fmt: skip
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class InputFile:
    """One file of the input. ``role``: train, valid, test, triples, entities, relations or documents."""

    source: int
    path: str
    role: str
    format: str
    compression: str | None

    @property
    def name(self) -> str:
        return self.path.replace("\\", "/").rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Chunk:
    """What one reading task takes of one file: bytes [start, end) (end None: to the end), or, of Parquet, the row
    groups [start, end). ``first_line`` is the line (or row) its first byte stands in."""

    file: InputFile
    start: int = 0
    end: int | None = None
    first_line: int = 1
    header: tuple[str, ...] = field(default=())
    """Column names, where the file has a line of them (or a Parquet schema)."""
    header_line: bool = False
    """Whether that line is the first of this chunk."""


# --- finding --------------------------------------------------------------------------------------


def expand_paths(paths: str | Sequence[str], key: str) -> list[str]:
    """The files meant by paths and globs: those of a glob sorted, a list in its order.

    Raises DataError naming the configuration ``key``: a file that is missing, a folder, a glob without a match, a
    file named twice.
    """
    found: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        for one in _expand(path, key):
            if one in found:
                raise DataError(f"{key}: {one} is named twice; expected each file once")
            found.append(one)
    return found


def _expand(path: str, key: str) -> list[str]:
    if _URI.match(path):
        return _expand_uri(path, key)
    if Path(path).is_file():
        return [path]
    if Path(path).is_dir():
        raise DataError(f"{key}: {path} is a folder; expected a file or a glob such as {path.rstrip('/')}/*.tsv")
    if not has_magic(path):
        folder = Path(path).parent
        hint = "" if folder.is_dir() else f" (there is no folder {folder} either)"
        raise DataError(f"{key}: no such file: {path}{hint}")
    matches = sorted(one for one in glob(path, recursive=True) if Path(one).is_file())  # noqa: PTH207  (takes absolute patterns)
    if not matches:
        raise DataError(f"{key}: no file matches {path}")
    return matches


def _expand_uri(uri: str, key: str) -> list[str]:
    filesystem, path = resolve(uri)
    prefix = uri[: len(uri) - len(path)] if uri.endswith(path) else uri.split("://", 1)[0] + "://"
    if not has_magic(path):
        info = filesystem.get_file_info(path)
        if info.type != pa.fs.FileType.File:
            raise DataError(f"{key}: no such file: {uri}")
        return [uri]
    base = path[: re.search(r"[*?\[]", path).start()].rsplit("/", 1)[0]  # type: ignore[union-attr]
    infos = filesystem.get_file_info(pa.fs.FileSelector(base, recursive=True, allow_not_found=True))
    pattern = re.compile(_glob_pattern(path))
    matches = sorted(i.path for i in infos if i.type == pa.fs.FileType.File and pattern.fullmatch(i.path))
    if not matches:
        raise DataError(f"{key}: no file matches {uri}")
    return [prefix + match for match in matches]


def _glob_pattern(glob_text: str) -> str:
    parts = re.split(r"(\*\*/?|\*|\?|\[[^\]]*\])", glob_text)
    signs = {"**": ".*", "**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return "".join(signs.get(p, p if p.startswith("[") and p.endswith("]") else re.escape(p)) for p in parts)


def describe_file(source: int, path: str, role: str, given_format: str, key: str) -> InputFile:
    """Format and compression of a file, by its name unless ``given_format`` says otherwise than ``auto``.

    Raises DataError for a name that says nothing.
    """
    name = path.rsplit("/", 1)[-1].lower()
    stem, dot, last = name.rpartition(".")
    compression = COMPRESSIONS.get(dot + last)
    if compression:
        stem, dot, last = stem.rpartition(".")
    suffix = dot + last
    kind = given_format if given_format != "auto" else FORMATS.get(suffix)
    if kind is None and suffix == ".txt":
        kind = "text" if role == "documents" else "tsv"
    if kind is None:
        hint = "; or set data.format" if role in ("train", "valid", "test", "triples") else ""
        raise DataError(
            f"{key}: the name of {path} does not tell its format; expected one of {' '.join(FORMATS)} .txt, plain or "
            f"with {' '.join(COMPRESSIONS)}{hint}"
        )
    if kind == "ntriples" and role in ("entities", "relations", "documents"):
        raise DataError(f"{key}: {path} is N-Triples; expected a table (.tsv .csv .jsonl .parquet)")
    if kind == "parquet":
        compression = None  # it compresses within
    return InputFile(source, path, role, kind, compression)


# --- opening --------------------------------------------------------------------------------------


def open_raw(file: InputFile) -> Any:
    """The file's bytes as they lie, seekable. Raises DataError where it cannot be opened."""
    filesystem, path = resolve(file.path)
    try:
        return filesystem.open_input_file(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file.path}: cannot be opened: {error}") from None


def file_bytes(file: InputFile) -> int:
    """The file's size as it lies."""
    with open_raw(file) as raw:
        return int(raw.size())


def _open(chunk: Chunk) -> Any:
    raw = open_raw(chunk.file)
    if chunk.file.compression == "xz":
        return lzma.LZMAFile(raw)
    if chunk.file.compression:
        return pa.CompressedInputStream(raw, chunk.file.compression)
    raw.seek(chunk.start)
    return raw


def blocks(chunk: Chunk, quoted: bool = False, block_bytes: int = 0) -> Iterator[tuple[int, bytes]]:
    """The chunk's text, decompressed, in blocks of whole lines: (line number of the first, bytes).

    A byte-order mark is dropped. ``quoted``: newlines within double quotes do not end a block.
    Raises DataError: truncated or broken compression, naming the last whole line.
    """
    size = block_bytes or BLOCK_BYTES
    left = None if chunk.end is None else chunk.end - chunk.start
    line, rest, first = chunk.first_line, b"", chunk.start == 0
    with _open(chunk) as stream:
        while True:
            want = size if left is None else min(size, left)
            data = _read(stream, want, chunk, line + rest.count(b"\n")) if want else b""
            if left is not None:
                left -= len(data)
            if first and data:
                data, first = data.removeprefix(_BOM), False
            if not data:
                break
            rest = rest + data if rest else data
            cut = _last_row_end(rest) if quoted else rest.rfind(b"\n") + 1
            if cut:
                yield line, rest[:cut]
                line += rest.count(b"\n", 0, cut)
                rest = rest[cut:]
    if rest:
        yield line, rest


def _read(stream: Any, size: int, chunk: Chunk, line: int) -> bytes:
    try:
        return bytes(stream.read(size))
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
        if not chunk.file.compression:
            raise DataError(f"{chunk.file.path}, after line {line - 1}: cannot be read: {error}") from None
        early = isinstance(error, EOFError) or "runcated" in str(error)
        what = "ends too early: the file is truncated" if early else f"is damaged ({error})"
        raise DataError(
            f"{chunk.file.path}, after line {line - 1}: the {chunk.file.compression} data {what}; expected a "
            f"complete {chunk.file.compression} file"
        ) from None


def _last_row_end(data: bytes) -> int:
    """End of the last line that is not inside double quotes (RFC 4180: an even number of quotes precedes it)."""
    end = len(data)
    quotes = data.count(b'"')
    while end:
        newline = data.rfind(b"\n", 0, end)
        if newline < 0:
            return 0
        quotes -= data.count(b'"', newline, end)
        if quotes % 2 == 0:
            return newline + 1
        end = newline
    return 0


# --- cutting --------------------------------------------------------------------------------------


def cut_file(file: InputFile, header: bool, chunk_bytes: int = 0) -> list[Chunk]:
    """The chunks of one file, with its column names read. Only the size of the file decides where it is cut.

    ``first_line`` of all but the first chunk is 0: :func:`number_chunks` fills it in once lines are counted.
    Raises DataError: an empty file, a file that is no Parquet, a header that is not UTF-8.
    """
    size = chunk_bytes or CHUNK_BYTES
    if file.format == "parquet":
        return _cut_parquet(file, size)
    with open_raw(file) as raw:
        total = raw.size()
        if total == 0 and file.format != "text":
            raise DataError(f"{file.path}: the file is empty; expected rows")
        first = Chunk(file)
        if file.compression and file.format != "text" and next(blocks(first, block_bytes=1 << 16), None) is None:
            raise DataError(f"{file.path}: the file is empty once unpacked; expected rows")
        if header and file.format in ("tsv", "csv"):
            first = replace(first, header=_header(first), header_line=True)
        if file.compression or file.format in ("csv", "text") or total <= size * 3 // 2:
            return [first]
        starts = [0]
        for near in range(size, total - size // 2, size):
            start = _line_start(raw, max(near, starts[-1]))
            if starts[-1] < start < total:
                starts.append(start)
    ends = [*starts[1:], total]
    return [
        replace(first, start=s, end=e, first_line=1 if s == 0 else 0, header_line=first.header_line and s == 0)
        for s, e in zip(starts, ends, strict=True)
    ]


def _line_start(raw: Any, near: int) -> int:
    """The first start of a line at or after ``near`` (> 0)."""
    raw.seek(near - 1)
    position = near - 1
    while data := raw.read(1 << 16):
        newline = data.find(b"\n")
        if newline >= 0:
            return position + int(newline) + 1
        position += len(data)
    return int(position)


def first_line(chunk: Chunk) -> bytes:
    """The first line of a file's first chunk, without its end; empty where there is none."""
    block = next(blocks(chunk, block_bytes=1 << 16), (1, b""))[1]
    return block.partition(b"\n")[0].removesuffix(b"\r")


def _header(chunk: Chunk) -> tuple[str, ...]:
    line = first_line(chunk)
    if not line:
        raise DataError(f"{chunk.file.path}, line 1: empty; expected a line of column names")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
        raise DataError(f"{chunk.file.path}, line 1: not UTF-8 ({what}); expected UTF-8 text") from None
    names = next(csv.reader([text]), []) if chunk.file.format == "csv" else text.split("\t")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(
            f"{chunk.file.path}, line 1: the column {repeated[0]!r} stands there twice; expected each name once"
        )
    return tuple(names)


def _cut_parquet(file: InputFile, size: int) -> list[Chunk]:
    import pyarrow.parquet as pq

    try:
        with open_raw(file) as raw:
            if raw.size() == 0:
                raise DataError(f"{file.path}: the file is empty; expected rows")
            metadata = pq.ParquetFile(raw).metadata
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file.path}: not a Parquet file, or a damaged one: {error}") from None
    if metadata.num_rows == 0:
        raise DataError(f"{file.path}: the file is empty; expected rows")
    header = tuple(metadata.schema.to_arrow_schema().names)
    chunks: list[Chunk] = []
    start, held, row = 0, 0, 1
    first_row = row
    for group in range(metadata.num_row_groups):
        held += metadata.row_group(group).total_byte_size
        row += metadata.row_group(group).num_rows
        if held >= size or group == metadata.num_row_groups - 1:
            chunks.append(Chunk(file, start, group + 1, first_row, header))
            start, held, first_row = group + 1, 0, row
    return chunks


def count_lines(chunk: Chunk) -> int:
    """Newlines in a chunk."""
    return sum(block.count(b"\n") for _, block in blocks(chunk))


def number_chunks(chunks: Sequence[Chunk], counted: Sequence[int]) -> list[Chunk]:
    """Chunks with their first lines, from the lines of each (those of Parquet know theirs already)."""
    numbered: list[Chunk] = []
    line, before = 1, None
    for chunk, lines in zip(chunks, counted, strict=True):
        if chunk.file.source != before:
            line, before = 1, chunk.file.source
        numbered.append(chunk if chunk.file.format == "parquet" else replace(chunk, first_line=line))
        line += lines
    return numbered
