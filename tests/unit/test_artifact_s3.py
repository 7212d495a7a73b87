"""Artifacts on S3 (moto inside this process), through pyarrow, set up from AWS's own variables."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from kgray.artifact import Artifact, Draft, Recipe, Store
from kgray.artifact.filesystem import list_files, resolve, write_bytes
from kgray.errors import ArtifactError, ArtifactNotFoundError, DataError

RECIPE = Recipe("graph", 1, (), {"a": 1})


def make(draft: Draft) -> dict[str, int]:
    draft = pickle.loads(pickle.dumps(draft))
    for part in range(2):
        draft.write_table(f"parts/part-{part:05d}.parquet", pa.table({"id": [part]}))
    draft.write_json("audit.json", {"ok": True})
    return {"rows": 2}


def names(uri: str) -> list[str]:
    return sorted(list_files(*resolve(uri)))


def test_build_read_and_damage(s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KGRAY_CACHE", str(tmp_path / "cache"))
    store = Store(s3_root)
    assert store.find(RECIPE) is None
    assert store.list() == []

    def with_folder(draft: Draft) -> dict[str, int]:
        (draft.local_dir() / "deep").mkdir()
        (draft.local_dir() / "deep" / "weights.bin").write_bytes(b"12345")
        return make(draft)

    built = store.build(RECIPE, with_folder)
    artifact = built.artifact
    assert not built.up_to_date
    assert artifact.uri.startswith(f"{s3_root}/graph/{RECIPE.version}.")
    assert artifact.files() == [
        "audit.json", "deep/weights.bin", "parts/part-00000.parquet", "parts/part-00001.parquet"
    ]  # fmt: skip
    assert names(artifact.uri) == sorted([*artifact.files(), "manifest.json"])
    again = store.build(RECIPE, with_folder)
    assert again.up_to_date
    assert again.artifact.uri == artifact.uri
    assert store.get(artifact.version[:8]).uri == artifact.uri
    assert store.get(artifact.uri).version == artifact.version
    assert [a.uri for a in store.list()] == [artifact.uri]
    artifact = pickle.loads(pickle.dumps(artifact))
    assert artifact.read_table("parts")["id"].to_pylist() == [0, 1]
    assert artifact.read_json("audit.json") == {"ok": True}
    artifact.verify(hashes=True)

    local = artifact.local_path("deep/weights.bin")
    assert local.read_bytes() == b"12345"
    assert local.is_relative_to(tmp_path)
    folder = artifact.local_path("parts")
    assert sorted(p.name for p in folder.iterdir()) == ["part-00000.parquet", "part-00001.parquet"]
    local.write_bytes(b"123")  # a broken copy is fetched anew
    assert artifact.local_path("deep/weights.bin").read_bytes() == b"12345"

    filesystem, path = resolve(artifact.uri)
    write_bytes(filesystem, f"{path}/deep/weights.bin", b"12346")
    with pytest.raises(ArtifactError, match=r"deep/weights\.bin has changed"):
        artifact.verify(hashes=True)
    local.unlink()
    with pytest.raises(ArtifactError, match="has changed since"):
        artifact.local_path("deep/weights.bin")
    write_bytes(filesystem, f"{path}/deep/weights.bin", b"1")
    with pytest.raises(ArtifactError, match=r"deep/weights\.bin has 1 bytes instead of 5"):
        store.find(RECIPE)


def test_failed_make_leaves_nothing(s3_root: str):
    store = Store(s3_root)

    def fail(draft: Draft) -> None:
        make(draft)
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        store.build(RECIPE, fail)
    assert names(s3_root) == []
    assert store.list() == []


def test_concurrent_builders_do_not_mix(s3_root: str):
    store, barrier, results = Store(s3_root), threading.Barrier(3), []

    def both(draft: Draft) -> None:
        draft.write_json("who.json", draft.uri)
        barrier.wait(20)
        draft.write_json("again.json", draft.uri)

    threads = [threading.Thread(target=lambda: results.append(store.build(RECIPE, both))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for built in results:  # what was handed out stays whole, and is of one writer
        built.artifact.verify(hashes=True)
        assert built.artifact.read_json("who.json") == built.artifact.read_json("again.json") == built.artifact.uri
    assert store.build(RECIPE, both).up_to_date
    assert {a.uri for a in store.list()} >= {built.artifact.uri for built in results}


KILLED = """
import sys, time
from kgray.artifact import *
def make(draft):
    draft.write_bytes("big.bin", bytes(1000))
    print("now", flush=True); time.sleep(60)
Store(sys.argv[1]).build(Recipe("graph", 1, (), {"a": 1}), make)
"""


def test_kill_leaves_nothing_visible_and_is_cleaned(s3_root: str):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, s3_root], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "now"
    store = Store(s3_root)
    assert store.find(RECIPE) is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert any(name.endswith("big.bin") for name in names(s3_root))
    assert store.list() == []
    with pytest.raises(ArtifactNotFoundError):
        store.get(RECIPE.version)
    store.build(RECIPE, make)
    assert not any(name.endswith(("big.bin", "_draft.json")) for name in names(s3_root))


def test_hash_files_and_scratch(s3_root: str, tmp_path: Path):
    store = Store(s3_root)
    filesystem, path = resolve(s3_root)
    write_bytes(filesystem, f"{path}/in/a.txt", b"hello")
    (tmp_path / "b.txt").write_bytes(b"hello")
    remote, local = store.hash_files([f"{s3_root}/in/a.txt", str(tmp_path / "b.txt")])
    assert remote.version == local.version
    assert remote.uri == f"{s3_root}/in/a.txt"
    with pytest.raises(DataError, match="no such file"):
        store.hash_files([f"{s3_root}/in/none.txt"])
    uri = store.scratch("train-x")
    assert uri == f"{s3_root}/runs/train-x"
    write_bytes(filesystem, f"{path}/runs/train-x/c", b"1")
    store.drop_scratch("train-x")
    store.drop_scratch("train-x")
    assert not any("runs/" in name for name in names(s3_root))


def test_artifacts_through_fsspec(tmp_path: Path):
    """Whatever fsspec speaks and pyarrow does not: here its in-memory file system."""
    store = Store("memory://kgray-test/artifacts")
    artifact = store.build(RECIPE, make).artifact
    assert store.build(RECIPE, make).up_to_date
    assert Artifact.load(artifact.uri).read_table("parts")["id"].to_pylist() == [0, 1]
    artifact.verify(hashes=True)
