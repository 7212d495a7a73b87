"""One shard of queries answered: dense ids in, a Parquet file of answers out. No Ray.

Columns of answers, one row an answer of a completed query, one row a triple; what does not apply is null:

query          int64   number of the query, from 0, in the order of files and lines
file, line     string, int64   where it stands
asked          string  tail, head, relation, or triple
head, relation, tail            string  ids of what the query gives
head_name, relation_name, tail_name   string
rank           int32   of a completed query: from 1
answer, answer_name    string
score          float32 of a triple: the mean of its two directions
probability    float64 calibrated; of a triple: the mean of its two directions. Null where the model is not calibrated
known          bool    train, valid or test holds the fact
in_set         bool    the conformal answer set holds it (of a triple: both of them)
set_size       int64   of a completed query: candidates of that set that are not known yet
tail_rank, head_rank    float64 of a triple: realistic rank of its tail (head) among all, other known answers left out
tail_probability, head_probability   float64 of a triple: of either direction
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from kgray.errors import ArtifactError, NonFiniteError
from kgray.evaluation.answers import Answerer, Answers, Judged, Task
from kgray.evaluation.ranged import RangedAnswerer, answerer_of
from kgray.model.bundle import Bundle
from kgray.prediction.queries import PARTS, TASKS, shard_name
from kgray.prediction.shards import PredictTask, Shard, ShardDone, done_name

Ints = npt.NDArray[np.int64]

SCHEMA = pa.schema(
    [
        ("query", pa.int64()),
        ("file", pa.dictionary(pa.int32(), pa.string())),
        ("line", pa.int64()),
        ("asked", pa.dictionary(pa.int32(), pa.string())),
        *((name, pa.string()) for part in PARTS for name in (part, f"{part}_name")),
        ("rank", pa.int32()),
        ("answer", pa.string()),
        ("answer_name", pa.string()),
        ("score", pa.float32()),
        ("probability", pa.float64()),
        ("known", pa.bool_()),
        ("in_set", pa.bool_()),
        ("set_size", pa.int64()),
        ("tail_rank", pa.float64()),
        ("head_rank", pa.float64()),
        ("tail_probability", pa.float64()),
        ("head_probability", pa.float64()),
    ]
)

_WRITE_ROWS = 1 << 16


class Predictions:
    """Holds one model and answers shards; the model is opened with the first."""

    def __init__(self, task: PredictTask) -> None:
        self.task = task
        self._opened: tuple[Bundle, Answerer, pa.Array, pa.Array, pa.Array, pa.Array] | None = None

    def __call__(self, shard: Shard) -> ShardDone:
        """Answer one shard and write it away.

        Raises NonFiniteError for a score that is no number, naming the query; ArtifactError where the shard is damaged.
        """
        out = self.task.out
        path = out.path_of(shard_name(shard.group, shard.number))
        queries = pq.read_table(path, filesystem=out.fs)
        if queries.num_rows != shard.rows:
            raise ArtifactError(f"{path} has {queries.num_rows} queries instead of {shard.rows}: remove that folder")
        table, asked = self.answer(queries, shard.first)
        # Whoever dies while writing, or only seems dead, leaves a file of another name, which no note speaks of.
        file = f"answers/{shard.name}.{secrets.token_hex(4)}.parquet"
        out.write_table(file, table, compression="zstd", row_group_size=_WRITE_ROWS)
        size = int(out.fs.get_file_info(out.path_of(file)).size)
        done = ShardDone(file, size, queries.num_rows, asked, table.num_rows)
        out.write_json(done_name(shard), asdict(done))
        return done

    def answer(self, queries: pa.Table, first: int) -> tuple[pa.Table, int]:
        """Answers to a table of queries of which the first has the number ``first``, and how many of them differ."""
        given = np.stack([queries[name].to_numpy().astype(np.int64) for name in ("task", *PARTS)], axis=1)
        different, place = np.unique(given, axis=0, return_inverse=True)
        place = place.reshape(-1)
        tables = []
        for number, task in enumerate(TASKS):
            rows = np.flatnonzero(different[:, 0] == number)
            if not len(rows):
                continue
            where = np.flatnonzero(different[place, 0] == number)
            within = place[where] - rows[0]  # unique rows are sorted by task first
            asked = different[rows, 1:]
            make = self._triples if task == "triple" else self._completions
            tables.append(make(task, asked, within, queries.take(pa.array(where)), first + where))
        table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        table = table.sort_by([("query", "ascending"), ("rank", "ascending")])
        return table.replace_schema_metadata(self.task.metadata()), len(different)

    def _open(self) -> tuple[Bundle, Answerer, pa.Array, pa.Array, pa.Array, pa.Array]:
        if self._opened is None:
            bundle = Bundle.load(self.task.model)
            holders, cells = self.task.holders, self.task.config.score_memory_mb << 18  # four bytes a score
            if holders is None:
                answerer = answerer_of(bundle, cells)
            else:
                answerer = RangedAnswerer(bundle, bundle.scorer, holders.batch, bundle.num_entities, holders)
            lists = (bundle.entity_ids, bundle.entity_names, bundle.relation_ids, bundle.relation_names)
            names = [pa.array(one, pa.string()) for one in lists]
            self._opened = (bundle, answerer, names[0], names[1], names[2], names[3])
        return self._opened

    def _completions(self, task: str, asked: Ints, within: Ints, queries: pa.Table, numbers: Ints) -> pa.Table:
        """asked (U, 3): the different queries; within (Q,): which of them each query is."""
        _, answerer, *names = self._open()
        config = self.task.config
        first, second = (torch.from_numpy(asked[:, n].copy()) for n, part in enumerate(PARTS) if part != task)
        most = np.full(len(asked), config.top_k, dtype=np.int64)
        filtered = np.full(len(asked), config.filter_known)
        found: Answers = answerer.complete(cast(Task, task), first, second, most, filtered)
        self._check(found.finite, asked)
        count = found.count[within]
        row = np.repeat(within, count)
        rank = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        repeated = queries.take(pa.array(np.repeat(np.arange(len(within)), count)))
        columns = self._given(task, repeated, np.repeat(numbers, count))
        ids = pa.array(found.ids[row, rank])
        unsure = ~found.calibrated[row]
        table = names[2:] if task == "relation" else names[:2]
        return _table(
            columns
            | {
                "rank": pa.array((rank + 1).astype(np.int32)),
                "answer": table[0].take(ids),
                "answer_name": table[1].take(ids),
                "score": pa.array(found.scores[row, rank]),
                "probability": pa.array(found.probability[row, rank], mask=unsure),
                "known": pa.array(found.known[row, rank]),
                "in_set": pa.array(found.in_set[row, rank], mask=unsure),
                "set_size": pa.array(found.set_size[row], mask=unsure),
            }
        )

    def _triples(self, task: str, asked: Ints, within: Ints, queries: pa.Table, numbers: Ints) -> pa.Table:
        _, answerer, *_ = self._open()
        head, relation, tail = (torch.from_numpy(asked[:, n].copy()) for n in range(3))
        found: Judged = answerer.judge(head, relation, tail)
        self._check(found.finite, asked)
        unsure = ~found.calibrated[within]
        either = {f"{end}_probability": getattr(found, f"{end}_probability")[within] for end in ("tail", "head")}
        mean = (found.tail_probability + found.head_probability)[within] / 2
        return _table(
            self._given(task, queries, numbers)
            | {
                "score": pa.array(found.score[within]),
                "probability": pa.array(mean, mask=unsure),
                "known": pa.array(found.known[within]),
                "in_set": pa.array(found.in_set[within], mask=unsure),
                "tail_rank": pa.array(found.tail_rank[within]),
                "head_rank": pa.array(found.head_rank[within]),
                **{name: pa.array(values, mask=unsure) for name, values in either.items()},
            }
        )

    def _given(self, task: str, queries: pa.Table, numbers: Ints) -> dict[str, Any]:
        """What a row says of its query."""
        _, _, *names = self._open()
        files = pa.array(self.task.files, pa.string())
        source = pa.DictionaryArray.from_arrays(queries["source"].combine_chunks(), files)
        kind = pa.array(np.full(len(numbers), TASKS.index(task), dtype=np.int32))
        columns: dict[str, Any] = {
            "query": pa.array(numbers),
            "file": source,
            "line": queries["line"],
            "asked": pa.DictionaryArray.from_arrays(kind, pa.array(TASKS, pa.string())),
        }
        for part in PARTS:
            if part != task:
                ids = queries[part].combine_chunks()
                table = names[2:] if part == "relation" else names[:2]
                columns |= {part: table[0].take(ids), f"{part}_name": table[1].take(ids)}
        return columns

    def _check(self, finite: npt.NDArray[np.bool_], asked: Ints) -> None:
        """NonFiniteError naming the first query that cannot be ranked."""
        if finite.all():
            return
        bundle, *_ = self._open()
        ids = asked[int(np.flatnonzero(~finite)[0])].tolist()
        names = (bundle.entity_ids, bundle.relation_ids, bundle.entity_ids)
        told = ", ".join("?" if one < 0 else table[one] for one, table in zip(ids, names, strict=True))
        raise NonFiniteError(f"model {self.task.model.version} gives a score that is not a number for ({told})")


def _table(columns: Mapping[str, Any]) -> pa.Table:
    rows = len(columns["query"])
    arrays = [columns[f.name] if f.name in columns else pa.nulls(rows, f.type) for f in SCHEMA]
    return pa.table(arrays, schema=SCHEMA)
