"""Documents to a corpus artifact on a real Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kgray.artifact import Draft, Store
from kgray.config import from_dict
from kgray.data.config import DataConfig
from kgray.data.corpus import corpus_recipe, ingest_corpus
from kgray.data.inputs import Sizes
from kgray.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("ray_cluster")


def configured(**data: Any) -> DataConfig:
    return from_dict(DataConfig, {"triples": "unused.tsv", **data})


def run(folder: Path, sizes: Sizes | None = None, **data: Any) -> tuple[dict[str, int], list[dict[str, Any]]]:
    folder.mkdir()
    counts = ingest_corpus(Draft(str(folder)), configured(**data), sizes)
    parts = sorted((folder / "documents").glob("part-*.parquet"))
    return counts, [row for part in parts for row in pq.read_table(part).to_pylist()]


def test_formats_and_extras(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"doc_id": "1", "text": "one", "title": "T", "year": 1990}\n{"doc_id": "2", "text": ""}\n'
    )
    pq.write_table(pa.table({"doc_id": ["3"], "text": ["three\nlines"], "score": [1.5]}), tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text('doc_id,text,source\n4,"four, ""4""\nx",web\n')
    (tmp_path / "d.tsv").write_text("text\tdoc_id\nfive\t5\n")
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.parquet", "c.csv", "d.tsv")]
    counts, rows = run(tmp_path / "corpus", documents=paths)
    assert counts == {"documents": 5, "characters": 3 + 11 + 11 + 4, "quarantined": 0, "parts": 1}
    assert [(row["doc_id"], row["text"], row["source"], row["line"]) for row in rows] == [
        ("1", "one", 0, 1), ("2", "", 0, 2), ("3", "three\nlines", 1, 1), ("4", 'four, "4"\nx', 2, 2),
        ("5", "five", 3, 2),
    ]  # fmt: skip
    assert [row["year"] for row in rows] == ["1990", "", "", "", ""]
    assert (rows[2]["score"], rows[3]["extra_source"]) == ("1.5", "web")
    audit = json.loads((tmp_path / "corpus" / "audit.json").read_text())
    assert (audit["documents"], audit["missing_text"], audit["characters"]["max"]) == (5, 1, 11)


def test_plain_texts(tmp_path: Path) -> None:
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "docs" / "b.txt").write_text("two\nlines\n")
    (tmp_path / "docs" / "deep" / "a.txt").write_text("é")
    counts, rows = run(tmp_path / "corpus", documents=str(tmp_path / "docs" / "**" / "*.txt"))
    assert counts["documents"] == 2
    assert {row["doc_id"]: row["text"] for row in rows} == {"b.txt": "two\nlines\n", "deep/a.txt": "é"}


def test_cut_gives_the_same_rows(tmp_path: Path) -> None:
    lines = [json.dumps({"doc_id": f"d{n}", "text": f"text {n} " * (n % 7)}) for n in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    _, whole = run(tmp_path / "one", documents=str(tmp_path / "a.jsonl"))
    counts, cut = run(
        tmp_path / "two",
        Sizes(chunk_bytes=900, task_bytes=900, bucket_bytes=900, small_bytes=0),
        documents=str(tmp_path / "a.jsonl"),
    )
    assert whole == cut
    assert counts["parts"] > 3
    assert [row["line"] for row in cut] == list(range(1, 201))


def test_repeated_ids(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"doc_id": "{n % 3}", "text": "t{n}"}}\n' for n in range(5)))
    paths = str(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl, line 4: the doc_id '0' has a row already in line 1.*1 more"):
        run(tmp_path / "one", documents=paths)
    counts, rows = run(tmp_path / "two", documents=paths, on_bad_row="skip")
    assert [row["text"] for row in rows] == ["t0", "t1", "t2"]
    assert counts["quarantined"] == 2
    told = [json.loads(line) for line in (tmp_path / "two" / "quarantine.jsonl").read_text().splitlines()]
    assert [row["line"] for row in told] == [4, 5]


def test_bad_documents(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"fine\nnot \xff fine\n")
    with pytest.raises(DataError, match=r"x\.txt, line 2: not UTF-8"):
        run(tmp_path / "one", documents=str(tmp_path / "x.txt"))
    (tmp_path / "y.tsv").write_text("doc_id\tbody\n1\tx\n")
    with pytest.raises(DataError, match=r"y\.tsv, line 1: no column 'text' among 'doc_id', 'body'"):
        run(tmp_path / "two", documents=str(tmp_path / "y.tsv"))
    assert run(tmp_path / "three", documents=str(tmp_path / "y.tsv"), columns={"text": "body"})[0]["documents"] == 1
    with pytest.raises(ConfigError, match=r"data\.documents"):
        corpus_recipe(Store(tmp_path / "store"), configured())


def test_version_follows_the_names_of_plain_texts(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name[0])
    first = corpus_recipe(store, configured(documents=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])).version
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    assert (
        corpus_recipe(store, configured(documents=[str(tmp_path / "a.txt"), str(tmp_path / "c.txt")])).version != first
    )


@pytest.mark.slow  # needs the shared data, which the README's two commands do without
def test_cranfield(tmp_path: Path, data_root: Path) -> None:
    counts, rows = run(tmp_path / "corpus", documents=str(data_root / "cranfield" / "documents.jsonl.gz"))
    assert counts["documents"] == 1400
    assert rows[0]["doc_id"] == "1"
    assert rows[0]["title"].startswith("experimental investigation")
