"""From configuration to the files of an ingest, and from those to what each reading task takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kgray.artifact import Source, Store
from kgray.artifact.manifest import sha256_stream
from kgray.config import to_dict
from kgray.data.config import DataConfig, SplitPaths
from kgray.data.files import (
    CHUNK_BYTES,
    SYNTHETIC,
    Chunk,
    InputFile,
    count_lines,
    cut_file,
    describe_file,
    expand_paths,
    file_bytes,
    first_line,
    number_chunks,
    open_raw,
)
from kgray.data.rows import Shape, check_columns
from kgray.data.synthetic import SyntheticGraph
from kgray.data.tasks import in_process, run_all
from kgray.errors import ConfigError, DataError

_HASH_BYTES = 1 << 30
SYNTHETIC_BYTES = 16
"""About how much text a synthetic triple would be in a file."""
_EXPANSION = 6
"""About how much larger text is than its compressed file."""


@dataclass(frozen=True)
class Sizes:
    """How work is cut; tests set it small. A graph does not depend on it; a corpus has a shard a reading task."""

    chunk_bytes: int = CHUNK_BYTES
    """Of a file, by one reading task at the most, where the format lets it be cut."""
    task_bytes: int = CHUNK_BYTES
    """Of several small files, by one reading task."""
    triple_bytes: int = CHUNK_BYTES // 2
    """Instead of the two above where they are larger, of triples: short rows take more memory than their text."""
    bucket_bytes: int = CHUNK_BYTES // 2
    """Of the input, for each hash bucket of the dictionary."""
    small_bytes: int = 16 << 20
    """Of the whole input, up to which one task does everything."""
    cell_triples: int = 1 << 20
    """By one task of those that drop duplicates and write."""

    def of_triples(self) -> Sizes:
        """As triples are cut."""
        chunk, task = min(self.chunk_bytes, self.triple_bytes), min(self.task_bytes, self.triple_bytes)
        return replace(self, chunk_bytes=chunk, task_bytes=task)


def graph_files(data: DataConfig) -> list[InputFile]:
    """The files of a graph, in the order of their source index: train, valid, test (or triples), entities,
    relations. Raises DataError for missing files and unknown formats."""
    if isinstance(data.triples, int):
        return []  # drawn
    if isinstance(data.triples, SplitPaths):
        given = data.triples
        roles = [("train", given.train), ("valid", given.valid), ("test", given.test)]
        wanted = [(role, f"data.triples.{role}", paths) for role, paths in roles]
    else:
        wanted = [("triples", "data.triples", data.triples)]
    wanted += [("entities", "data.entities", data.entities), ("relations", "data.relations", data.relations)]
    files: list[InputFile] = []
    for role, key, paths in wanted:
        if paths is None:
            continue
        kind = "auto" if role in ("entities", "relations") else data.format
        for path in expand_paths(paths, key):
            files.append(describe_file(len(files), path, role, kind, key))
            if data.columns.split is not None and role == "triples" and files[-1].format == "ntriples":
                raise DataError(f"{path}: N-Triples have no split column; expected data.columns.split null")
    return files


def document_files(data: DataConfig) -> list[InputFile]:
    """The files of a corpus. Raises DataError as :func:`graph_files`, also where no documents are configured."""
    if data.documents is None:
        raise ConfigError("data.documents", None, "the paths of documents")
    paths = expand_paths(data.documents, "data.documents")
    return [describe_file(n, path, "documents", "auto", "data.documents") for n, path in enumerate(paths)]


def hashed(store: Store, files: Sequence[InputFile]) -> tuple[Source, ...]:
    """The files as inputs of a recipe: their sha256."""
    return tuple(store.hash_files([file.path for file in files]))


def reading_options(data: DataConfig) -> dict[str, Any]:
    """What decides how rows are read, whatever they are of."""
    return {
        "columns": to_dict(data.columns),
        "header": data.header,
        "on_bad_row": data.on_bad_row,
        "max_bad_rows": data.max_bad_rows if data.on_bad_row == "skip" else 0,
        **({"undirected": True} if data.undirected else {}),
    }


def text_bytes(files: Sequence[InputFile]) -> int:
    """About how many bytes of text files hold."""
    return sum(file_bytes(file) * (_EXPANSION if file.compression else 1) for file in files)


def run_small(text: int, sizes: Sizes, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a whole ingest, of so many bytes of text, in one task where that is little; None where it is not."""
    if text > sizes.small_bytes:
        return None
    return run_all("ingest", in_process, [(function, *arguments)])[0]


@dataclass
class Plan:
    """The chunks of some files, and their groups: what one task reads."""

    groups: list[list[Chunk]]
    text_bytes: int

    def buckets(self, sizes: Sizes) -> int:
        return min(1024, max(1, -(-self.text_bytes // sizes.bucket_bytes)))


def plan_drawing(graph: SyntheticGraph, sizes: Sizes) -> Plan:
    """Ranges of a synthetic graph's triples, as much for one task as it would read of a file."""
    file = InputFile(0, SYNTHETIC, "triples", SYNTHETIC, None)
    each = max(1, sizes.task_bytes // SYNTHETIC_BYTES)
    starts = range(0, graph.triples, each)
    groups = [[Chunk(file, start, min(start + each, graph.triples), start + 1)] for start in starts]
    return Plan(groups, graph.triples * SYNTHETIC_BYTES)


def plan_reading(
    files: Sequence[InputFile], header: bool | Callable[[InputFile], bool], shape: Shape, hint: str, sizes: Sizes
) -> Plan:
    """Cut files and group the pieces, in file order. header: whether a TSV or CSV file begins with column names.

    Raises DataError: empty files, missing columns.
    """
    chunks: list[Chunk] = []
    for file in files:
        cut = cut_file(file, header(file) if callable(header) else header, sizes.chunk_bytes)
        if cut[0].header:
            check_columns(cut[0], shape, hint)
        elif file.format in ("tsv", "csv"):
            _no_header(cut[0], shape)
        chunks += cut
    chunks = _numbered(chunks)
    groups: list[list[Chunk]] = []
    held, total = sizes.task_bytes, 0
    for chunk in chunks:
        size = _text_bytes(chunk)
        total += size
        if held + size > sizes.task_bytes:
            groups.append([])
            held = 0
        groups[-1].append(chunk)
        held += size
    return Plan(groups, total)


def _no_header(chunk: Chunk, shape: Shape) -> None:
    """A line of column names must not become a triple."""
    first = first_line(chunk).decode("utf-8", "replace").lower().replace('"', "")
    names = first.split("," if chunk.file.format == "csv" else "\t")
    if names in ([name.lower() for name in shape.required], ["subject", "predicate", "object"]):
        raise DataError(
            f"{chunk.file.path}, line 1: {', '.join(names)} look like column names; expected a triple "
            "(or set data.header=true)"
        )


def _numbered(chunks: list[Chunk]) -> list[Chunk]:
    cut = {chunk.file.source for chunk in chunks if chunk.start and chunk.file.format != "parquet"}
    if not cut:
        return chunks
    to_count = [n for n, chunk in enumerate(chunks) if chunk.file.source in cut]
    counts = [0] * len(chunks)
    for n, lines in zip(to_count, run_all("count lines", count_lines, [(chunks[n],) for n in to_count]), strict=True):
        counts[n] = lines
    return number_chunks(chunks, counts)


def _text_bytes(chunk: Chunk) -> int:
    end = file_bytes(chunk.file) if chunk.end is None or chunk.file.format == "parquet" else chunk.end
    start = 0 if chunk.file.format == "parquet" else chunk.start
    packed = chunk.file.compression or chunk.file.format == "parquet"
    return (end - start) * (_EXPANSION if packed else 1)


def hash_groups(files: Sequence[InputFile]) -> list[tuple[list[InputFile]]]:
    """Files as arguments of hashing tasks: a GiB or so each, so that small inputs need one."""
    groups: list[tuple[list[InputFile]]] = []
    held = _HASH_BYTES
    for file in files:
        if held >= _HASH_BYTES:
            groups.append(([],))
            held = 0
        groups[-1][0].append(file)
        held += file_bytes(file)
    return groups


def hash_of(files: Sequence[InputFile]) -> list[dict[str, Any]]:
    """Entries of sources.json: path, sha256, bytes."""
    entries = []
    for file in files:
        with open_raw(file) as raw:
            size = raw.size()
            entries.append({"path": file.path, "sha256": sha256_stream(raw), "bytes": size})
    return entries
