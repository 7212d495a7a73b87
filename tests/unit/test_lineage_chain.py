"""The chain from an artifact to its input files.

python3 -m pytest tests/unit/test_lineage_chain.py
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from kgray.artifact import Artifact, Recipe, Store
from kgray.errors import ArtifactNotFoundError
from kgray.lineage.chain import render, trace


def build(store: Store, kind: str, *inputs: object, **config: object) -> Artifact:
    sources = tuple(i.source if isinstance(i, Artifact) else i for i in inputs)
    recipe = Recipe(kind, 1, sources, config)  # type: ignore[arg-type]
    return store.build(recipe, lambda draft: draft.write_json("content.json", config) or {"rows": 3}).artifact


@pytest.fixture
def chain(tmp_path: Path) -> dict[str, object]:
    """model <- (graph <- two files, vectors <- graph), each a folder of a store."""
    files = [tmp_path / "train.tsv", tmp_path / "entities.tsv"]
    for n, file in enumerate(files):
        file.write_text(f"a\tr{n}\tb\n")
    store = Store(tmp_path / "store")
    graph = build(store, "graph", *store.hash_files([str(f) for f in files]))
    vectors = build(store, "vectors", graph)
    model = build(store, "model", graph, vectors)
    return {"store": store, "files": files, "graph": graph, "vectors": vectors, "model": model}


def test_the_chain_of_a_model_ends_at_the_sha256_of_every_input_file(chain):
    node = trace(chain["model"].version, [chain["store"]], verify=True)
    assert {(n.uri, n.version) for n in node.files()} == {
        (str(f), hashlib.sha256(f.read_bytes()).hexdigest()) for f in chain["files"]
    }
    assert [n.kind for n in node.walk()] == ["model", "graph", "file", "file", "vectors"]
    assert all(n.checked and n.problem is None for n in node.walk())


def test_the_tree_shows_every_hash_and_shows_shared_inputs_once(chain):
    text = render(trace(chain["model"].uri, []))
    for file in chain["files"]:
        assert hashlib.sha256(file.read_bytes()).hexdigest() in text
    assert text.count("train.tsv") == 1
    assert f"graph {chain['graph'].version}  (as above)" in text
    assert "rows 3" in text


@pytest.mark.parametrize("how", ["uri", "version", "beginning", "kind"])
def test_an_artifact_is_found_by(chain, how):
    model = chain["model"]
    target = {
        "uri": model.uri,
        "version": model.version,
        "beginning": model.version[:8],
        "kind": f"model/{model.version[:4]}",
    }[how]
    assert trace(target, [chain["store"]]).version == model.version


def test_an_input_file_that_changed_is_named_with_its_new_hash(chain):
    chain["files"][0].write_text("something else\n")
    node = trace(chain["model"].version, [chain["store"]], verify=True)
    (bad,) = [n for n in node.walk() if n.problem]
    assert bad.uri == str(chain["files"][0])
    assert hashlib.sha256(b"something else\n").hexdigest() in str(bad.problem)
    assert "PROBLEM" in render(node)


def test_without_verify_input_files_are_not_read(chain):
    for file in chain["files"]:
        file.unlink()
    assert not [n for n in trace(chain["model"].version, [chain["store"]]).walk() if n.problem]
    gone = trace(chain["model"].version, [chain["store"]], verify=True)
    assert [n.problem for n in gone.files()] == ["is gone", "is gone"]


def test_a_damaged_artifact_in_the_chain_is_shown_not_raised(chain):
    Path(chain["vectors"].uri, "content.json").write_text("{")
    node = trace(chain["model"].version, [chain["store"]])
    assert ["content.json" in str(n.problem) for n in node.walk() if n.problem] == [True]


def test_an_input_that_moved_is_found_in_the_store_and_one_that_is_gone_is_said(chain, tmp_path):
    moved = tmp_path / "elsewhere"
    Path(chain["store"].root).rename(moved)
    node = trace(chain["model"].version, [Store(moved)])
    assert not [n for n in node.walk() if n.problem]
    Path(moved, "vectors", chain["vectors"].version).rename(tmp_path / "away")
    (lost,) = [n for n in trace(chain["model"].version, [Store(moved)]).walk() if n.problem]
    assert (lost.kind, lost.version) == ("vectors", chain["vectors"].version)


@pytest.mark.parametrize("target", ["0000000000000000", "mod", "model/zzzz", "a/b/c", ""])
def test_a_target_that_is_nothing_is_one_message(chain, target):
    with pytest.raises(ArtifactNotFoundError, match="no artifact"):
        trace(target, [chain["store"]])
