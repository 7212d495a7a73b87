"""The training graph cut by partition: what the rows of one partition answer.

The artifact of kind ``shards`` holds a folder a partition; :mod:`kgray.graph.shard_build` writes it. A shard owns the
entities of its partition: their incoming edges, the training triples they are the head of, and the known answers to
queries that name them. It never draws anything: it is asked for rows, and for positions in rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kgray.artifact import Artifact
from kgray.errors import ArtifactError
from kgray.graph.filter_index import KeyedRows, only
from kgray.graph.members import Members
from kgray.graph.neighbours import Edges, Int64, Ints, NeighbourIndex, row_positions

KIND = "shards"
FORMAT = 1
LAYOUT = "layout.json"
DEGREES = "degrees.npy"
_ARRAYS = (
    "offsets", "sources", "relations", "triples", "facts", "known_keys", "known_offsets", "known_values",
)  # fmt: skip


def shard_folder(part: int) -> str:
    """Where in the artifact a partition's arrays lie."""
    return f"part-{part:05d}"


@dataclass(frozen=True)
class Layout:
    """How a graph is cut. P partitions; num_entities N, num_relations R.

    entities: (P + 1,) int64, partition p owns ids ``entities[p]:entities[p + 1]``. facts: (P + 1,) int64, the same of
    positions of training triples, those whose head it owns. version: of the graph. undirected: whether a fact holds
    both ways round.
    """

    num_entities: int
    num_relations: int
    entities: Int64
    facts: Int64
    version: str
    undirected: bool = False

    @property
    def parts(self) -> int:
        return len(self.entities) - 1

    @property
    def num_triples(self) -> int:
        return int(self.facts[-1])

    def owner(self, nodes: Int64) -> Int64:
        """(n,) partition of each entity."""
        return np.searchsorted(self.entities, nodes, side="right") - 1

    def owner_of_triple(self, positions: Int64) -> Int64:
        """(n,) partition that holds the training triple at each position."""
        return np.searchsorted(self.facts, positions, side="right") - 1

    def to_json(self) -> dict[str, Any]:
        return {
            "entities": self.entities.tolist(),
            "facts": self.facts.tolist(),
            "relations": self.num_relations,
            "version": self.version,
            "undirected": self.undirected,
        }

    @classmethod
    def read(cls, artifact: Artifact) -> Layout:
        """Of a ``shards`` artifact; raises ArtifactError when it is of another kind."""
        if artifact.kind != KIND:
            raise ArtifactError(f"{artifact.uri} is a {artifact.kind}, not {KIND}")
        told = artifact.read_json(LAYOUT)
        entities, facts = (np.asarray(told[key], dtype=np.int64) for key in ("entities", "facts"))
        size = int(entities[-1]), int(told["relations"])
        return cls(*size, entities, facts, str(told["version"]), bool(told["undirected"]))


def mapped(path: Path) -> Ints:
    """An array, mapped where it has bytes to map; read-only."""
    try:
        array: Ints = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except ValueError:  # an empty one cannot be mapped
        array = np.load(path, allow_pickle=False)
    return array


class Shard:
    """One partition. Entities are given by their ids in the whole graph; what is returned is as narrow as on disk.

    arrays: ``offsets`` (n + 1,), ``sources``, ``relations``, ``triples`` (E,) as in :class:`NeighbourIndex`, ``facts``
    (f, 3), and ``known_*`` as in :class:`KeyedRows`, keyed by ``(entity - first) * 2R + relation``: the tails of a real
    relation's reciprocal, the heads of a real relation.
    """

    def __init__(self, layout: Layout, part: int, arrays: dict[str, Ints]) -> None:
        self.layout, self.part = layout, part
        self.first, self.first_fact = int(layout.entities[part]), int(layout.facts[part])
        self.facts_held = arrays["facts"]
        self.index = NeighbourIndex(
            arrays["offsets"], arrays["sources"], arrays["relations"], arrays["triples"], layout.num_triples
        )
        self.known_rows = KeyedRows(arrays["known_keys"], arrays["known_offsets"], arrays["known_values"])
        entities, facts = (int(np.diff(spans)[part]) for spans in (layout.entities, layout.facts))
        if self.index.num_entities != entities or self.facts_held.shape != (facts, 3):
            raise ArtifactError(
                f"partition {part} of graph {layout.version} holds {self.index.num_entities} entities and "
                f"{len(self.facts_held)} triples instead of {entities} and {facts}"
            )

    @classmethod
    def open(cls, artifact: Artifact, part: int) -> Shard:
        """Map a partition's arrays after comparing their hashes; raises ArtifactError naming what is damaged."""
        folder = shard_folder(part)
        artifact.verify(hashes=True, prefix=folder + "/")
        place = artifact.local_path(folder)
        return cls(Layout.read(artifact), part, {name: mapped(place / f"{name}.npy") for name in _ARRAYS})

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        index, known = self.index, self.known_rows
        held = (index.offsets, index.sources, index.relations, index.triples, self.facts_held)
        return sum(array.nbytes for array in (*held, known.keys, known.offsets, known.values))

    def edges(self, whole: Ints, hubs: Ints, drawn: Ints) -> Edges:
        """See :class:`MessageIndex`; all entities must be its own."""
        return self.index.edges(self._local(whole), self._local(hubs), drawn.astype(np.int64))

    def facts(self, positions: Ints) -> Ints:
        """(n, 3) training triples at (n,) positions, its own."""
        return self.facts_held[positions.astype(np.int64) - self.first_fact]

    def known(self, entities: Ints, relations: Ints, among: Ints | None) -> tuple[Ints, Ints]:
        """Entities that an edge of a relation (0..2R-1) comes from, for (n,) entities: row and entity, both ascending.
        among: the only ones wanted."""
        keys = self._local(entities) * (2 * self.layout.num_relations) + relations.astype(np.int64)
        rows, found = only(self.known_rows.lookup(keys), None if among is None else Members(among))
        return rows.astype(np.int32), found.astype(self.known_rows.values.dtype)

    def pairs(self, entities: Ints, others: Ints) -> tuple[Ints, Ints, Ints]:
        """Edges into each of (n,) entities from the one beside it: row, relation (0..2R-1), triple."""
        keys = self._local(entities) * self.layout.num_entities + others.astype(np.int64)
        rows, places = self._by_source.lookup(keys)
        return rows.astype(np.int32), self.index.relations[places], self.index.triples[places]

    @cached_property
    def _by_source(self) -> KeyedRows:
        """Places of edges by (entity, source); made when first asked for."""
        index = self.index
        owner = np.repeat(np.arange(index.num_entities), index.degrees)
        return KeyedRows.build(
            owner * self.layout.num_entities + index.sources, np.arange(len(owner)), len(owner)
        )

    def _local(self, entities: Ints) -> Int64:
        return entities.astype(np.int64) - self.first


@dataclass(frozen=True)
class Rows:
    """Complete rows of some entities, copied. nodes: (n,) int64 ascending; offsets (n + 1,); edges as stored."""

    nodes: Int64
    offsets: Int64
    edges: Edges

    @classmethod
    def none(cls) -> Rows:
        empty = np.empty(0, dtype=np.int64)
        return cls(empty, np.zeros(1, dtype=np.int64), Edges(empty, empty, empty))

    def slots(self, nodes: Int64) -> Int64:
        """(m,) position of each entity among the rows, -1 where it is not there."""
        if not len(self.nodes):
            return np.full(len(nodes), -1, dtype=np.int64)
        place = np.minimum(np.searchsorted(self.nodes, nodes), len(self.nodes) - 1)
        return np.where(self.nodes[place] == nodes, place, -1)

    def take(self, whole: Int64, hubs: Int64, drawn: Int64) -> Edges:
        """As :meth:`Shard.edges`, by slot."""
        places = row_positions(self.offsets[whole], self.offsets[whole + 1] - self.offsets[whole])
        if len(hubs):
            places = np.concatenate([places, (drawn + self.offsets[hubs][:, None]).ravel()])
        return Edges(*(part.take(places) for part in self.edges))

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.nodes, self.offsets, *self.edges))
