"""The graph in memory, as read from a ``graph`` artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from kgray.artifact import Artifact
from kgray.errors import ArtifactError
from kgray.graph.filter_index import FilterIndex, KnownAnswers, Layered
from kgray.graph.neighbours import Int64, NeighbourIndex
from kgray.graph.store import GraphStore

SPLITS = ("train", "valid", "test")
PSEUDO = "pseudo"
"""Triples a model is asked for in training besides the training triples; nobody knows whether they are facts."""
SUPPORT = "support"
"""Facts of entities held out of training that are known when they are asked about; few graphs have any."""


@dataclass(frozen=True)
class Graph:
    """Triples by split and the names of what they are about.

    triples: for each split, support too, (n, 3) int64 of head, relation, tail.
    undirected: whether a fact holds both ways round; it stands here once, either way.
    held_out: whether entities are held out of training as a whole, be any of their facts support or not.
    entity_ids, entity_names: pyarrow string arrays of N entries in dense-id order; relations alike.
    store: where the training triples are looked up, if not here; see :meth:`for_training`.
    """

    num_entities: int
    num_relations: int
    triples: Mapping[str, Int64]
    entity_ids: pa.ChunkedArray = field(repr=False)
    entity_names: pa.ChunkedArray = field(repr=False)
    relation_ids: pa.ChunkedArray = field(repr=False)
    relation_names: pa.ChunkedArray = field(repr=False)
    version: str = ""
    undirected: bool = False
    held_out: bool = False
    store: GraphStore | None = None

    @classmethod
    def load(cls, artifact: Artifact) -> Graph:
        """Read a ``graph`` artifact; raises ArtifactError when it is of another kind or its ids are not dense."""
        if artifact.kind != "graph":
            raise ArtifactError(f"{artifact.uri} is a {artifact.kind}, not a graph")
        columns = ["id", "external_id", "name"]
        entities = artifact.read_table("entities", columns=columns)
        relations = artifact.read_table("relations.parquet", columns=columns)
        for what, table in (("entities", entities), ("relations", relations)):
            if not np.array_equal(table["id"].to_numpy(), np.arange(len(table))):
                raise ArtifactError(f"{artifact.uri}: the ids of {what} are not 0..{len(table) - 1} in order")
        return cls(
            num_entities=len(entities),
            num_relations=len(relations),
            triples=_read_triples(artifact, SPLITS),
            entity_ids=entities["external_id"],
            entity_names=entities["name"],
            relation_ids=relations["external_id"],
            relation_names=relations["name"],
            version=artifact.version,
            undirected=bool(artifact.counts.get("undirected", 0)),
            held_out=f"triples_{SUPPORT}" in artifact.counts,
        )

    @classmethod
    def for_training(cls, artifact: Artifact, store: GraphStore) -> Graph:
        """What a training worker needs: training triples in a store, validation and support triples here, and neither
        names nor test triples.

        Where the store holds the training triples as an array, they are among :attr:`triples` too.
        """
        triples = _read_triples(artifact, ("valid",))
        if isinstance(store.triples, np.ndarray):
            triples["train"] = store.triples
        unnamed = pa.chunked_array([], pa.string())
        return cls(
            store.num_entities, store.num_relations, triples, unnamed, unnamed, unnamed, unnamed, artifact.version,
            bool(artifact.counts.get("undirected", 0)), f"triples_{SUPPORT}" in artifact.counts, store,
        )  # fmt: skip

    @classmethod
    def from_arrays(
        cls,
        triples: Mapping[str, Int64],
        num_entities: int,
        num_relations: int,
        entity_names: Sequence[str] | None = None,
        relation_names: Sequence[str] | None = None,
    ) -> Graph:
        """A graph from (n, 3) arrays by split; missing splits are empty, missing names are the ids.

        With support, even empty, entities are held out.
        """
        entities = pa.chunked_array([pa.array([f"e{i}" for i in range(num_entities)], pa.string())])
        relations = pa.chunked_array([pa.array([f"r{i}" for i in range(num_relations)], pa.string())])
        full = {s: np.asarray(triples.get(s, ()), dtype=np.int64).reshape(-1, 3) for s in (*SPLITS, SUPPORT, PSEUDO)}
        return cls(
            num_entities=num_entities,
            num_relations=num_relations,
            triples=full,
            entity_ids=entities,
            entity_names=pa.chunked_array([pa.array(entity_names)]) if entity_names else entities,
            relation_ids=relations,
            relation_names=pa.chunked_array([pa.array(relation_names)]) if relation_names else relations,
            held_out=SUPPORT in triples,
        )

    def message_index(self) -> NeighbourIndex:
        """The edges messages run over in training: training triples, and never any other split."""
        return NeighbourIndex.build(self.triples["train"], self.num_entities, self.num_relations)

    @property
    def num_train(self) -> int:
        """Number of training triples."""
        return len(self.triples["train"] if self.store is None else self.store.triples)

    @property
    def targets(self) -> Int64:
        """(n, 3) int64: what training asks for: the training triples, then pseudo-labels where there are any.

        Messages, filters and rules know the training triples only.
        """
        return np.concatenate([self.triples["train"], self.triples[PSEUDO]])

    def with_pseudo(self, triples: Int64) -> Graph:
        """The same graph with these (n, 3) int64 pseudo-labels."""
        return replace(self, triples={**self.triples, PSEUDO: triples})

    @property
    def context(self) -> Int64:
        """(n, 3) int64: what is known when a question is asked, training and support triples; never what is asked.

        Only training triples decide weights, rules and their confidence; over this answers are computed.
        """
        support = self.triples[SUPPORT]
        return np.concatenate([self.triples["train"], support]) if len(support) else self.triples["train"]

    def inference_index(self) -> NeighbourIndex:
        """The edges messages run over when answers are computed: those of :attr:`context`."""
        return NeighbourIndex.build(self.context, self.num_entities, self.num_relations)

    def trained_entities(self) -> Int64 | None:
        """Ids of the entities with a training triple where others are held out of training as a whole, which must not
        even be its negatives; None where none is."""
        if not self.held_out:
            return None
        train = self.triples["train"]
        return np.unique(np.concatenate([train[:, 0], train[:, 2]]))

    def known(self, splits: Sequence[str]) -> FilterIndex:
        """The facts of the given splits, for filtering ranks or negatives; those of an undirected graph both ways."""
        rows = np.concatenate([self.triples[s] for s in splits])
        if self.undirected:
            rows = np.concatenate([rows, rows[:, ::-1]])
        return FilterIndex.build(rows, self.num_entities, self.num_relations)

    def answers(self, splits: Sequence[str]) -> KnownAnswers:
        """The same facts as those of :meth:`known`; the training ones stay in the store where there is one."""
        if self.store is None or "train" not in splits:
            return self.known(splits)
        rest = [split for split in splits if split != "train"]
        if not any(len(self.triples[split]) for split in rest):
            return self.store.known
        return Layered(self.store.known, self.known(rest))


def _read_triples(artifact: Artifact, splits: Sequence[str]) -> dict[str, Int64]:
    """(n, 3) int64 by split; of support and pseudo too, which may be empty."""
    triples = {split: np.empty((0, 3), dtype=np.int64) for split in (SUPPORT, PSEUDO)}
    for split in (*splits, SUPPORT) if f"triples_{SUPPORT}" in artifact.counts else splits:
        table = artifact.read_table(f"triples/{split}", columns=["head", "relation", "tail"])
        triples[split] = np.stack(
            [table[name].to_numpy().astype(np.int64) for name in ("head", "relation", "tail")], axis=1
        )
    return triples
