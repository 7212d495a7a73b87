"""Keys, reuse, cutting into units, and reading a vectors artifact."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kgray.artifact import Artifact, Draft, Recipe, Store
from kgray.errors import ArtifactError
from kgray.text.pieces import RELATION_PART, NpyWriter, plan_units, unit_name
from kgray.text.reuse import Known, keys_of, keys_table, text_keys
from kgray.text.vectors import entities_file, keys_file, load_vectors

DIM = 8


def vectors_artifact(
    store: Store, texts: list[str], parts: int = 1, index: dict[str, Any] | None = None
) -> tuple[Artifact, np.ndarray[Any, Any]]:
    """Random vectors for some texts, with keys; ``index`` overrides entries of index.json."""
    values = np.random.default_rng(len(texts)).standard_normal((len(texts), DIM)).astype(np.float16)
    bounds = [len(texts) * at // parts for at in range(parts + 1)]
    spans = list(itertools.pairwise(bounds))

    def make(draft: Draft) -> dict[str, Any]:
        for part, (start, end) in enumerate(spans):
            buffer = io.BytesIO()
            np.save(buffer, values[start:end])
            draft.write_bytes(entities_file(part), buffer.getvalue())
            draft.write_table(keys_file(part), keys_table(text_keys(texts[start:end])))
        buffer = io.BytesIO()
        np.save(buffer, np.ones((4, DIM), np.float16))
        draft.write_bytes("relations.npy", buffer.getvalue())
        entries = [{"file": entities_file(p), "start": s, "end": e} for p, (s, e) in enumerate(spans)]
        draft.write_json("index.json", {"dim": DIM, "relations": 2, "parts": entries} | (index or {}))
        return {}

    return store.build(
        Recipe("vectors", 1, (), {"texts": texts, "parts": parts, "index": index}), make
    ).artifact, values


def test_one_part_is_a_memory_map_and_several_are_joined(tmp_path: Path) -> None:
    store = Store(tmp_path)
    texts = [f"t{n}" for n in range(11)]
    one, values = vectors_artifact(store, texts)
    vectors = load_vectors(one)
    assert isinstance(vectors.entities, np.memmap)
    np.testing.assert_array_equal(vectors.entities, values)
    many, values = vectors_artifact(store, texts, parts=4)
    vectors = load_vectors(many)
    assert (len(vectors), vectors.dim, vectors.relations.shape) == (11, DIM, (4, DIM))
    np.testing.assert_array_equal(vectors.entities, values)
    ids = np.array([10, 0, 5, 5, 2, 3])
    np.testing.assert_array_equal(vectors.rows(ids), values[ids])
    assert vectors.rows(np.array([], dtype=np.int64)).shape == (0, DIM)


@pytest.mark.parametrize("wrong", [-1, 11])
def test_ids_outside_the_graph_are_an_error_not_another_row(tmp_path: Path, wrong: int) -> None:
    vectors = load_vectors(vectors_artifact(Store(tmp_path), [f"t{n}" for n in range(11)], parts=2)[0])
    with pytest.raises(IndexError, match=r"0\.\.10"):
        vectors.rows(np.array([0, wrong]))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"dim": DIM + 1}, "expected float16"),
        ({"relations": 3}, "expected float16"),
        ({"parts": [{"file": entities_file(0), "start": 1, "end": 6}]}, "not from 0"),
        ({"parts": [{"file": entities_file(0), "start": 0, "end": 4}]}, "expected float16"),
    ],
)
def test_an_index_that_does_not_fit_its_arrays_is_refused(
    tmp_path: Path, index: dict[str, Any], message: str
) -> None:
    artifact, _ = vectors_artifact(Store(tmp_path), ["a", "b", "c", "d", "e"], index=index)
    with pytest.raises(ArtifactError, match=message):
        load_vectors(artifact)


def test_another_kind_of_artifact_is_refused(tmp_path: Path) -> None:
    artifact = (
        Store(tmp_path).build(Recipe("graph", 1), lambda draft: draft.write_json("a.json", {})).artifact
    )
    with pytest.raises(ArtifactError, match="kind graph"):
        load_vectors(artifact)


@given(st.lists(st.text(), max_size=20))
def test_keys_survive_a_table_also_in_slices(texts: list[str]) -> None:
    keys = text_keys(texts)
    table = keys_table(keys)
    np.testing.assert_array_equal(keys_of(table), keys)
    np.testing.assert_array_equal(keys_of(table.slice(1)), keys[1:])
    np.testing.assert_array_equal(
        keys_of(pa.concat_tables([table, table.slice(1)])), np.concatenate([keys, keys[1:]])
    )
    assert len(np.unique(keys, axis=0)) == len({text.encode("utf-8", "replace") for text in texts})


def test_known_texts_are_found_in_any_earlier_artifact_and_others_are_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, one = vectors_artifact(store, ["a", "b", "c"])
    second, two = vectors_artifact(store, ["c", "d", "e", "f"], parts=2)
    known = Known([first, second])
    assert len(known) == 7
    at = known.find(text_keys(["f", "nobody", "a", "d", "c"]))
    assert (at >= 0).tolist() == [True, False, True, True, True]
    np.testing.assert_array_equal(known.take(at[at >= 0], DIM), np.stack([two[3], one[0], two[1], one[2]]))
    assert (Known([]).find(text_keys(["a"])) == -1).all()


def test_a_damaged_earlier_artifact_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    good, values = vectors_artifact(store, ["a", "b", "c"])
    bad, _ = vectors_artifact(store, ["x", "y", "z", "u"])
    Path(bad.uri, entities_file(0)).write_bytes(b"short")
    known = Known([bad, good])
    assert "not reusing" in caplog.text
    np.testing.assert_array_equal(known.take(known.find(text_keys(["b"])), DIM), values[1:2])


@given(st.lists(st.integers(0, 20_000), min_size=1, max_size=12), st.integers(1, 50))
def test_units_cover_every_row_once_in_near_equal_chunks(sizes: list[int], relations: int) -> None:
    ends = np.cumsum(sizes)
    parts = [(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]
    units = plan_units(parts, relations)
    assert len({unit_name(unit) for unit in units}) == len(units)
    pieces = [piece for unit in units for piece in unit]
    assert len({piece.name for piece in pieces}) == len(pieces)
    assert sum(piece.part == RELATION_PART for piece in pieces) == 1
    for part, (start, end) in enumerate(parts):
        rows = sorted((p.first, p.first + p.count) for p in pieces if p.part == part)
        assert rows[0][0] == 0
        assert rows[-1][1] == end - start
        assert all(a[1] == b[0] for a, b in itertools.pairwise(rows))
    if sum(sizes) + 2 * relations <= 4096:
        assert len(units) == 1
    else:
        assert all(sum(piece.count for piece in unit) <= 4096 for unit in units)


def test_an_array_written_in_blocks_must_become_whole() -> None:
    stream = io.BytesIO()
    writer = NpyWriter(stream, 5, 3)
    values = np.arange(15, dtype=np.float16).reshape(5, 3)
    writer.write(values[:2])
    with pytest.raises(ValueError, match="3 rows were never written"):
        writer.close()
    with pytest.raises(ValueError, match="does not fit"):
        writer.write(values)
    writer.write(values[2:])
    writer.close()
    np.testing.assert_array_equal(np.load(io.BytesIO(stream.getvalue())), values)
