"""Input files on object storage: found, cut and read by URI, in this process (Ray adds nothing to it)."""

from __future__ import annotations

import gzip

import pytest

from kgray.artifact.filesystem import resolve, write_bytes
from kgray.config import from_dict
from kgray.data.bad_rows import BadRows
from kgray.data.config import DataConfig
from kgray.data.files import blocks, expand_paths
from kgray.data.inputs import Sizes, graph_files, plan_reading
from kgray.data.rows import read_rows
from kgray.data.triples import triple_shape
from kgray.errors import DataError


def put(uri: str, data: bytes) -> str:
    filesystem, path = resolve(uri)
    write_bytes(filesystem, path, data)
    return uri


def test_files_on_s3(s3_root: str) -> None:
    put(f"{s3_root}/in/b.tsv", b"a\tr\tb\nb\tr\ta\n")
    put(f"{s3_root}/in/a.tsv.gz", gzip.compress(b"c\tr\td\n"))
    put(f"{s3_root}/in/deep/c.tsv", b"x\tr\ty\n")
    assert expand_paths(f"{s3_root}/in/*.tsv*", "key") == [f"{s3_root}/in/a.tsv.gz", f"{s3_root}/in/b.tsv"]
    assert len(expand_paths(f"{s3_root}/in/**/*.tsv", "key")) == 2
    for missing in (f"{s3_root}/in/nope.tsv", f"{s3_root}/none/*.tsv"):
        with pytest.raises(DataError, match=r"^key: no (such file|file matches)"):
            expand_paths(missing, "key")
    data = from_dict(DataConfig, {"triples": {"train": f"{s3_root}/in/*.tsv*"}})
    shape = triple_shape(data.columns)
    plan = plan_reading(graph_files(data), False, shape, "data.columns", Sizes())
    (chunks,) = plan.groups
    read = [block for chunk in chunks for block in read_rows(chunk, shape, shape.required, BadRows(1))]
    assert [head for block in read for head in block.columns["head"].to_pylist()] == ["c", "a", "b"]
    assert b"".join(text for _, text in blocks(chunks[1])) == b"a\tr\tb\nb\tr\ta\n"
