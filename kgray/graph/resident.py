"""The whole training graph on one node: arrays in memory, or mapped from files that all workers of the node share.

The files are an artifact of kind ``resident`` in a store of the node's own, under KGRAY_CACHE (default
``~/.cache/kgray``), keyed by the graph's version. The first worker of a node writes them while the others wait; whoever
opens files that were there compares their hashes, and writes them anew where they are damaged. What is mapped lies in
the page cache once, however many workers read it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kgray.artifact import Artifact, Draft, Recipe, Store
from kgray.artifact.locks import exclusive
from kgray.errors import ArtifactError, ArtifactNotFoundError
from kgray.graph.filter_index import FilterIndex, KeyedRows
from kgray.graph.graph import Graph
from kgray.graph.neighbours import Int64, Ints, NeighbourIndex, narrow
from kgray.graph.shard import mapped
from kgray.graph.store import GraphStore

log = logging.getLogger(__name__)

FORMAT = 1
KIND = "resident"
UNUSED_DAYS = 14
"""After so many days without a reader, a graph's files are removed when another graph's are written."""

_INDEX = ("offsets", "sources", "relations", "triples")


class ResidentStore(GraphStore):
    """See the module's text. triples: (T, 3) int64; messages and known are made of the same."""

    triples: Int64
    messages: NeighbourIndex
    known: FilterIndex

    def __init__(self, triples: Int64, messages: NeighbourIndex, known: FilterIndex) -> None:
        self.num_entities, self.num_relations = known.num_entities, known.num_relations
        self.triples, self.messages, self.known = triples, messages, known
        self._pairs: KeyedRows | None = None

    @classmethod
    def of(cls, graph: Graph) -> ResidentStore:
        """The training triples of a graph, indexed in memory."""
        return cls(graph.triples["train"], graph.message_index(), graph.known(["train"]))

    def same_pair(self, heads: Int64, tails: Int64) -> Int64:
        if self._pairs is None:
            keys = self._pair_keys(self.triples[:, 0], self.triples[:, 2])
            self._pairs = KeyedRows.build(keys, np.arange(len(keys)), len(keys))
        _, positions = self._pairs.lookup(np.unique(self._pair_keys(heads, tails)))
        return np.sort(positions)

    def _pair_keys(self, heads: Int64, tails: Int64) -> Int64:
        return np.minimum(heads, tails) * self.num_entities + np.maximum(heads, tails)


def open_resident(artifact: Artifact) -> ResidentStore:
    """The training graph of a ``graph`` artifact, mapped; its files are written first where this node lacks them.

    Raises StorageError for a full disk, ArtifactError for a graph that is damaged itself.
    """
    return map_resident(_node_copy(artifact))


def map_resident(folder: Path) -> ResidentStore:
    """What :func:`write_resident` wrote into a folder, mapped."""
    arrays = {path.stem: mapped(path) for path in sorted(folder.glob("*.npy"))}
    index = {name: arrays[f"index.{name}"] for name in _INDEX}
    messages = NeighbourIndex(**index, num_triples=len(arrays["triples"]))
    known = FilterIndex.from_arrays({k.removeprefix("known."): v for k, v in arrays.items() if k.startswith("known.")})
    return ResidentStore(arrays["triples"], messages, known)


def node_root() -> Path:
    """Where this node keeps its own copies."""
    return Path(os.environ.get("KGRAY_CACHE") or Path.home() / ".cache" / "kgray") / "node"


def _node_copy(artifact: Artifact) -> Path:
    store = Store(node_root())
    recipe = Recipe(KIND, FORMAT, (artifact.source,), {})
    started = time.monotonic()

    def make(draft: Draft) -> dict[str, Any]:
        log.info("graph %s: writing what the workers of this node map into memory", artifact.version)
        return write_resident(draft, Graph.load(artifact))

    try:
        built = store.build(recipe, make)
        if built.up_to_date:
            built.artifact.verify(hashes=True)
    except ArtifactError as error:
        if not Path(store.root, KIND, recipe.version).exists():
            raise
        log.warning("%s: it is written anew", error)
        _drop(store, recipe)
        built = store.build(recipe, make)
    folder = built.artifact.local_path("")
    with contextlib.suppress(PermissionError):  # a cache that another user owns
        os.utime(folder)  # tells the cleaning that it is in use
    if not built.up_to_date:
        size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
        seconds = time.monotonic() - started
        log.info("graph %s: %.1f MiB for this node in %.1f s", artifact.version, size, seconds)
        _clean(folder)
    return folder


def write_resident(draft: Draft, graph: Graph) -> dict[str, Any]:
    """Write the files, one array after another, so that no two tables are held that need not be."""
    triples = graph.triples["train"]
    _save(draft, "triples", triples)
    index = graph.message_index()
    kinds = {"sources": graph.num_entities, "relations": 2 * graph.num_relations, "triples": len(triples)}
    for name in _INDEX:
        array = getattr(index, name)
        _save(draft, f"index.{name}", array.astype(narrow(kinds[name])) if name in kinds else array)
    del index
    for name, array in graph.known(["train"]).to_arrays().items():
        _save(draft, f"known.{name}", array)
    return {"entities": graph.num_entities, "relations": graph.num_relations, "triples": len(triples)}


def _save(draft: Draft, name: str, array: Ints) -> None:
    np.save(draft.local_dir() / f"{name}.npy", array, allow_pickle=False)


def _drop(store: Store, recipe: Recipe) -> None:
    """Remove a damaged copy, unless somebody else has written it anew meanwhile."""
    folder = Path(store.root, KIND, recipe.version)
    with exclusive(Path(store.root) / f"{recipe.version}.dropping", f"{KIND} {recipe.version}"):
        try:
            Artifact.load(str(folder)).verify(hashes=True)
        except ArtifactNotFoundError:
            return
        except ArtifactError:
            gone = folder.with_name(f".{folder.name}.damaged")
            shutil.rmtree(gone, ignore_errors=True)
            folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def _clean(used: Path) -> None:
    """Remove the copies nobody has opened for long. Who maps one keeps its bytes until it lets go."""
    for folder in _folders(used.parent):
        with contextlib.suppress(FileNotFoundError):  # another process cleans as well
            if folder != used and time.time() - folder.stat().st_mtime > UNUSED_DAYS * 86400:
                log.info("removing %s, not used for %d days", folder, UNUSED_DAYS)
                shutil.rmtree(folder, ignore_errors=True)


def _folders(parent: Path) -> Iterator[Path]:
    return (one for one in parent.iterdir() if one.is_dir())
