"""The embed job on a real Ray: files, equality with plain encoding, reuse, resume, errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_graphs import UMLS, graph_artifact, table_rows, umls

from kgray.artifact import Artifact, Draft, Store
from kgray.errors import ConfigError, EncoderError
from kgray.text import pieces
from kgray.text.config import TextConfig
from kgray.text.embed import _earlier, _finished, _write_index, embed, embed_recipe
from kgray.text.encoder import TextEncoder, find_encoder
from kgray.text.pieces import RELATION_PART, join_part, plan_units, unit_name
from kgray.text.template import entity_texts, relation_texts
from kgray.text.vectors import load_vectors
from kgray.text.worker import EmbedTask, EmbedUnits

TEXT = TextConfig(offline=True, max_length=32)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(find_encoder(TEXT).path, max_length=32)


def build(store: Store, graph: Artifact, text: TextConfig = TEXT) -> Artifact:
    return store.build(
        embed_recipe(store, text, graph), lambda draft: embed(draft, text, graph, store)
    ).artifact


def cosines(left: Any, right: Any) -> Any:
    a, b = np.asarray(left, np.float32), np.asarray(right, np.float32)
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def test_umls_is_embedded_in_id_order_by_one_unit_and_reused_afterwards(
    ray_cluster: object, encoder: TextEncoder, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    graph = umls(store)
    artifact = build(store, graph)
    artifact.verify(hashes=True)
    assert artifact.files() == sorted(
        [f"entities-0000{p}.npy" for p in range(4)]
        + [f"keys-0000{p}.parquet" for p in range(4)]
        + ["index.json", "relations.npy"]
    )
    counts = artifact.counts
    assert (counts["entities"], counts["relations"], counts["dim"], counts["reused"]) == (135, 46, 384, 0)
    assert counts["truncated"] > 50
    vectors = load_vectors(artifact)
    columns: dict[str, list[str | None]] = {
        key: [row[key] for row in table_rows(UMLS / "entities.tsv")]
        for key in ("external_id", "name", "description")
    }
    expected = encoder.encode(entity_texts(columns, TEXT.template)).vectors
    assert cosines(vectors.entities, expected).min() > 0.9999
    names: dict[str, list[str | None]] = {
        key: [row[column] for row in table_rows(UMLS / "relations.tsv")]
        for key, column in (("name", "external_id"), ("description", "description"))
    }
    assert (
        cosines(vectors.relations, encoder.encode(relation_texts(names, TEXT.template)).vectors).min()
        > 0.9999
    )

    # The same entities in other partitions, and two new ones: only those are encoded.
    rows = table_rows(UMLS / "entities.tsv")
    more = graph_artifact(
        store,
        [{"external_id": "new", "description": "not seen before"}, *rows[::-1], {"external_id": "newer"}],
        [("isa", "")],
        parts=3,
    )
    again = build(store, more)
    assert again.counts["reused"] == 135
    assert again.counts["texts"] == 4
    np.testing.assert_array_equal(load_vectors(again).entities[1:136], vectors.entities[::-1])
    assert [one.version for one in _earlier(store, embed_recipe(store, TEXT, more))] == [
        again.version,
        artifact.version,
    ]
    for change in ({"normalise": False}, {"max_length": 31}, {"pooling": "cls"}, {"precision": "float32"}):
        other = embed_recipe(store, replace(TEXT, **change), more)
        assert (
            _earlier(store, other) == ()
            or other.config["precision"] == again.config["precision"] == "float32"
        )


def test_repeated_and_empty_texts_and_other_columns(ray_cluster: object, tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = [
        {"external_id": "a", "label": "same"},
        {"external_id": "b", "label": ""},
        {"external_id": "c", "label": "same"},
        {"external_id": "d", "label": "other"},
        {"external_id": "e", "label": " same  "},
    ]
    artifact = build(store, graph_artifact(store, rows, parts=3), replace(TEXT, template="{label}"))
    vectors = load_vectors(artifact).entities
    assert not vectors[1].any()
    np.testing.assert_array_equal(vectors[0], vectors[2])
    np.testing.assert_array_equal(vectors[0], vectors[4])
    assert (vectors[0] != vectors[3]).any()
    counts = artifact.counts
    assert (counts["empty"], counts["repeated"]) == (1, 2)


def test_a_graph_of_many_units_is_joined_and_an_interrupted_run_goes_on(
    ray_cluster: object, encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "SMALL_UNIT", 400)  # so that a graph of a second's work has many units
    store = Store(tmp_path)
    rows = [{"external_id": f"e{n}", "name": f"thing {n % 300}"} for n in range(900)]
    graph = graph_artifact(store, rows, [("isa", ""), ("likes", "")], parts=2, row_group=70)
    recipe = embed_recipe(store, TEXT, graph)
    scratch = Draft(store.scratch(f"embed-{recipe.version}"))

    class StoppedError(Exception):
        """Stands for whatever ends a driver between the chunks and their joining."""

    def stopped(draft: Draft) -> dict[str, Any]:
        embed(draft, TEXT, graph, store)
        raise StoppedError

    units = plan_units([(0, 450), (450, 900)], 2)
    assert len(units) > 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kgray.text.embed._join", lambda *_: (_ for _ in ()).throw(StoppedError()))
        with pytest.raises(StoppedError):
            store.build(recipe, stopped)
    assert store.find(recipe) is None
    assert set(_finished(scratch, units)) == {unit_name(unit) for unit in units}
    lost = units[-1]
    Path(scratch.uri, unit_name(lost)).unlink()
    kept = {
        piece.name: Path(scratch.uri, piece.name).stat().st_mtime_ns for unit in units[:-1] for piece in unit
    }
    seen: dict[str, int] = {}

    def resumed(draft: Draft) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Store,
                "drop_scratch",
                lambda *_: seen.update({name: Path(scratch.uri, name).stat().st_mtime_ns for name in kept}),
            )
            return embed(draft, TEXT, graph, store)

    artifact = store.build(recipe, resumed).artifact
    assert seen == kept
    assert artifact.files("entities") == ["entities-00000.npy", "entities-00001.npy"]
    vectors = load_vectors(artifact)
    assert vectors.entities.shape == (900, 384)
    chosen = np.array([0, 299, 300, 449, 450, 899])
    expected = encoder.encode([f"thing {n % 300}" for n in chosen]).vectors
    assert cosines(vectors.rows(chosen), expected).min() > 0.9999
    counts = artifact.counts
    assert counts["texts"] + counts["repeated"] + counts["reused"] == 904


def test_what_is_wrong_reaches_the_user_as_itself(ray_cluster: object, tmp_path: Path) -> None:
    store = Store(tmp_path)
    graph = graph_artifact(store, [{"external_id": "a"}, {"external_id": "b"}])
    with pytest.raises(ConfigError, match=r"text\.template.*columns of the entities.*description"):
        build(store, graph, replace(TEXT, template="{title}"))
    with pytest.raises(ConfigError, match=r"text\.max_length.*at most 512"):
        build(store, graph, replace(TEXT, max_length=513))
    with pytest.raises(ConfigError, match=r"text\.cpus_per_worker.*at most 4"):
        build(store, graph, replace(TEXT, cpus_per_worker=64))
    with pytest.raises(EncoderError, match="no directory"):
        build(store, graph, replace(TEXT, encoder="/no/such/encoder"))
    assert store.list("vectors") == []


def test_workers_write_to_object_storage_too(
    s3_root: str, encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What actors and joining tasks do, in this process: only it knows the address of the S3."""
    monkeypatch.setattr(pieces, "SMALL_UNIT", 30)
    monkeypatch.setenv("KGRAY_CACHE", str(tmp_path))
    store = Store(s3_root)
    rows = [{"external_id": f"e{n}", "description": f"number {n}"} for n in range(80)]
    graph = graph_artifact(store, rows, parts=2)
    recipe = embed_recipe(store, TEXT, graph)

    def make(draft: Draft) -> dict[str, Any]:
        scratch = Draft(store.scratch("embed-test"))
        units = plan_units([(0, 40), (40, 80)], 1)
        place = find_encoder(TEXT)
        task = EmbedTask(TEXT, place, "float32", "cpu", 1, graph, (), scratch, resumable=True)
        worker = EmbedUnits(task)
        for unit in units:
            worker.embed(unit)
        assert set(_finished(scratch, units)) == {unit_name(unit) for unit in units}
        for part in (RELATION_PART, 0, 1):
            chosen = [piece for unit in units for piece in unit if piece.part == part]
            join_part(draft, scratch, part, chosen, 384)
        store.drop_scratch("embed-test")
        _write_index(draft, TEXT, place, "float32", [(0, 40), (40, 80)], 1, 384)
        return {}

    vectors = load_vectors(store.build(recipe, make).artifact)
    expected = encoder.encode([f"e{n}: number {n}" for n in range(80)]).vectors
    assert cosines(vectors.entities, expected).min() > 0.999
    assert vectors.relations.shape == (2, 384)
