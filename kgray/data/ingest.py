"""The ``graph`` artifact: triples and tables in, dense ids and partitions out. (The corpus: see corpus.py.)

Stages, each a set of Ray tasks; the driver sees counts and relation tables only:

1. read: chunks of files to task-local codes; entities by hash bucket.
2. merge: each bucket sorts its entities; ids follow (hash, id), so they depend on nothing but the data.
3. encode: codes to ids, each triple sent to the partitions of its head and of its tail.
4. partition: duplicates dropped, files written, audit counted; entities written.
5. held-out audit: the rules that training bears out, applied to valid and test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kgray.artifact import Draft, Recipe, Store
from kgray.config import to_dict
from kgray.data import audit, output
from kgray.data.bad_rows import BadRows, judge, kept_details
from kgray.data.config import SPLITS, SUPPORT, DataConfig, SplitPaths
from kgray.data.corpus import corpus_recipe, ingest_corpus
from kgray.data.inputs import (
    Plan,
    Sizes,
    graph_files,
    hash_groups,
    hash_of,
    hashed,
    plan_reading,
    reading_options,
    run_small,
)
from kgray.data.partition import GraphConfig, partition_ranges
from kgray.data.tables import (
    BucketMerged,
    RelationTable,
    TableRead,
    duplicate_names,
    merge_bucket,
    name_buckets,
    output_columns,
    read_table,
    relation_table,
    table_shape,
)
from kgray.data.tasks import fetch, run_all, start
from kgray.data.triples import Encoding, TriplesRead, encode_triples, read_triples, triple_shape
from kgray.data.unseen import SupportAudit, add_support, support_report
from kgray.errors import ConfigError, DataError

__all__ = ["GRAPH_FORMAT", "corpus_recipe", "ingest", "ingest_corpus", "ingest_recipe"]

GRAPH_FORMAT = 1
"""Raised whenever this code would write something else from the same input."""
_TRIPLES = ("train", "valid", "test", "triples")


def ingest_recipe(store: Store, data: DataConfig, graph: GraphConfig) -> Recipe:
    """What decides a graph: the bytes of its files, their roles and formats, how they are read and divided.

    Raises DataError: missing files, names that do not tell a format.
    """
    files = graph_files(data)
    config = {
        "files": [[file.role, file.format, file.compression] for file in files],
        "split": _division(data),
        "partitions": graph.partitions,
        **reading_options(data),
    }
    return Recipe("graph", GRAPH_FORMAT, hashed(store, files), config)


def ingest(draft: Draft, data: DataConfig, graph: GraphConfig, sizes: Sizes | None = None) -> dict[str, int]:
    """Write the files of a graph artifact (within a Ray session). Returns its counts.

    Raises DataError naming file and line: bad rows beyond the policy, files that cannot be read, nothing to train
    on; ConfigError: more partitions than entities.
    """
    sizes = sizes or Sizes()
    small: dict[str, int] | None = run_small(graph_files(data), sizes, _ingest, draft, data, graph, sizes)
    return small if small is not None else _ingest(draft, data, graph, sizes)


def _ingest(draft: Draft, data: DataConfig, graph: GraphConfig, sizes: Sizes) -> dict[str, int]:
    run = _Ingest(draft, data, sizes)
    hashing = start("hash files", hash_of, hash_groups(run.files))
    entities = run.read()
    ranges = _ranges(entities, graph)
    encoded = run.encode(ranges)
    writing = run.write_entities(ranges)
    kept = run.finish(encoded, ranges, writing)
    hashes = fetch("hash files", hashing)
    draft.write_json("sources.json", [entry for group in hashes for entry in group])
    draft.write_json("partitions.json", {"entities": [list(span) for span in ranges]})
    draft.write_bytes("quarantine.jsonl", output.quarantine(run.bad.rows, run.paths))
    return {
        "entities": entities,
        "relations": len(run.relations.codes),
        **{f"triples_{split}": int(kept[s]) for s, split in enumerate(SPLITS)},
        **({f"triples_{SUPPORT}": run.support["triples"]} if run.support is not None else {}),
        "quarantined": run.bad.count,
        "partitions": len(ranges),
        **({"undirected": 1} if data.undirected else {}),
    }


def _divided(data: DataConfig) -> bool:
    """Whether splits of triples are drawn here."""
    return not (_by_entities(data) or isinstance(data.triples, SplitPaths) or data.columns.split is not None)


def _by_entities(data: DataConfig) -> bool:
    return data.split.by == "entities"


def _division(data: DataConfig) -> dict[str, Any] | None:
    """What decides the splits besides the files."""
    told: dict[str, Any] = to_dict(data.split)
    if _by_entities(data):
        return told
    return {key: told[key] for key in ("valid", "test", "seed")} if _divided(data) else None


def _ranges(entities: int, graph: GraphConfig) -> list[tuple[int, int]]:
    if not entities:
        raise DataError("no entity is left: every row is bad or there is none")
    if graph.partitions > entities:
        raise ConfigError("graph.partitions", graph.partitions, f"at most one for each of the {entities} entities")
    return partition_ranges(entities, graph.partitions)


class _Ingest:
    """One run, stage by stage: what the stages hand each other are references to results in Ray's store."""

    def __init__(self, draft: Draft, data: DataConfig, sizes: Sizes) -> None:
        self.draft, self.data, self.sizes = draft, data, sizes
        self.files = graph_files(data)
        self.paths = [file.path for file in self.files]
        self.bad = BadRows(kept_details(data))
        self.moved = 0
        self.support: dict[str, Any] | None = None

    # --- reading and the dictionary ---------------------------------------------------------------

    def read(self) -> int:
        """Stages 1 and 2. Returns the number of entities."""
        triples = self._plan(_TRIPLES, self.data.header)
        tables = self._plan(("entities",), True)
        self.buckets = buckets = max(triples.buckets(self.sizes), tables.buckets(self.sizes))
        self._reading = self._read("triples", read_triples, triples, 2 + buckets)
        entity_reading = self._read("entities", read_table, tables, 1 + buckets)
        relation_reading = self._read("relations", read_table, self._plan(("relations",), True), 2)
        self._told: list[TriplesRead] = self._collect("read triples", [one[0] for one in self._reading])
        read: list[TableRead] = self._collect("read entities", [one[0] for one in entity_reading])
        self._columns = output_columns(read)
        read_relations: list[TableRead] = self._collect("read relations", [one[0] for one in relation_reading])
        rows = fetch("read relations", [one[1] for one in relation_reading])
        names = {name for one in self._told for name in one.relations}
        self.relations: RelationTable = relation_table(
            rows if relation_reading else None, read_relations, names, self.bad, self.paths
        )
        self._judge()
        arguments = [
            (
                [one[1 + b] for one in entity_reading],
                [one[2 + b] for one in self._reading],
                bool(entity_reading),
                self.data,
                self.paths,
            )
            for b in range(buckets)
        ]
        self._merging = start("merge ids", merge_bucket, arguments, 2 + len(self._reading))
        self._merged: list[BucketMerged] = self._collect("merge ids", [one[0] for one in self._merging])
        self._judge()
        self._offsets = [0, *np.cumsum([one.entities for one in self._merged]).tolist()]
        return int(self._offsets[-1])

    def _plan(self, roles: Sequence[str], header: bool) -> Plan:
        shape = (triple_shape if roles == _TRIPLES else table_shape)(self.data.columns)
        files = [file for file in self.files if file.role in roles]
        return plan_reading(files, header, shape, "data.columns", self.sizes)

    def _read(self, what: str, function: Any, plan: Plan, returns: int) -> list[Any]:
        buckets = 1 if what == "relations" else self.buckets
        return start(f"read {what}", function, [(group, self.data, buckets) for group in plan.groups], returns)

    def _collect(self, name: str, references: Sequence[Any]) -> list[Any]:
        """Small results, their bad rows taken over."""
        results = fetch(name, references)
        for told in results:
            self.bad.take(told.bad)
        return results

    def _judge(self) -> None:
        judge(self.bad, self.data, self.paths)

    # --- encoding and writing ---------------------------------------------------------------------

    def encode(self, ranges: list[tuple[int, int]]) -> list[Any]:
        """Stage 3. Returns for each reading task the references to its triples, one for each partition."""
        codes = self.relations.codes
        in_train = np.zeros(len(codes), dtype=bool)
        for told in self._told:
            known = [codes[n] for n, f in zip(told.relations, told.relation_in_train, strict=True) if f and n in codes]
            in_train[known] = True
        encoding = Encoding(ranges, self._offsets[:-1], codes, in_train, _divided(self.data))
        arguments = [
            (one[1], told.relations, encoding, self.data, [bucket[2 + n] for bucket in self._merging])
            for n, (one, told) in enumerate(zip(self._reading, self._told, strict=True))
        ]
        encoded = start("encode triples", encode_triples, arguments, 1 + len(ranges))
        results = self._collect("encode triples", [one[0] for one in encoded])
        self._judge()
        self.moved = sum(one.moved_to_train for one in results)
        self._reading = []
        return [one[1:] for one in encoded]

    def write_entities(self, ranges: list[tuple[int, int]]) -> list[Any]:
        """Start writing the entities, one task for each partition."""
        arguments = []
        for number, (start_id, end_id) in enumerate(ranges):
            slices, tables = [], []
            for bucket, first, after in zip(self._merging, self._offsets[:-1], self._offsets[1:], strict=True):
                low, high = max(first, start_id), min(after, end_id)
                if low < high:
                    slices.append((low - first, high - first))
                    tables.append(bucket[1])
            arguments.append((self.draft, number, start_id, self._columns, slices, tables))
        return start("write entities", output.write_entities, arguments)

    def finish(self, encoded: list[Any], ranges: list[tuple[int, int]], writing: list[Any]) -> Any:
        """Stages 4 and 5. Returns the triples kept, by split (3,)."""
        relations = len(self.relations.codes)
        finishing = start(
            "write triples",
            output.finish_partition,
            [
                (self.draft, p, span, relations, _by_entities(self.data), [one[p] for one in encoded])
                for p, span in enumerate(ranges)
            ],
            4,
        )
        naming = self._start_names()
        parts: list[audit.PartAudit] = fetch("write triples", [one[0] for one in finishing])
        kept = np.sum([part.kept for part in parts], axis=0)
        if _by_entities(self.data):
            supported: list[SupportAudit] = fetch("write triples", [one[3] for one in finishing])
            self.support = support_report(supported)
        if not kept[0]:
            raise DataError(f"no training triple is left ({self.bad.count} bad rows); expected at least one")
        rules = audit.find_rules(parts, relations)
        seen = [one[2] for one in finishing]
        held: list[audit.HeldOut] = run_all(
            "audit held-out triples",
            output.check_held_out,
            [(span, rules, relations, one[1], seen) for span, one in zip(ranges, finishing, strict=True)],
        )
        self.draft.write_table("relations.parquet", self.relations.table)
        names = list(self.relations.codes)
        told = audit.report(
            parts,
            held,
            rules,
            names,
            self._text(naming),
            self.moved if _divided(self.data) else None,
            self._hubs(parts),
        )
        if self.support is not None:
            add_support(told, self.support)
        self.draft.write_json("audit.json", told)
        fetch("write entities", writing)
        return kept

    # --- figures of the audit that need the entity table ------------------------------------------

    def _start_names(self) -> list[Any]:
        """Start counting names several entities bear; nothing to do without a table."""
        if not any(file.role == "entities" for file in self.files):
            return []
        parted = start("names", name_buckets, [(one[1], self.buckets) for one in self._merging], 1 + self.buckets)
        return start("shared names", duplicate_names, [([one[1 + b] for one in parted],) for b in range(self.buckets)])

    def _text(self, naming: list[Any]) -> audit.TextAudit:
        shared = fetch("shared names", naming)
        return audit.TextAudit(
            missing_name=sum(one.missing_name for one in self._merged),
            missing_description=sum(one.missing_description for one in self._merged),
            missing_text=sum(one.missing_text for one in self._merged),
            duplicate_names=sum(names for names, _ in shared),
            entities_with_duplicate_name=sum(entities for _, entities in shared),
            relations_without_text=self.relations.without_text,
            relation_names_shared=self.relations.shared_names,
        )

    def _hubs(self, parts: Sequence[audit.PartAudit]) -> dict[int, str]:
        """External ids of the entities of the largest degree."""
        ids = sorted(entity for _, entity in audit.hubs(parts))
        wanted = []
        for bucket, first, after in zip(self._merging, self._offsets[:-1], self._offsets[1:], strict=True):
            rows = [entity - first for entity in ids if first <= entity < after]
            if rows:
                wanted.append((bucket[1], rows))
        found = run_all("names of hubs", output.external_ids, wanted)
        return dict(zip(ids, (name for names in found for name in names), strict=True))
