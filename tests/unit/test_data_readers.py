"""Files to rows: the fast paths against the slow exact ones, blocks and chunks, N-Triples."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgray.data import ntriples
from kgray.data.bad_rows import BadRow, BadRows
from kgray.data.files import (
    Chunk,
    InputFile,
    blocks,
    count_lines,
    cut_file,
    describe_file,
    expand_paths,
    number_chunks,
)
from kgray.data.rows import RowBlock, Shape, as_text, fast_delimited, read_rows, slow_delimited
from kgray.errors import DataError

NAMES = ("head", "relation", "tail")
SHAPE = Shape(NAMES)
field = st.text(st.sampled_from("ab é\"',0\r\x1f"), min_size=1, max_size=5)
line = st.lists(field, min_size=2, max_size=4).map("\t".join)


def file_of(path: Path, role: str = "train") -> InputFile:
    return describe_file(0, str(path), role, "auto", "data.triples")


def rows_of(block: RowBlock) -> list[tuple[str, ...]]:
    return list(zip(*(block.columns[name].to_pylist() for name in NAMES), strict=True))


@given(st.lists(line, max_size=8), st.sampled_from(["\n", "\r\n"]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_fast_tsv_equals_slow(lines: list[str], end: str, last: bool) -> None:
    data = (end.join(lines) + (end if last else "")).encode()
    fast = fast_delimited(data, 5, "tsv", NAMES, SHAPE)
    bad = BadRows(100)
    slow = slow_delimited(data, 5, "tsv", NAMES, SHAPE, 0, bad)
    if fast is not None:
        assert bad.count == 0
        assert rows_of(fast) == rows_of(slow)
        assert fast.lines.tolist() == slow.lines.tolist()


def test_fast_path_is_taken() -> None:
    assert fast_delimited(b"a\tr\tb\n", 1, "tsv", NAMES, SHAPE) is not None
    assert fast_delimited(b"a,r,b\r\nb,r,a", 1, "csv", NAMES, SHAPE) is not None
    assert fast_delimited(b'"NA"\tnull\t00012\n', 1, "tsv", NAMES, SHAPE).columns["tail"].to_pylist() == ["00012"]
    for data in (b"a\tr\n", b"a\t\tb\n", b"a\tr\tb\n\na\tr\tb", b"a\tr\t\xff\n", b"a\tr\tb\rc\n"):
        assert fast_delimited(data, 1, "tsv", NAMES, SHAPE) is None


@given(st.lists(st.tuples(field, field, field), min_size=1, max_size=9))
@settings(max_examples=80, deadline=None)
def test_csv_equals_the_csv_module(rows: list[tuple[str, str, str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(rows)
    bad = BadRows(9)
    block = slow_delimited(text.getvalue().encode(), 1, "csv", NAMES, SHAPE, 0, bad)
    assert rows_of(block) == [row for row in rows if not any(one.isspace() for one in row)]


def test_a_long_csv_field() -> None:
    long = "x" * 300_000
    block = slow_delimited(f'a,r,"{long}"\n'.encode(), 1, "csv", NAMES, SHAPE, 0, BadRows(1))
    assert block.columns["tail"].to_pylist() == [long]


@pytest.mark.parametrize("size", [1, 3, 8, 1000])
@pytest.mark.parametrize("end", ["\n", ""])
def test_blocks_are_whole_lines_with_their_number(tmp_path: Path, size: int, end: str) -> None:
    text = "\ufeffone\ntwo\n\nfour" + end
    path = tmp_path / "a.tsv"
    path.write_text(text, encoding="utf-8")
    for suffix, pack in {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.items():
        packed = tmp_path / f"a.tsv{suffix}"
        packed.write_bytes(pack(text.encode()))
        found = list(blocks(Chunk(file_of(packed)), block_bytes=size + 3))
        assert b"".join(data for _, data in found) == text.encode().removeprefix(b"\xef\xbb\xbf")
        number = 1
        for first, data in found:
            assert first == number
            number += data.count(b"\n")


def test_gzip_of_several_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(gzip.compress(b"a\n") + gzip.compress(b"b\n"))
    assert b"".join(data for _, data in blocks(Chunk(file_of(path)))) == b"a\nb\n"


def test_blocks_keep_quoted_line_ends_together(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('a,"x\ny\nz"\nb,"1""\n2"\nc,d\n')
    found = list(blocks(Chunk(file_of(path)), quoted=True, block_bytes=4))
    assert [number for number, _ in found] == [1, 4, 6]
    assert [data for _, data in found] == [b'a,"x\ny\nz"\n', b'b,"1""\n2"\n', b"c,d\n"]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_chunks_hold_every_line_once(tmp_path_factory: pytest.TempPathFactory, widths: list[int], size: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.tsv"
    lines = [f"{n}" + "x" * width for n, width in enumerate(widths)]
    path.write_text("\n".join(lines))
    chunks = cut_file(file_of(path), header=False, chunk_bytes=size)
    chunks = number_chunks(chunks, [count_lines(chunk) for chunk in chunks])
    found = []
    for chunk in chunks:
        for number, data in blocks(chunk):
            found += list(enumerate(data.decode().removesuffix("\n").split("\n"), start=number))
    assert found == list(enumerate(lines, start=1))


def test_header_of_a_cut_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("head\trelation\ttail\n" + "".join(f"a{n}\tr\tb{n}\n" for n in range(50)))
    chunks = cut_file(file_of(path), header=True, chunk_bytes=100)
    chunks = number_chunks(chunks, [count_lines(chunk) for chunk in chunks])
    assert len(chunks) > 2
    read = [block for chunk in chunks for block in read_rows(chunk, SHAPE, (), BadRows(1))]
    assert [row for block in read for row in rows_of(block)] == [(f"a{n}", "r", f"b{n}") for n in range(50)]
    assert np.concatenate([block.lines for block in read]).tolist() == list(range(2, 52))


@pytest.mark.parametrize(
    ("name", "role", "kind", "compression"),
    [
        ("a.tsv", "train", "tsv", None),
        ("a.TSV.GZ", "train", "tsv", "gzip"),
        ("a.txt.xz", "train", "tsv", "xz"),
        ("a.txt", "documents", "text", None),
        ("a.nt.bz2", "triples", "ntriples", "bz2"),
        ("a.ndjson.zst", "entities", "jsonl", "zstd"),
        ("s3://b/x.y/a.parquet", "train", "parquet", None),
    ],
)
def test_format_by_name(name: str, role: str, kind: str, compression: str | None) -> None:
    file = describe_file(0, name, role, "auto", "key")
    assert (file.format, file.compression) == (kind, compression)


def test_unknown_formats() -> None:
    assert describe_file(0, "a.dat.gz", "train", "csv", "key").format == "csv"
    with pytest.raises(DataError, match=r"key: the name of a\.dat does not tell its format.*set data\.format"):
        describe_file(0, "a.dat", "train", "auto", "key")
    with pytest.raises(DataError, match="is N-Triples; expected a table"):
        describe_file(0, "a.nt", "entities", "auto", "key")


def test_globs(tmp_path: Path) -> None:
    for name in ("b.tsv", "a.tsv", "x/c.tsv", "odd[1].tsv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    assert [Path(p).name for p in expand_paths(f"{tmp_path}/?.tsv", "k")] == ["a.tsv", "b.tsv"]
    assert [Path(p).name for p in expand_paths(f"{tmp_path}/**/c.tsv", "k")] == ["c.tsv"]
    assert expand_paths([f"{tmp_path}/odd[1].tsv"], "k") == [f"{tmp_path}/odd[1].tsv"]


STATEMENTS = """<http://x/a> <http://x/r> <http://x/b> .
_:b0<r><http://x/\\u00e9\\U0001F600>. # said so
  # a comment

\t_:b-1.x\t<r>\t_:b0\t.\r
"""


def test_ntriples() -> None:
    bad = BadRows(9)
    columns, lines = ntriples.parse(STATEMENTS.encode(), 10, NAMES, 0, bad)
    assert bad.count == 0
    assert lines.tolist() == [10, 11, 14]
    assert list(zip(*(columns[name].to_pylist() for name in NAMES), strict=True)) == [
        ("http://x/a", "http://x/r", "http://x/b"),
        ("_:b0", "r", "http://x/é😀"),
        ("_:b-1.x", "r", "_:b0"),
    ]


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ('<a> <r> "x" .', "the tail is a literal"),
        ('<a> <r> "1"^^<int> .', "the tail is a literal"),
        ('"a" <r> <b> .', "the head is a literal"),
        ("<a> _:r <b> .", "not an N-Triples statement"),
        ("<a b> <r> <c> .", "not an N-Triples statement"),
        ("<a> <r> <b>", "no full stop at the end"),
        ("<a> <r> <b> . <c>", "no full stop at the end"),
        ("<a> <r> <\\uD800> .", "a broken escape in the tail"),
        ("<a> <\\x> <b> .", "a broken escape in the relation"),
        ("<a> <r> <> .", "not an N-Triples statement"),
    ],
)
def test_bad_ntriples(statement: str, reason: str) -> None:
    bad = BadRows(9)
    columns, _ = ntriples.parse(f"<a> <r> <b> .\n{statement}\n<b> <r> <a> .\n".encode(), 1, NAMES, 0, bad)
    (row,) = bad.rows
    assert row.line == 2
    assert reason in row.reason
    assert columns["head"].to_pylist() == ["a", "b"]


def test_bad_rows_keep_the_first_in_file_order() -> None:
    bad = BadRows(2)
    for number in range(500, 0, -1):
        bad.add(number % 2, number, "wrong", "t")
    assert bad.count == 500
    assert bad.rows == [BadRow(0, 2, "wrong", "t"), BadRow(0, 4, "wrong", "t")]
    other = BadRows(2)
    other.add(0, 1, "wrong", "x" * 1000)
    bad.take(other)
    assert (bad.count, bad.rows[0].line, len(bad.rows[0].text)) == (501, 1, 500)


def test_columns_as_text() -> None:
    assert as_text(pa.array([1, None, 3])).to_pylist() == ["1", "", "3"]
    assert as_text(pa.array(["a", None]).dictionary_encode()).to_pylist() == ["a", ""]
    assert as_text(pa.chunked_array([["a"], ["b"]])).to_pylist() == ["a", "b"]
    assert as_text(pa.array([["x"], []])).to_pylist() == ['["x"]', "[]"]
