"""From the rows of the user's files to queries by dense id, in shards that are answered one at a time. No Ray.

A shard is a Parquet file of ``shard_rows`` queries, in the order of their files and lines:

task     int8   what is asked, in TASKS
head, relation, tail   int64 dense ids, -1 for the part asked for
source   int32  number of the file
line     int64  line in it (of Parquet the row), from 1
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kgray.artifact import Artifact, Draft
from kgray.data.bad_rows import BadRows, kept_details
from kgray.data.files import Chunk, InputFile, cut_file, describe_file, expand_paths, first_line
from kgray.data.inputs import Plan, Sizes, plan_reading
from kgray.data.rows import RowBlock, Shape, check_columns, read_rows
from kgray.errors import ConfigError, DataError
from kgray.prediction.config import PredictConfig
from kgray.serving.names import Field, Names, QueryError

TASKS = ("tail", "head", "relation", "triple")
"""What a row asks for; a triple leaves nothing open."""

PARTS: tuple[Field, ...] = ("head", "relation", "tail")
_TASK_OF = {"head": TASKS.index("head"), "relation": TASKS.index("relation"), "tail": TASKS.index("tail")}
_TRIPLE = TASKS.index("triple")
_OPEN, _UNKNOWN = -1, -2

SCHEMA = pa.schema(
    [
        ("task", pa.int8()),
        ("head", pa.int64()),
        ("relation", pa.int64()),
        ("tail", pa.int64()),
        ("source", pa.int32()),
        ("line", pa.int64()),
    ]
)

Ints = npt.NDArray[np.int64]


def query_files(config: PredictConfig) -> list[InputFile]:
    """The files of ``predict.queries``, in order. Raises DataError: missing, of no known format; ConfigError: none."""
    if config.queries is None:
        raise ConfigError(
            "predict.queries", None, "files of queries: predict.queries=queries.tsv, or --queries queries.tsv"
        )
    paths = expand_paths(config.queries, "predict.queries")
    files = [describe_file(n, path, "queries", config.format, "predict.queries") for n, path in enumerate(paths)]
    for file in files:
        if file.format == "ntriples":
            raise DataError(f"predict.queries: {file.path} is N-Triples, which leave nothing open; expected a table")
    return files


def shape_of(config: PredictConfig) -> Shape:
    """Any of the three columns may be open in a row."""
    columns = config.columns
    return Shape((), optional=(columns.head, columns.relation, columns.tail))


def check_queries(config: PredictConfig) -> None:
    """Whether there are files of queries, and their names and first lines are in order: asked before a model is
    trained for them. Raises ConfigError: none are given; DataError: missing, empty, of no known format, fewer than two
    of the three columns."""
    for file in query_files(config):
        first = cut_file(file, _has_header(file, config))[0]
        if first.header:
            check_columns(first, shape_of(config), "predict.columns")
            _check_columns(first, config)


def plan_queries(config: PredictConfig, sizes: Sizes) -> Plan:
    """What each reading task takes. Raises as :func:`check_queries`."""
    check_queries(config)
    files = query_files(config)
    return plan_reading(files, lambda file: _has_header(file, config), shape_of(config), "predict.columns", sizes)


def _has_header(file: InputFile, config: PredictConfig) -> bool:
    if file.format not in ("tsv", "csv"):
        return False
    if config.header is not None:
        return config.header
    text = first_line(Chunk(file)).decode("utf-8", "replace")
    names = next(csv.reader([text]), []) if file.format == "csv" else text.split("\t")
    return len(set(shape_of(config).optional) & set(names)) >= 2


def _check_columns(chunk: Chunk, config: PredictConfig) -> None:
    wanted = shape_of(config).optional
    if len(set(wanted) & set(chunk.header)) < 2:
        where = chunk.file.path + ("" if chunk.file.format == "parquet" else ", line 1")
        raise DataError(
            f"{where}: the columns are {', '.join(map(repr, chunk.header))}; expected at least two of "
            f"{', '.join(wanted)} (or name them in predict.columns)"
        )


@dataclass(frozen=True)
class Vocabulary:
    """What a reading task knows of the model: names, and which parts it can tell."""

    entities: Names
    relations: Names
    tasks: tuple[str, ...]

    def of(self, part: Field) -> Names:
        return self.relations if part == "relation" else self.entities


@lru_cache(maxsize=1)
def _vocabulary(uri: str, tasks: tuple[str, ...]) -> Vocabulary:
    """Kept, as a process reads several chunks."""
    model = Artifact.peek(uri)
    tables = (model.read_table(f"{name}.parquet", ["external_id", "name"]) for name in ("entities", "relations"))
    columns = [(table["external_id"].to_pylist(), table["name"].to_pylist()) for table in tables]
    return Vocabulary(Names("entity", *columns[0]), Names("relation", *columns[1]), tasks)


@dataclass
class QueriesRead:
    """What is told of one reading task. shards: rows of each, in order; tasks: queries of each of TASKS."""

    shards: list[int] = field(default_factory=list)
    tasks: list[int] = field(default_factory=lambda: [0] * len(TASKS))
    bad: BadRows = field(default_factory=lambda: BadRows(1))

    @property
    def rows(self) -> int:
        return sum(self.shards)

    def to_json(self) -> dict[str, Any]:
        """Plain values for :meth:`from_json`."""
        bad = self.bad
        rows = [[row.source, row.line, row.reason, row.text] for row in bad.rows]
        return {"shards": self.shards, "tasks": self.tasks, "bad": bad.count, "limit": bad.limit, "rows": rows}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> QueriesRead:
        """What :meth:`to_json` gave."""
        bad = BadRows(told["limit"])
        for source, line, reason, text in told["rows"]:
            bad.add(source, line, reason, text)
        bad.count = told["bad"]
        return cls(told["shards"], told["tasks"], bad)


def shard_name(group: int, number: int) -> str:
    """File of a shard: the group of chunks it was read from, and its number there."""
    return f"queries/{group:05d}-{number:05d}.parquet"


def note_name(group: int) -> str:
    """Written when all shards of a group are."""
    return f"queries/{group:05d}.json"


def read_queries(
    out: Draft, config: PredictConfig, model: Artifact, tasks: tuple[str, ...], group: int, chunks: Sequence[Chunk]
) -> QueriesRead:
    """Write the shards of a group of chunks, and its note. tasks: what the model can tell.

    Rows that cannot be answered are in ``bad``. Raises DataError where a file as a whole is at fault.
    """
    words = _vocabulary(model.uri, tasks)
    told = QueriesRead(bad=BadRows(kept_details(config)))
    held: list[pa.Table] = []
    for chunk in chunks:
        for block in read_rows(chunk, shape_of(config), shape_of(config).optional, told.bad):
            table = _understood(block, chunk.file.source, config, words, told.bad)
            for task, count in enumerate(np.bincount(table["task"].to_numpy(), minlength=len(TASKS))):
                told.tasks[task] += int(count)
            held.append(table)
            held = _write_full(out, config.shard_rows, group, held, told)
    for table in _joined(held):
        out.write_table(shard_name(group, len(told.shards)), table)
        told.shards.append(table.num_rows)
    out.write_json(note_name(group), told.to_json())
    return told


def _write_full(
    out: Draft, size: int, group: int, held: list[pa.Table], told: QueriesRead
) -> list[pa.Table]:
    """Write as many whole shards as there are rows for; what is left."""
    if sum(table.num_rows for table in held) < size:
        return held
    table = pa.concat_tables(held)
    start = 0
    while table.num_rows - start >= size:
        out.write_table(shard_name(group, len(told.shards)), table.slice(start, size))
        told.shards.append(size)
        start += size
    return [table.slice(start).combine_chunks()]


def _joined(held: list[pa.Table]) -> Iterator[pa.Table]:
    if sum(table.num_rows for table in held):
        yield pa.concat_tables(held)


def _understood(block: RowBlock, source: int, config: PredictConfig, words: Vocabulary, bad: BadRows) -> pa.Table:
    """The rows of a block as ids, those that cannot be answered told to ``bad``."""
    count = len(block.lines)
    ids: dict[Field, Ints] = {}
    texts: dict[Field, Any] = {}
    for part in PARTS:
        column = block.columns.get(getattr(config.columns, part))
        texts[part] = column
        ids[part] = _found(column, count, config.unknown, words.of(part))
    opened = {part: ids[part] == _OPEN for part in PARTS}
    number = sum(mask.astype(np.int64) for mask in opened.values())
    task = np.full(count, _TRIPLE, dtype=np.int8)
    for part, mask in opened.items():
        task[mask] = _TASK_OF[part]
    wrong = (np.asarray(number) > 1) | np.logical_or.reduce([ids[part] == _UNKNOWN for part in PARTS])
    unable = [n for n, name in enumerate(TASKS[:3]) if name not in words.tasks]
    needs = {n: {n} for n in range(3)} | {_TRIPLE: {_TASK_OF["tail"], _TASK_OF["head"]}}
    for kind, needed in needs.items():
        if needed & set(unable):
            wrong |= task == kind
    # Of more bad rows than are kept only the number counts: what they may have meant is dear to find.
    wrong_rows = np.flatnonzero(wrong)
    bad.count += max(0, len(wrong_rows) - bad.limit)
    for row in wrong_rows[: bad.limit].tolist():
        values = {part: "" if column is None else column[row].as_py() for part, column in texts.items()}
        reason = _reason(values, {part: int(ids[part][row]) for part in PARTS}, words)
        bad.add(source, int(block.lines[row]), reason, "\t".join(values.values()))
    keep = ~wrong
    return pa.table(
        {
            "task": pa.array(task[keep]),
            **{str(part): pa.array(ids[part][keep]) for part in PARTS},
            "source": pa.array(np.full(int(keep.sum()), source, dtype=np.int32)),
            "line": pa.array(block.lines[keep]),
        },
        schema=SCHEMA,
    )


def _found(column: Any, count: int, unknown: str, names: Names) -> Ints:
    """(count,) ids of a column, or why there is none. Each value is looked up once."""
    if column is None:
        return np.full(count, _OPEN, dtype=np.int64)
    encoded = column.dictionary_encode()
    found = np.empty(len(encoded.dictionary), dtype=np.int64)
    for place, value in enumerate(encoded.dictionary.to_pylist()):
        if not value.strip() or value == unknown:
            found[place] = _OPEN
        else:
            index = names.index_of(value)
            found[place] = _UNKNOWN if index is None else index
    ids: Ints = found[np.asarray(encoded.indices)]
    return ids


def _reason(values: Mapping[Field, str], ids: Mapping[Field, int], words: Vocabulary) -> str:
    """What is wrong with a row, and what would be right."""
    opened = [part for part in PARTS if ids[part] == _OPEN]
    if len(opened) > 1:
        return f"{' and '.join(opened)} are open; expected two of head, relation, tail, or all three"
    for part in PARTS:
        if ids[part] == _UNKNOWN:
            try:
                words.of(part).find(part, values[part])
            except QueryError as error:
                return str(error)
    asked = opened or [part for part in ("tail", "head") if part not in words.tasks]
    return f"this model cannot tell the {asked[0]}, it answers {' and '.join(words.tasks)} queries"
