"""Files of queries to ids: every format says the same, every wrong row is told with its file and line.

python3 -m pytest tests/unit/test_prediction_queries.py
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kgray.artifact import Draft
from kgray.data import tasks
from kgray.data.inputs import Sizes
from kgray.errors import ConfigError, DataError
from kgray.prediction import queries as module
from kgray.prediction.config import PredictConfig
from kgray.prediction.queries import SCHEMA, QueriesRead, Vocabulary, note_name, plan_queries, read_queries, shard_name
from kgray.serving.names import Names

ENTITIES = (["e0", "e1", "e2", "?"], ["zero", "one", "two", "mark"])
RELATIONS = (["r0", "r1"], ["likes", ""])  # one has no name

ROWS = [("e0", "r0", "?"), ("?", "likes", "two"), ("e1", "?", "e2"), ("e2", "r1", "e0"), ("one", "r0", "")]
IDS = [[0, 0, 0, -1], [1, -1, 0, 2], [2, 1, -1, 2], [3, 2, 1, 0], [0, 1, 0, -1]]


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_in_process", True)
    words = Vocabulary(Names("entity", *ENTITIES), Names("relation", *RELATIONS), ALL)
    monkeypatch.setattr(module, "_vocabulary", lambda uri, given: Vocabulary(words.entities, words.relations, given))


ALL = ("tail", "head", "relation")


def read(
    folder: Path, config: PredictConfig, able: tuple[str, ...] = ALL, chunk_bytes: int = 1 << 20
) -> tuple[list[list[int]], list[QueriesRead]]:
    """Rows (task, head, relation, tail, line), and what was told."""
    out = Draft(str(folder / "scratch"))
    plan = plan_queries(config, Sizes(chunk_bytes=chunk_bytes, task_bytes=chunk_bytes))
    told, rows = [], []
    model: Any = SimpleNamespace(uri="nowhere")
    for group, chunks in enumerate(plan.groups):
        told.append(read_queries(out, config, model, able, group, chunks))
        for number, size in enumerate(told[-1].shards):
            table = pq.read_table(out.path_of(shard_name(group, number)))
            assert table.schema.equals(SCHEMA) and table.num_rows == size
            rows += np.stack([table[name] for name in ("task", "head", "relation", "tail", "line")], axis=1).tolist()
        note = json.loads(Path(out.path_of(note_name(group))).read_text())
        assert QueriesRead.from_json(note).shards == told[-1].shards
    return rows, told


def lines(separator: str, header: bool) -> str:
    rows = [("head", "relation", "tail"), *ROWS] if header else ROWS
    return "".join(separator.join(row) + "\n" for row in rows)


def write(folder: Path, kind: str) -> tuple[Path, int]:
    """A file of ROWS and the line of the first of them."""
    path = folder / f"queries.{kind}"
    if kind == "parquet":
        columns = zip(*[[None if v in ("?", "") else v for v in row] for row in ROWS], strict=True)
        pq.write_table(pa.table(dict(zip(("head", "relation", "tail"), columns, strict=True))), path)
        return path, 1
    if kind == "jsonl":
        named = [dict(zip(("head", "relation", "tail"), row, strict=True)) for row in ROWS]
        path.write_text("".join(json.dumps({k: v for k, v in row.items() if v}) + "\n" for row in named))
        return path, 1
    header = kind.startswith("csv")
    text = lines("," if header else "\t", header)
    path.write_bytes(gzip.compress(text.encode()) if kind.endswith(".gz") else text.encode())
    return path, 1 + header


@pytest.mark.parametrize("kind", ["tsv", "tsv.gz", "csv", "csv.gz", "jsonl", "parquet"])
@pytest.mark.parametrize("shard_rows", [1, 2, 100])
def test_every_format_gives_the_same_queries(tmp_path: Path, kind: str, shard_rows: int) -> None:
    path, first = write(tmp_path, kind)
    rows, (told,) = read(tmp_path, PredictConfig(queries=str(path), shard_rows=shard_rows))
    assert rows == [[*ids, first + n] for n, ids in enumerate(IDS)]
    assert told.tasks == [2, 1, 1, 1] and told.bad.count == 0
    assert told.shards == ([1] * 5 if shard_rows == 1 else [2, 2, 1] if shard_rows == 2 else [5])


def test_a_file_in_pieces_is_read_as_a_whole_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "many.tsv"
    path.write_text("e0\tr0\t?\n?\tr1\te1\n" * 500)
    rows, told = read(tmp_path, PredictConfig(queries=str(path), shard_rows=64), chunk_bytes=1000)
    assert len(told) > 5
    assert [row[4] for row in rows] == list(range(1, 1001))
    assert [row[0] for row in rows] == [0, 1] * 500


def test_two_columns_ask_for_the_third(tmp_path: Path) -> None:
    path = tmp_path / "two.csv"
    path.write_text("id,relation,tail\n7,r0,e1\n8,r1,zero\n")
    rows, _ = read(tmp_path, PredictConfig(queries=str(path)))
    assert rows == [[1, -1, 0, 1, 2], [1, -1, 1, 0, 3]]


def test_an_entity_called_like_the_mark_can_be_asked_with_another(tmp_path: Path) -> None:
    path = tmp_path / "mark.tsv"
    path.write_text("?\tr0\t*\n")
    rows, _ = read(tmp_path, PredictConfig(queries=str(path), unknown="*"))
    assert rows == [[0, 3, 0, -1, 1]]


def test_rows_that_cannot_be_answered_are_told(tmp_path: Path) -> None:
    path = tmp_path / "bad.tsv"
    path.write_text("e0\tr0\t?\ne00\tr0\t?\n?\tr0\t\ne0\tr0\n?\tr9\te1\n?\t\t?\n")
    rows, (told,) = read(tmp_path, PredictConfig(queries=str(path), on_bad_row="skip"))
    assert [row[4] for row in rows] == [1]
    reasons = {row.line: row.reason for row in told.bad.rows}
    assert sorted(reasons) == [2, 3, 4, 5, 6]
    assert "head: no entity has the id or name 'e00'; did you mean" in reasons[2]
    assert reasons[3] == "head and tail are open; expected two of head, relation, tail, or all three"
    assert "found 2 columns; expected 3 (head, relation, tail) separated by tabs" in reasons[4]
    assert "relation: no relation has the id or name 'r9'" in reasons[5]
    assert "head and relation and tail are open" in reasons[6]


def test_of_many_bad_rows_all_are_counted_and_the_first_kept(tmp_path: Path) -> None:
    path = tmp_path / "bad.tsv"
    path.write_text("".join(f"x{i}\tr0\t?\n" for i in range(50)) + "e0\tr0\t?\ne0\n")
    _, (told,) = read(tmp_path, PredictConfig(queries=str(path), on_bad_row="skip", max_bad_rows=4))
    assert told.bad.count == 51
    assert [row.line for row in told.bad.rows] == [1, 2, 3, 4, 5]
    _, (told,) = read(tmp_path, PredictConfig(queries=str(path)))
    assert told.bad.count == 51 and [row.line for row in told.bad.rows] == [1]


def test_what_the_model_cannot_tell_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "relation.tsv"
    path.write_text("e0\tr0\t?\ne0\t?\te1\ne0\tr0\te1\n")
    rows, (told,) = read(tmp_path, PredictConfig(queries=str(path), on_bad_row="skip"), ("tail", "head"))
    assert [row[4] for row in rows] == [1, 3]
    assert told.bad.rows[0].reason == "this model cannot tell the relation, it answers tail and head queries"
    rows, (told,) = read(tmp_path, PredictConfig(queries=str(path), on_bad_row="skip"), ("relation",))
    assert [row[4] for row in rows] == [2] and told.bad.count == 2
    assert "cannot tell the tail" in told.bad.rows[1].reason


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "", "the file is empty"),
        ("a.csv", "subject,object\nx,y\n", None),
        ("a.nt", "<a> <b> <c> .\n", "N-Triples"),
        ("a.bin", "x", "does not tell its format"),
    ],
)
def test_files_that_hold_no_queries_are_refused(tmp_path: Path, name: str, text: str, message: str | None) -> None:
    path = tmp_path / name
    path.write_text(text)
    if message is None:
        with pytest.raises(DataError, match="line 1: the columns are 'subject', 'object'; expected at least two of"):
            read(tmp_path, PredictConfig(queries=str(path), header=True))
        return
    with pytest.raises(DataError, match=message):
        read(tmp_path, PredictConfig(queries=str(path)))


def test_no_queries_and_no_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"predict\.queries.*null"):
        plan_queries(PredictConfig(), Sizes())
    with pytest.raises(DataError, match=r"predict\.queries: no such file"):
        plan_queries(PredictConfig(queries=str(tmp_path / "none.tsv")), Sizes())
