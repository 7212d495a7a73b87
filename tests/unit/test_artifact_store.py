"""Artifacts on a local disk: versions, publishing, damage, crashes, concurrent builders."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pyarrow as pa
import pytest

from kgray.artifact import Artifact, Draft, Recipe, Source, Store
from kgray.errors import ArtifactError, ArtifactNotFoundError, DataError, StorageError

RECIPE = Recipe("graph", 1, (Source("file", "ab" * 32, "/in.tsv"),), {"partitions": 2})


def make(draft: Draft) -> dict[str, int]:
    draft = pickle.loads(pickle.dumps(draft))  # as a Ray worker gets it
    for part in range(3):
        draft.write_table(f"parts/part-{part:05d}.parquet", pa.table({"id": [part, part + 10]}))
    draft.write_json("audit.json", {"ok": True})
    with draft.open_parquet("stream.parquet", pa.schema([("x", pa.int64())])) as writer:
        writer.write_table(pa.table({"x": [1]}))
        writer.write_table(pa.table({"x": [2]}))
    draft.write_bytes("plain.gz", b"not compressed, whatever its name says")
    (draft.local_dir() / "weights.bin").write_bytes(bytes(1000))
    return {"rows": 6}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def visible(store: Store) -> list[str]:
    """Everything under the root that is no cache."""
    root = Path(store.root)
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and ".cache" not in p.parts)


def test_build_then_up_to_date(store: Store):
    built = store.build(RECIPE, make)
    artifact = built.artifact
    assert not built.up_to_date
    assert artifact.files() == [
        "audit.json", "parts/part-00000.parquet", "parts/part-00001.parquet", "parts/part-00002.parquet",
        "plain.gz",
        "stream.parquet", "weights.bin",
    ]  # fmt: skip
    assert artifact.files("parts/") == artifact.files()[1:4]
    assert artifact.read_table("parts")["id"].to_pylist() == [0, 10, 1, 11, 2, 12]
    assert artifact.read_table("stream.parquet", columns=["x"])["x"].to_pylist() == [1, 2]
    assert artifact.read_json("audit.json") == {"ok": True}
    assert artifact.read_bytes("plain.gz") == Path(artifact.uri, "plain.gz").read_bytes()
    assert artifact.read_bytes("plain.gz").startswith(b"not compressed")
    assert artifact.local_path("parts") == Path(artifact.uri, "parts")
    assert artifact.counts == {"rows": 6}
    assert artifact.inputs == RECIPE.inputs
    assert artifact.config == {"partitions": 2}
    assert artifact.source == Source("graph", RECIPE.version, artifact.uri)
    assert (artifact.kind, artifact.version) == ("graph", RECIPE.version)
    manifest = artifact.manifest
    assert {"kind", "version", "inputs", "config", "code_version", "counts", "files", "created_at"} <= set(manifest)
    artifact.verify(hashes=True)

    def never(draft: Draft) -> None:
        raise AssertionError("built twice")

    again = store.build(RECIPE, never)
    assert again.up_to_date
    assert again.artifact.uri == artifact.uri
    assert not [name for name in visible(store) if name.startswith(".tmp")]
    assert pickle.loads(pickle.dumps(artifact)).manifest == manifest
    assert pickle.loads(pickle.dumps(store)).find(RECIPE) is not None


def test_version_depends_on_what_matters_only():
    def version(**changes):
        given = {
            "kind": "graph",
            "format": 1,
            "inputs": RECIPE.inputs,
            "config": {"a": 1, "b": [1, 2]},
        } | changes
        return Recipe(**given).version

    base = version()
    assert len(base) == 16
    assert version(config={"b": (1, 2), "a": 1}) == base
    assert version(inputs=(Source("file", "ab" * 32, "/elsewhere"),)) == base
    others = [
        version(kind="corpus"),
        version(format=2),
        version(inputs=()),
        version(config={"a": 1, "b": [2, 1]}),
        version(config={"a": True, "b": [1, 2]}),
        version(inputs=(Source("file", "cd" * 32, "/in.tsv"),)),
        version(inputs=(Source("graph", "ab" * 32, "/in.tsv"),)),
    ]
    assert len({base, *others}) == len(others) + 1
    code = "from kgray.artifact import *; print(Recipe('graph', 1, (), {'z': 0.1, 'a': 'é'}).version)"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1] != ""
    for bad in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises(ArtifactError, match="version"):
            _ = Recipe("graph", 1, (), bad).version
    for kind in ("runs", "Graph", "a/b", ".tmp", ""):
        with pytest.raises(ArtifactError):
            Recipe(kind, 1)


def test_get_and_list(store: Store):
    first = store.build(RECIPE, make).artifact
    second = store.build(Recipe("model", 1), lambda draft: draft.write_json("a.json", 1)).artifact
    assert [a.uri for a in store.list()] == [second.uri, first.uri]
    assert [a.uri for a in store.list("graph")] == [first.uri]
    assert store.list("nothing") == []
    assert store.get(first.version[:6]).uri == first.uri
    assert store.get(f"graph/{first.version}").uri == first.uri
    assert store.get(first.uri).uri == first.uri
    assert store.get(first.uri + "/").uri == first.uri
    assert store.get(f"file://{first.uri}").uri == first.uri
    for unknown in ("0000000", "abc", "model/" + first.version, str(store.root), "/none", ""):
        with pytest.raises(ArtifactNotFoundError):
            store.get(unknown)
    assert Store(Path(store.root) / "empty").list() == []
    assert Store(Path(store.root) / "empty").find(RECIPE) is None


def test_ambiguous_prefix_names_the_candidates(store: Store):
    for kind in ("graph", "model"):
        folder = Path(store.root, kind, f"abcd{kind}")
        folder.mkdir(parents=True)
        content = {"kind": kind, "version": f"abcd{kind}", "inputs": [], "files": [], "created_at": "2026"}
        (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactNotFoundError, match="may be any of graph/abcdgraph, model/abcdmodel"):
        store.get("abcd")


def test_failed_make_leaves_nothing(store: Store):
    def fail(draft: Draft) -> None:
        make(draft)
        raise ValueError("on purpose")

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            store.build(RECIPE, fail if error is ValueError else _interrupt)
    assert visible(store) == []
    assert store.find(RECIPE) is None
    with pytest.raises(ArtifactError, match="version"):
        store.build(RECIPE, lambda draft: {"loss": float("nan")})
    assert visible(store) == []


def _interrupt(draft: Draft) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", "", "a//b", "manifest.json", "."])
def test_paths_stay_inside(store: Store, name: str):
    with pytest.raises(ArtifactError):
        store.build(RECIPE, lambda draft: draft.write_bytes(name, b""))


def test_damage_is_found_and_named(store: Store):
    artifact = store.build(RECIPE, make).artifact
    weights = Path(artifact.uri, "weights.bin")
    weights.write_bytes(bytes(999) + b"\1")
    assert store.find(RECIPE) is not None
    with pytest.raises(ArtifactError, match=r"weights\.bin has changed"):
        artifact.verify(hashes=True)
    weights.write_bytes(bytes(999))
    for look in (store.find, lambda _: store.get(artifact.version), lambda _: artifact.open("weights.bin"),
                 lambda _: artifact.local_path("weights.bin"), lambda _: Artifact.load(artifact.uri),
                 lambda _: store.build(RECIPE, make)):  # fmt: skip
        with pytest.raises(ArtifactError, match=r"weights\.bin has 999 bytes instead of 1000"):
            look(RECIPE)
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"weights\.bin is missing"):
        store.find(RECIPE)
    (Path(artifact.uri) / "manifest.json").write_text('{"kind": "gra')
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        store.find(RECIPE)
    assert store.list() == []


def test_files_not_in_the_manifest_do_not_exist(store: Store):
    artifact = store.build(RECIPE, make).artifact
    Path(artifact.uri, "parts", "part-00009.parquet").write_bytes(b"junk")
    assert len(artifact.read_table("parts")) == 6
    for read in (artifact.open, artifact.read_bytes, artifact.read_table, artifact.local_path):
        with pytest.raises(ArtifactError, match="holds no other"):
            read("other")


def test_folder_without_manifest_does_not_exist(store: Store):
    folder = Path(store.root, "graph", RECIPE.version)
    folder.mkdir(parents=True)
    (folder / "old.bin").write_bytes(b"1")
    assert store.find(RECIPE) is None
    assert store.list() == []
    artifact = store.build(RECIPE, make).artifact
    assert "old.bin" not in {p.name for p in Path(artifact.uri).rglob("*")}


def test_second_builder_waits_and_uses_the_first(store: Store):
    started, calls = threading.Event(), []

    def slow(draft: Draft) -> None:
        calls.append(draft.uri)
        started.set()
        time.sleep(0.5)
        draft.write_json("a.json", len(calls))

    results = []
    threads = [threading.Thread(target=lambda: results.append(store.build(RECIPE, slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert sorted(built.up_to_date for built in results) == [False, True, True, True]
    with pytest.raises(ArtifactError, match="by this very thread"):
        store.build(Recipe("model", 1), lambda draft: store.build(Recipe("model", 1), make) and None)


def test_without_locks_the_first_to_finish_wins(store: Store, monkeypatch: pytest.MonkeyPatch):
    """As on a network file system that refuses locks."""
    import errno
    import fcntl

    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    barrier, results = threading.Barrier(3), []

    def both(draft: Draft) -> None:
        barrier.wait(10)
        draft.write_json("who.json", draft.uri)

    threads = [threading.Thread(target=lambda: results.append(store.build(RECIPE, both))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(built.up_to_date for built in results) == [False, True, True]
    found = store.find(RECIPE)
    assert found is not None
    found.verify(hashes=True)
    assert [name for name in visible(store) if name.startswith(".tmp/") and not name.endswith(".lock")] == []


_KILLED = """
import sys, time
from kgray.artifact import *
from kgray.artifact import store as module

def make(draft):
    draft.write_bytes("big.bin", bytes(1 << 20))
    if sys.argv[2] == "make":
        print("now", flush=True); time.sleep(60)
    return {}

if sys.argv[2] == "publish":
    real = module.new_manifest
    def stop(*given):
        print("now", flush=True); time.sleep(60)
    module.new_manifest = stop
if sys.argv[2] == "rename":
    def stop(path):
        print("now", flush=True); time.sleep(60)
    module._sync = stop
Store(sys.argv[1]).build(Recipe("graph", 1), make)
"""


@pytest.mark.parametrize("where", ["make", "publish", "rename"])
def test_kill_leaves_nothing_visible_and_is_cleaned(store: Store, where: str):
    process = subprocess.Popen([sys.executable, "-c", _KILLED, store.root, where], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "now"
    other = Recipe("model", 1)
    store.build(other, make)  # its cleaning leaves the draft of the living alone
    assert any(name.startswith(".tmp/graph-") and name.endswith("big.bin") for name in visible(store))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert store.find(Recipe("graph", 1)) is None
    assert [a.kind for a in store.list()] == ["model"]
    built = store.build(Recipe("graph", 1), make)
    assert not built.up_to_date
    assert not [name for name in visible(store) if name.startswith(".tmp")]
    assert list(Path(store.root, ".tmp").iterdir()) == []


def test_hash_files(store: Store, tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"hello")
    old = time.time() - 100
    os.utime(file, (old, old))
    (source,) = store.hash_files([str(file)])
    assert source == Source("file", "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", str(file))
    (entry,) = Path(store.root, ".cache", "sha256").iterdir()
    known = json.loads(entry.read_text())
    entry.write_text(json.dumps(known | {"sha256": "remembered"}))
    assert store.hash_files([str(file)])[0].version == "remembered"
    file.write_bytes(b"other")  # same size, new time
    assert store.hash_files([str(file)])[0].version != "remembered"
    entry.write_text("{broken")
    assert len(store.hash_files([str(file)])[0].version) == 64
    # Just changed: may change again within the clock's tick, so it is not remembered.
    file.write_bytes(b"hello")
    entry.unlink()
    store.hash_files([str(file)])
    assert not entry.exists()
    with pytest.raises(DataError, match="no such file: "):
        store.hash_files([str(file), str(tmp_path / "none.tsv")])
    with pytest.raises(DataError, match="is a folder"):
        store.hash_files([str(tmp_path)])


def test_scratch(store: Store):
    uri = store.scratch("train-abc")
    Path(uri, "checkpoint").write_bytes(b"1")
    assert store.scratch("train-abc") == uri
    assert Path(uri, "checkpoint").exists()
    assert store.list() == []
    store.drop_scratch("train-abc")
    store.drop_scratch("train-abc")
    assert not Path(uri).exists()
    with pytest.raises(ArtifactError):
        store.scratch("../x")


def test_memory_mapped_arrays(store: Store):
    array = numpy.arange(12, dtype=numpy.float16).reshape(3, 4)
    buffer = io.BytesIO()
    numpy.save(buffer, array)
    artifact = store.build(Recipe("vectors", 1), lambda d: d.write_bytes("v.npy", buffer.getvalue())).artifact
    mapped = numpy.load(artifact.local_path("v.npy"), mmap_mode="r")
    assert (mapped == array).all()


def test_refused_storage_is_one_line(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(StorageError) as caught:
        Store(blocked / "root").build(RECIPE, make)
    assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="cannot use the storage"):
        Store("nosuchscheme://bucket/x").find(RECIPE)


def test_import_is_light():
    heavy = ["ray", "torch", "mlflow", "pandas", "pydantic", "fsspec"]
    code = f"import sys, kgray.artifact; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
