"""What the user is told of bad input: one message with file, line, what was found and what would be right."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kgray.artifact import Draft
from kgray.config import from_dict
from kgray.data.config import DataConfig
from kgray.data.ingest import ingest
from kgray.data.inputs import Sizes
from kgray.data.partition import GraphConfig
from kgray.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("ray_cluster")
GOOD = "a\tr\tb\nb\tr\ta\n"


def run(folder: Path, sizes: Sizes | None = None, partitions: int = 1, **data: Any) -> dict[str, int]:
    out = folder / "graph"
    out.mkdir()
    config = from_dict(DataConfig, data)
    return ingest(Draft(str(out)), config, GraphConfig(partitions=partitions), sizes)


def refused(folder: Path, *parts: str, **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        run(folder, **data)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_missing_files(tmp_path: Path) -> None:
    good = write(tmp_path / "t.tsv", GOOD)
    with pytest.raises(DataError, match=r"data\.triples\.train: no such file: .*/nope/t\.tsv \(there is no folder"):
        run(tmp_path, triples={"train": str(tmp_path / "nope" / "t.tsv")})
    (tmp_path / "graph").rmdir()
    refused(tmp_path, "data.triples: no file matches", "x*.tsv", triples=[good, str(tmp_path / "x*.tsv")])
    (tmp_path / "graph").rmdir()
    refused(tmp_path, "is a folder; expected a file or a glob", triples=str(tmp_path))
    (tmp_path / "graph").rmdir()
    refused(tmp_path, "is named twice", triples=[good, good])
    (tmp_path / "graph").rmdir()
    refused(tmp_path, "data.entities: no such file", triples=good, entities=str(tmp_path / "e.tsv"))
    (tmp_path / "graph").rmdir()
    strange = write(tmp_path / "t.dat", GOOD)
    refused(tmp_path, "t.dat does not tell its format", "data.format", triples=strange)


ROWS: dict[str, tuple[str, str | bytes, list[str]]] = {
    "too few columns": ("t.tsv", "a\tr\tb\nb\tr\nx\n", ["t.tsv, line 2: found 2 columns; expected 3 (head, "
        "relation, tail) separated by tabs; and 1 more bad row"]),
    "too many columns": ("t.tsv", GOOD + "a\tr\tb\tc\n", ["line 3: found 4 columns; expected 3"]),
    "csv columns": ("t.csv", 'a,r,"b,c"\na,r\n', ["line 2: found 2 columns", "separated by commas"]),
    "csv quotes": ("t.csv", 'a,r,b\na,r,"b\n', ["line 2: bad quoting"]),
    "line after a quoted line end": ("t.csv", 'a,r,"b\nc"\na,,b\n', ["line 3: the column 'relation' is empty"]),
    "empty field": ("t.tsv", "a\tr\tb\r\n\tr\tb\r\n", ["line 2: the column 'head' is empty; expected a value"]),
    "blank field": ("t.tsv", "a\tr\tb\na\tr\t  \n", ["line 2: the column 'tail' is empty"]),
    "not UTF-8": ("t.tsv", b"a\tr\tb\na\tr\tc\nb\xff\tr\ta\n", ["line 3: not UTF-8 (byte 0xff at position 2)"]),
    "not UTF-8 csv": ("t.csv", b"a,r,b\nb,r,\xe9\n", ["line 2: not UTF-8 (byte 0xe9 at position 5)"]),
    "not UTF-8 jsonl": ("t.jsonl", b'{"head":"a","relation":"r","tail":"\xff"}\n', ["line 1: not UTF-8"]),
    "not UTF-8 nt": ("t.nt", b"<a> <r> <b> .\n<a> <r> <\xff> .\n", ["line 2: not UTF-8"]),
    "not json": ("t.jsonl", '{"head":"a","relation":"r","tail":"b"}\n{"head"\n', ["line 2: not JSON"]),
    "json list": ("t.jsonl", '["a","r","b"]\n', ["line 1: found JSON that is no object"]),
    "json key": ("t.jsonl", '{"head":"a","relation":"r"}\n', ["line 1: no key 'tail'", "expected the keys head"]),
    "json type": ("t.jsonl", '{"head":3,"relation":"r","tail":"b"}\n', ["the key 'head' holds 3; expected text"]),
    "json empty": ("t.jsonl", '{"head":"","relation":"r","tail":"b"}\n', ["the key 'head' is empty"]),
    "literal": ("t.nt", '<a> <r> <b> .\n# c\n<a> <r> "x"@en .\n', ["line 3: the tail is a literal"]),
    "no full stop": ("t.nt", "<a> <r> <b>\n", ["line 1: no full stop at the end"]),
    "not a statement": ("t.nt", "a r b .\n", ["line 1: not an N-Triples statement"]),
    "broken escape": ("t.nt", "<a> <r> <b\\u12> .\n", ["line 1: a broken escape in the tail"]),
    "header": ("t.tsv", "Head\tRelation\tTail\na\tr\tb\n", ["line 1: head, relation, tail look like column names",
        "data.header=true"]),
    "empty file": ("t.tsv", "", ["t.tsv: the file is empty"]),
    "empty gzip": ("t.tsv.gz", gzip.compress(b""), ["t.tsv.gz: the file is empty once unpacked"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_bad_rows(tmp_path: Path, case: str) -> None:
    name, content, parts = ROWS[case]
    path = write(tmp_path / name, content)
    assert refused(tmp_path, *parts, triples={"train": path}).startswith(path)


def test_unknown_split(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv", "a\tr\tb\ttrain\na\tr\tc\tdev\n")
    refused(
        tmp_path,
        "line 2: unknown split 'dev'; expected train, valid, test",
        triples=path,
        columns={"split": "split"},
    )
    with pytest.raises(ConfigError, match=r"data\.triples\.vaild|triples\.vaild.*did you mean 'triples\.valid'"):
        from_dict(DataConfig, {"triples": {"train": path, "vaild": path}})


def test_entity_of_no_row(tmp_path: Path) -> None:
    train = write(tmp_path / "train.tsv", GOOD)
    test = write(tmp_path / "test.tsv", "a\tr\tb\na\tr\tzz\n")
    entities = write(tmp_path / "e.tsv", "id\tname\na\tA\nb\tB\n")
    paths = {"train": train, "test": test}
    message = refused(tmp_path, triples=paths, entities=entities)
    assert message.startswith(f"{test}, line 2: the tail 'zz' of this test triple has no row in the entity table")
    relations = write(tmp_path / "r.tsv", "id\tname\nother\tO\n")
    (tmp_path / "graph").rmdir()
    refused(
        tmp_path,
        "line 1: the relation 'r' of this train triple has no row",
        triples=paths,
        relations=relations,
    )


def test_duplicate_ids_name_both_lines(tmp_path: Path) -> None:
    train = write(tmp_path / "t.tsv", GOOD)
    entities = write(tmp_path / "e.tsv", "id\tname\na\tA\nb\tB\na\tagain\n")
    refused(tmp_path, "e.tsv, line 4: the id 'a' has a row already in line 2", triples=train, entities=entities)
    (tmp_path / "graph").rmdir()
    one = write(tmp_path / "e1.tsv", "id\tname\na\tA\nb\tB\n")
    two = write(tmp_path / "e2.tsv", "id\tname\nc\tC\nb\tB\n")
    refused(
        tmp_path,
        f"e2.tsv, line 3: the id 'b' has a row already in {one}, line 3",
        triples=train,
        entities=[one, two],
    )
    (tmp_path / "graph").rmdir()
    relations = write(tmp_path / "r.tsv", "id\nr\nr\n")
    refused(tmp_path, "r.tsv, line 3: the id 'r' has a row already in line 2", triples=train, relations=relations)


TABLES: dict[str, tuple[str | bytes, list[str]]] = {
    "no id column": (
        "name\tdescription\na\tb\n",
        ["line 1: no column 'id' among 'name', 'description'", "data.columns"],
    ),
    "column twice": ("id\tname\tname\n", ["line 1: the column 'name' stands there twice"]),
    "columns": ("id\tname\na\tA\nb\n", ["line 3: found 1 column; expected 2 (id, name)"]),
    "empty id": ("id\tname\na\tA\n\tB\n", ["line 3: the column 'id' is empty"]),
    "header not UTF-8": (b"id\tn\xff\n", ["line 1: not UTF-8"]),
    "empty": ("", ["the file is empty"]),
}


@pytest.mark.parametrize("case", TABLES)
def test_bad_tables(tmp_path: Path, case: str) -> None:
    content, parts = TABLES[case]
    train = write(tmp_path / "t.tsv", GOOD)
    refused(tmp_path, str(tmp_path / "e.tsv"), *parts, triples=train, entities=write(tmp_path / "e.tsv", content))


def cut_gzip(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)[:-20]


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_truncated_gzip(tmp_path: Path, policy: str) -> None:
    import random

    rng = random.Random(0)
    rows = "".join(f"{rng.random()}\tr\t{rng.random()}\n" for _ in range(5000)).encode()
    path = write(tmp_path / "t.tsv.gz", cut_gzip(rows))
    refused(tmp_path, "t.tsv.gz, after line", "gzip data ends too early: the file is truncated", triples=path,
            on_bad_row=policy)  # fmt: skip
    (tmp_path / "graph").rmdir()
    path = write(tmp_path / "u.tsv.gz", b"no gzip at all")
    refused(tmp_path, "u.tsv.gz, after line 0: the gzip data is damaged", triples=path)


def test_truncated_others(tmp_path: Path) -> None:
    import bz2
    import lzma

    packers: dict[str, Callable[[bytes], bytes]] = {
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    }
    for suffix, pack in packers.items():
        write(tmp_path / f"good.tsv.{suffix}", pack(GOOD.encode()))
        counts = run(tmp_path, triples={"train": str(tmp_path / f"good.tsv.{suffix}")})
        assert counts["triples_train"] == 2
        _remove(tmp_path / "graph")
        path = write(tmp_path / f"cut.tsv.{suffix}", pack(GOOD.encode() * 100)[:-5])
        refused(tmp_path, f"cut.tsv.{suffix}, after line", "expected a complete", triples=path)
        _remove(tmp_path / "graph")


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


def test_bad_parquet(tmp_path: Path) -> None:
    def parquet(**columns: Any) -> str:
        pq.write_table(pa.table(columns), tmp_path / "t.parquet")
        return str(tmp_path / "t.parquet")

    names = parquet(subject=["a"], relation=["r"], tail=["b"])
    refused(tmp_path, "t.parquet: no column 'head' among 'subject', 'relation', 'tail'", triples=names)
    (tmp_path / "graph").rmdir()
    run(tmp_path, triples=names, columns={"head": "subject"})
    _remove(tmp_path / "graph")
    numbers = parquet(head=[1], relation=["r"], tail=["b"])
    refused(tmp_path, "the column 'head' has the type int64; expected string", triples=numbers)
    (tmp_path / "graph").rmdir()
    empties = parquet(head=["a", None, "a"], relation=["r", "r", ""], tail=["b", "c", "d"])
    refused(tmp_path, "line 2: the column 'head' is empty", "1 more bad row", triples=empties)
    (tmp_path / "graph").rmdir()
    refused(tmp_path, "the file is empty", triples=parquet(head=[], relation=[], tail=[]))
    (tmp_path / "graph").rmdir()
    broken = write(tmp_path / "x.parquet", b"PAR1 but no more")
    refused(tmp_path, "x.parquet: not a Parquet file, or a damaged one", triples=broken)


def test_skip_sets_aside_up_to_a_number(tmp_path: Path) -> None:
    train = write(tmp_path / "train.tsv", "a\tr\tb\nbad\nb\tr\ta\n\tr\tb\n")
    test = write(tmp_path / "test.tsv", "a\tr\tb\na\tr\tzz\n")
    entities = write(tmp_path / "e.tsv", "id\tname\na\tA\nb\tB\na\tagain\n")
    data: dict[str, Any] = {
        "triples": {"train": train, "test": test},
        "entities": entities,
        "on_bad_row": "skip",
    }
    counts = run(tmp_path, **data, max_bad_rows=4)
    assert (counts["quarantined"], counts["triples_train"], counts["triples_test"]) == (4, 2, 1)
    rows = [json.loads(line) for line in (tmp_path / "graph" / "quarantine.jsonl").read_text().splitlines()]
    assert [(Path(row["file"]).name, row["line"]) for row in rows] == [
        ("train.tsv", 2), ("train.tsv", 4), ("test.tsv", 2), ("e.tsv", 4),
    ]  # fmt: skip
    assert rows[0]["text"] == "bad"
    assert all("; expected" in row["reason"] for row in rows)
    assert pq.read_table(tmp_path / "graph" / "entities").to_pydict()["name"].count("A") == 1
    _remove(tmp_path / "graph")
    refused(tmp_path, "4 bad rows, more than data.max_bad_rows=3", "train.tsv, line 2", **data, max_bad_rows=3)


def test_first_bad_row_in_file_order(tmp_path: Path) -> None:
    rows = [f"a{n}\tr\tb{n}" for n in range(300)]
    rows[250] = rows[120] = rows[260] = "bad"
    one = write(tmp_path / "1.tsv", "\n".join(rows))
    two = write(tmp_path / "2.tsv", "bad\n")
    sizes = Sizes(chunk_bytes=400, task_bytes=400, bucket_bytes=500, small_bytes=0)
    message = refused(tmp_path, triples=[one, two], sizes=sizes)
    assert message.startswith(f"{one}, line 121: found 1 column;")
    assert "; and 3 more bad rows (data.on_bad_row=skip" in message


def test_nothing_to_train_on(tmp_path: Path) -> None:
    train = write(tmp_path / "t.tsv", "bad\n")
    test = write(tmp_path / "u.tsv", GOOD)
    refused(
        tmp_path,
        "no training triple is left (1 bad rows)",
        triples={"train": train, "test": test},
        on_bad_row="skip",
    )
    _remove(tmp_path / "graph")
    refused(tmp_path, "no entity is left", triples={"train": train}, on_bad_row="skip")
    _remove(tmp_path / "graph")
    with pytest.raises(ConfigError, match=r"graph\.partitions.*at most one for each of the 2 entities"):
        run(tmp_path, triples=test, partitions=3)


def test_bom_and_line_ends_are_tolerated(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv", b"\xef\xbb\xbfa\tr\tb\r\n\r\nb\tr\ta\r\n\r\n")
    entities = write(tmp_path / "e.csv", b'\xef\xbb\xbfid,name\r\na,"A, a"\r\nb,B')
    assert run(tmp_path, triples={"train": path}, entities=entities)["triples_train"] == 2
    lines = pq.read_table(tmp_path / "graph" / "triples" / "train").column("line").to_pylist()
    assert sorted(lines) == [1, 3]


def test_header_option(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv", "weight\ttail\thead\trelation\n0.5\tb\ta\tr\n")
    assert run(tmp_path, triples={"train": path}, header=True)["triples_train"] == 1
    table = pq.read_table(tmp_path / "graph" / "entities").to_pydict()
    row = pq.read_table(tmp_path / "graph" / "triples" / "train").to_pylist()[0]
    assert (table["external_id"][row["head"]], row["line"]) == ("a", 2)
    _remove(tmp_path / "graph")
    other = write(tmp_path / "u.tsv", "from\trelation\tto\na\tr\tb\n")
    refused(
        tmp_path,
        "u.tsv, line 1: no column 'head', 'tail' among 'from', 'relation', 'to'",
        triples=other,
        header=True,
    )


def test_the_same_is_told_when_tasks_are_many(tmp_path: Path) -> None:
    """Most tests here are small enough for one task; faults must cross from many just as well."""
    good = write(tmp_path / "1.tsv", GOOD)
    late = write(tmp_path / "2.tsv", "a\tr\tb\na\tr\n")
    cut = write(tmp_path / "3.tsv.gz", cut_gzip(b"a\tr\tb\n" * 1000))
    many = Sizes(chunk_bytes=10, task_bytes=10, bucket_bytes=10, small_bytes=0)
    for sizes in (None, many):
        refused(tmp_path, "3.tsv.gz, after line", "the file is truncated", triples=[good, cut], sizes=sizes)
        _remove(tmp_path / "graph")
        refused(tmp_path, "3.tsv.gz, after line", "the file is truncated", triples=[good, late, cut], sizes=sizes)
        _remove(tmp_path / "graph")
        refused(tmp_path, f"{late}, line 2: found 2 columns", triples=[good, late], sizes=sizes)
        _remove(tmp_path / "graph")
        entities = write(tmp_path / "e.tsv", "id\na\nb\na\n")
        refused(tmp_path, "e.tsv, line 4: the id 'a'", triples=good, entities=entities, sizes=sizes)
        _remove(tmp_path / "graph")
