"""Writing the ``shards`` artifact: a shuffle of training edges to the partitions of their ends, by Ray tasks.

A task a partition reads its triples and sends each edge to the owner of its tail; a task a partition then sorts what it
got, and the edges into its own heads, into rows. No task holds more than a partition and what is sent to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np

from kgray.artifact import Artifact, Draft, Recipe, Store
from kgray.data.tasks import fetch, in_process, run_all, start
from kgray.errors import ArtifactError
from kgray.graph.filter_index import KeyedRows
from kgray.graph.neighbours import Int64, Ints, narrow
from kgray.graph.shard import DEGREES, FORMAT, KIND, LAYOUT, Layout, shard_folder

SMALL = 1_000_000
"""Training triples that one task shuffles alone: more tasks would take longer to start than to help."""


def shards_recipe(graph: Artifact) -> Recipe:
    """Depends on the graph alone, which its partitions are part of."""
    return Recipe(KIND, FORMAT, (graph.source,), {})


def build_shards(store: Store, graph: Artifact) -> Artifact:
    """The shards of a graph, written within a Ray session where they are not there yet."""

    def make(draft: Draft) -> dict[str, Any]:
        if int(graph.counts.get("triples_train", SMALL + 1)) > SMALL:
            return write_shards(draft, graph)
        return run_all("shards", in_process, [(write_shards, draft, graph)])[0]  # type: ignore[no-any-return]

    return store.build(shards_recipe(graph), make).artifact


def write_shards(draft: Draft, graph: Artifact) -> dict[str, Any]:
    """All files of the artifact. Raises ArtifactError for a graph whose files do not follow its partitions."""
    layout = read_layout(graph)
    parts = range(layout.parts)
    sent = start("cut edges", cut_edges, [(graph, layout, p) for p in parts], layout.parts)
    if layout.parts == 1:
        sent = [[one] for one in sent]
    arguments = [(draft, graph, layout, q, [sent[p][q] for p in parts]) for q in parts]
    edges = fetch("sort edges", start("sort edges", write_shard, arguments))
    run_all("join degrees", join_degrees, [(draft, layout)])
    draft.write_json(LAYOUT, layout.to_json())
    return {"entities": layout.num_entities, "triples": layout.num_triples, "most_edges": max(edges)}


def read_layout(graph: Artifact) -> Layout:
    """How a ``graph`` artifact is cut; reads the sizes of its files only."""
    import pyarrow.parquet as pq

    ranges = graph.read_json("partitions.json")["entities"]
    files = graph.parquet_files("triples/train")
    if len(files) != len(ranges):
        raise ArtifactError(f"{graph.uri} has {len(files)} files of training triples for {len(ranges)} partitions")
    rows = []
    for name in files:
        with graph.open(name) as stream:
            rows.append(pq.read_metadata(stream).num_rows)
    entities = np.asarray([0, *(end for _, end in ranges)], dtype=np.int64)
    relations = int(graph.read_table("relations.parquet", columns=["id"]).num_rows)
    facts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
    undirected = bool(graph.counts.get("undirected", 0))
    return Layout(int(entities[-1]), relations, entities, facts, graph.version, undirected)


def cut_edges(graph: Artifact, layout: Layout, part: int) -> list[Ints] | Ints:
    """The triples of a partition by the owner of their tail: (n, 4) of tail, head, relation, position, a table each."""
    facts = _facts(graph, layout, part)
    owner = layout.owner(facts[:, 2])
    order = np.argsort(owner, kind="stable")
    table = np.column_stack([facts[:, [2, 0, 1]], np.arange(layout.facts[part], layout.facts[part + 1])])[order]
    kind = narrow(max(layout.num_entities, layout.num_relations, layout.num_triples))
    cuts = np.searchsorted(owner[order], np.arange(1, layout.parts))
    tables = [np.ascontiguousarray(one) for one in np.split(table.astype(kind), cuts)]
    return tables if layout.parts > 1 else tables[0]


def write_shard(
    draft: Draft, graph: Artifact, layout: Layout, part: int, arrived: Sequence[Ints]
) -> int:
    """Write a partition's arrays; arrived: what each partition sent it, in order. Returns its number of edges.

    A row holds the edges of triples its entity is the tail of, then those it is the head of, each by position: the
    order of :meth:`NeighbourIndex.build`.
    """
    facts = _facts(graph, layout, part)
    first, last = (int(layout.entities[part + i]) for i in range(2))
    positions = np.arange(layout.facts[part], layout.facts[part + 1])
    own = np.column_stack([facts[:, 0], facts[:, 2], facts[:, 1] + layout.num_relations, positions])
    table = np.concatenate([*(one.astype(np.int64) for one in arrived), own])
    table = table[np.argsort(table[:, 0], kind="stable")]
    owner, sources, relations, triples = table.T
    offsets = np.zeros(last - first + 1, dtype=np.int64)
    np.cumsum(np.bincount(owner - first, minlength=last - first), out=offsets[1:])
    known = _known(owner - first, sources, relations, layout)
    kinds = [layout.num_entities, 2 * layout.num_relations, layout.num_triples]
    columns = zip(("sources", "relations", "triples"), (sources, relations, triples), kinds, strict=True)
    arrays = {name: column.astype(narrow(kind)) for name, column, kind in columns}
    facts_kind = narrow(max(layout.num_entities, layout.num_relations))
    arrays |= {"offsets": offsets, "facts": facts.astype(facts_kind)}
    arrays |= {"known_keys": known.keys, "known_offsets": known.offsets, "known_values": known.values}
    for name, array in arrays.items():
        _save(draft, f"{shard_folder(part)}/{name}.npy", array)
    return len(table)


def _known(owner: Int64, sources: Int64, relations: Int64, layout: Layout) -> KeyedRows:
    """See :class:`Shard`. In an undirected graph a fact answers both ways round."""
    wide = 2 * layout.num_relations
    if layout.undirected:
        owner, sources = np.tile(owner, 2), np.tile(sources, 2)
        relations = np.concatenate([relations, (relations + layout.num_relations) % wide])
    return KeyedRows.build(owner * wide + relations, sources, layout.num_entities)


def join_degrees(draft: Draft, layout: Layout) -> None:
    """Write the degrees of all entities as one array, which every client maps."""
    degrees = []
    for part in range(layout.parts):
        with draft.fs.open_input_stream(draft.path_of(f"{shard_folder(part)}/offsets.npy"), compression=None) as stream:
            degrees.append(np.diff(np.load(BytesIO(stream.read()), allow_pickle=False)))
    most = max(int(one.max(initial=0)) for one in degrees)
    _save(draft, DEGREES, np.concatenate(degrees).astype(narrow(most + 1)))


def _facts(graph: Artifact, layout: Layout, part: int) -> Int64:
    """(n, 3) int64 training triples of a partition, all of whose heads it must own."""
    name = graph.parquet_files("triples/train")[part]
    table = graph.read_table(name, columns=["head", "relation", "tail"])
    facts = np.stack([table[column].to_numpy().astype(np.int64) for column in ("head", "relation", "tail")], axis=1)
    low, high = layout.entities[part], layout.entities[part + 1]
    if len(facts) and not (low <= facts[:, 0].min() and facts[:, 0].max() < high):
        raise ArtifactError(f"{graph.uri_of(name)} holds a head outside its partition, entities {low}..{high - 1}")
    return facts


def _save(draft: Draft, name: str, array: Ints) -> None:
    with draft.open(name) as stream:
        np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
