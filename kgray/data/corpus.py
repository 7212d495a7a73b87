"""The ``corpus`` artifact: documents in, Parquet shards out. Tables of documents, or plain .txt files.

Layout (format 1): ``documents/part-00000.parquet`` ... (doc_id, text string, source int32, line int64, extras string;
in the order of the input), ``sources.json``, ``audit.json``, ``quarantine.jsonl``. A plain text's doc_id is its path
below the folder that all of them share.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kgray.artifact import Draft, Recipe, Store
from kgray.data import output
from kgray.data.bad_rows import BadRows, judge, kept_details
from kgray.data.config import DataConfig
from kgray.data.dictionary import STRING, bucket_slices, hash_strings
from kgray.data.files import Chunk, InputFile, blocks
from kgray.data.inputs import (
    Sizes,
    document_files,
    hash_groups,
    hash_of,
    hashed,
    plan_reading,
    reading_options,
    run_small,
    text_bytes,
)
from kgray.data.rows import RowBlock, Shape, not_utf8, read_rows
from kgray.data.tables import is_blank
from kgray.data.tasks import fetch, start
from kgray.errors import DataError

CORPUS_FORMAT = 1
_FIXED = ("doc_id", "text", "source", "line")


def corpus_recipe(store: Store, data: DataConfig) -> Recipe:
    """What decides a corpus: the bytes of its files, their formats, the ids of plain texts, how they are read.

    Raises DataError: missing files, names that do not tell a format; ConfigError: no documents are configured.
    """
    files = document_files(data)
    names = _text_ids(files)
    config = {
        "files": [[file.format, file.compression, names.get(file.source)] for file in files],
        **reading_options(data),
    }
    return Recipe("corpus", CORPUS_FORMAT, hashed(store, files), config)


def ingest_corpus(draft: Draft, data: DataConfig, sizes: Sizes | None = None) -> dict[str, int]:
    """Write the files of a corpus artifact (within a Ray session). Returns its counts.

    Raises DataError naming file and line: bad rows beyond the policy, a repeated doc_id, files that cannot be read.
    """
    sizes = sizes or Sizes()
    text = text_bytes(document_files(data))
    small: dict[str, int] | None = run_small(text, sizes, _ingest_corpus, draft, data, sizes)
    return small if small is not None else _ingest_corpus(draft, data, sizes)


def _ingest_corpus(draft: Draft, data: DataConfig, sizes: Sizes) -> dict[str, int]:
    files = document_files(data)
    paths = [file.path for file in files]
    hashing = start("hash files", hash_of, hash_groups(files))
    shape = document_shape(data)
    plan = plan_reading(files, True, shape, "data.columns", sizes)
    buckets = plan.buckets(sizes)
    names = _text_ids(files)
    reading = start(
        "read documents",
        read_documents,
        [(group, data, buckets, names) for group in plan.groups],
        2 + buckets,
    )
    bad = BadRows(kept_details(data))
    read: list[DocumentsRead] = fetch("read documents", [one[0] for one in reading])
    for told in read:
        bad.take(told.bad)
    judge(bad, data, paths)
    checking = start(
        "check ids",
        repeated_ids,
        [([one[2 + b] for one in reading], data, paths) for b in range(buckets)],
        1 + len(reading),
    )
    for repeated in fetch("check ids", [one[0] for one in checking]):
        bad.take(repeated)
    judge(bad, data, paths)
    columns = list(dict.fromkeys([*_FIXED, *(name for one in read for name in one.columns)]))
    arguments = [(draft, n, columns, one[1], [drop[1 + n] for drop in checking]) for n, one in enumerate(reading)]
    written: list[DocumentsWritten] = fetch("write documents", start("write documents", write_documents, arguments))
    documents = sum(one.documents for one in written)
    if not documents:
        raise DataError(f"no document is left ({bad.count} bad rows); expected at least one")
    characters = sum(one.characters for one in written)
    draft.write_json(
        "audit.json",
        {
            "documents": documents,
            "missing_text": sum(one.missing_text for one in written),
            "characters": {
                "total": characters,
                "mean": round(characters / documents, 3),
                "max": max(one.longest for one in written),
            },
        },
    )
    hashes = fetch("hash files", hashing)
    draft.write_json("sources.json", [entry for group in hashes for entry in group])
    draft.write_bytes("quarantine.jsonl", output.quarantine(bad.rows, paths))
    return {"documents": documents, "characters": characters, "quarantined": bad.count, "parts": len(written)}


def document_shape(data: DataConfig) -> Shape:
    """The columns of a table of documents; a document may be empty, its id may not."""
    return Shape((data.columns.doc_id,), present=(data.columns.text,), extras=True)


def _text_ids(files: Sequence[InputFile]) -> dict[int, str]:
    """doc_id of each plain text, by source index."""
    texts = [file for file in files if file.format == "text"]
    if not texts:
        return {}
    folder = os.path.commonpath([file.path.rpartition("/")[0] or "/" for file in texts])
    return {file.source: file.path[len(folder) :].lstrip("/") for file in texts}


@dataclass
class DocumentsRead:
    """What the driver is told of a group of chunks."""

    bad: BadRows
    columns: list[str]


def read_documents(chunks: Sequence[Chunk], data: DataConfig, buckets: int, names: dict[int, str]) -> tuple[Any, ...]:
    """Read documents. Returns DocumentsRead, the rows (Table), and for each hash bucket of ids (Table: id, row,
    source, line)."""
    bad = BadRows(kept_details(data))
    shape = document_shape(data)
    parts = []
    for chunk in chunks:
        source = chunk.file.source
        found = [_text_block(chunk, names[source], shape, bad)] if chunk.file.format == "text" else None
        for block in found if found is not None else read_rows(chunk, shape, (), bad):
            columns = {_rename(name, data): column for name, column in block.columns.items()}
            columns["source"] = pa.array(np.full(len(block.lines), source, dtype=np.int32))
            columns["line"] = pa.array(block.lines)
            parts.append(pa.table(columns))
    order = dict.fromkeys([*_FIXED, *(name for part in parts for name in part.column_names)])
    table = pa.concat_tables([_with_columns(part, list(order)) for part in [_no_rows(), *parts]]).combine_chunks()
    ids = pa.concat_arrays(table.column("doc_id").chunks or [pa.array([], STRING)])
    hashes = hash_strings(ids)
    by_hash = np.argsort(hashes, kind="stable")
    where = pa.table(
        {
            "id": ids,
            "row": pa.array(np.arange(len(ids))),
            "source": table.column("source"),
            "line": table.column("line"),
        }
    )
    slices = bucket_slices(hashes[by_hash], buckets)
    extras = [name for name in order if name not in _FIXED]
    return (DocumentsRead(bad, extras), table, *(where.take(pa.array(by_hash[s:e])) for s, e in slices))


def _rename(name: str, data: DataConfig) -> str:
    own = {data.columns.doc_id: "doc_id", data.columns.text: "text"}
    return own.get(name) or (f"extra_{name}" if name in _FIXED else name)


def _no_rows() -> Any:
    return pa.table(
        {
            "doc_id": pa.array([], STRING),
            "text": pa.array([], STRING),
            "source": pa.array([], pa.int32()),
            "line": pa.array([], pa.int64()),
        }
    )


def _with_columns(table: Any, names: Sequence[str]) -> Any:
    for name in names:
        if name not in table.column_names:
            table = table.append_column(name, pa.array(np.full(table.num_rows, "", dtype=object), STRING))
    return table.select(list(names))


def _text_block(chunk: Chunk, name: str, shape: Shape, bad: BadRows) -> RowBlock:
    data = b"".join(block for _, block in blocks(chunk))
    texts: list[str] = []
    try:
        texts.append(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        bad.add(chunk.file.source, line, not_utf8(error), name)
    columns = {
        shape.required[0]: pa.array([name] * len(texts), STRING),
        shape.present[0]: pa.array(texts, STRING),
    }
    return RowBlock(columns, np.ones(len(texts), dtype=np.int64))


def repeated_ids(parts: Sequence[Any], data: DataConfig, paths: Sequence[str]) -> tuple[Any, ...]:
    """Which rows repeat the id of an earlier one, within one hash bucket. Returns BadRows, and for each part the
    row numbers to drop, (k,) int64."""
    bad = BadRows(kept_details(data))
    part = np.concatenate([np.full(table.num_rows, n) for n, table in enumerate(parts)])
    table = pa.concat_tables(parts).append_column("part", pa.array(part))
    keys = [(name, "ascending") for name in ("id", "source", "line")]
    table = table.take(pc.sort_indices(table, sort_keys=keys)).combine_chunks()
    drop: list[list[int]] = [[] for _ in parts]
    ids = table.column("id").combine_chunks()
    if len(ids) > 1:
        again = np.flatnonzero(np.asarray(pc.equal(ids.slice(1), ids.slice(0, len(ids) - 1)))) + 1
        firsts: dict[int, int] = {}
        for n in map(int, again):
            firsts[n] = firsts.get(n - 1, n - 1)
            first, row = table.slice(firsts[n], 1).to_pylist()[0], table.slice(n, 1).to_pylist()[0]
            same = first["source"] == row["source"]
            place = f"line {first['line']}" if same else f"{paths[first['source']]}, line {first['line']}"
            reason = f"the doc_id {row['id']!r} has a row already in {place}; expected each id once"
            bad.add(row["source"], row["line"], reason, row["id"])
            drop[row["part"]].append(row["row"])
    return (bad, *(np.asarray(rows, dtype=np.int64) for rows in drop))


@dataclass
class DocumentsWritten:
    """What the driver is told of one shard."""

    documents: int
    missing_text: int
    characters: int
    longest: int


def write_documents(
    draft: Draft, number: int, columns: Sequence[str], table: Any, drops: Sequence[Any]
) -> DocumentsWritten:
    """Write one shard, less the rows to drop."""
    keep = np.ones(table.num_rows, dtype=bool)
    keep[np.concatenate(drops)] = False
    table = _with_columns(table, columns).filter(pa.array(keep))
    kinds = {"source": pa.int32(), "line": pa.int64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in columns])
    with draft.open_parquet(f"documents/{output.part_name(number)}", schema) as writer:
        for low in range(0, table.num_rows, output.ROW_GROUP):
            writer.write_table(table.slice(low, output.ROW_GROUP).cast(schema))
    lengths = np.asarray(pc.utf8_length(table.column("text")))
    missing = int(is_blank(table.column("text")).sum()) if table.num_rows else 0
    return DocumentsWritten(table.num_rows, missing, int(lengths.sum()), int(lengths.max(initial=0)))
