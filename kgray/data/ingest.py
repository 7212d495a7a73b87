"""The ``graph`` artifact: triples and tables in, dense ids and partitions out. (The corpus: see corpus.py.)

Stages, each a set of Ray tasks that read files and write files (see scratch.py); the driver sees counts and relation
tables only, and Ray's object store nothing that grows with the data:

1. read: chunks of files, or ranges of drawn triples, to task-local codes; entities by hash bucket.
2. merge: each bucket sorts its entities; places follow (hash, id), so they depend on nothing but the data.
3. number: with a partitioner other than hash, who votes for whom, and one task that gives ids by partition.
4. encode: codes to ids, each triple sent to the cells of its head and of its tail.
5. cells: duplicates dropped, files written, audit counted; runs of larger partitions merged; entities written.
6. held-out audit: the rules that training bears out, applied to valid and test.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from kgray.artifact import Draft, Recipe, Store
from kgray.config import to_dict
from kgray.data import audit, cells, output, partitioning
from kgray.data.bad_rows import BadRows, judge, kept_details
from kgray.data.config import SPLITS, SUPPORT, DataConfig, SplitPaths
from kgray.data.corpus import corpus_recipe, ingest_corpus
from kgray.data.inputs import (
    SYNTHETIC_BYTES,
    Plan,
    Sizes,
    graph_files,
    hash_groups,
    hash_of,
    hashed,
    plan_drawing,
    plan_reading,
    reading_options,
    run_small,
    text_bytes,
)
from kgray.data.partition import GraphConfig, Layout, partition_ranges
from kgray.data.quality import partition_report
from kgray.data.scratch import Scratch
from kgray.data.synthetic import SYNTHETIC_FORMAT, SyntheticGraph
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
from kgray.data.triples import Encoding, TriplesEncoded, TriplesRead, encode_triples, read_triples, triple_shape
from kgray.data.unseen import add_support, support_report
from kgray.errors import ConfigError, DataError

__all__ = ["GRAPH_FORMAT", "corpus_recipe", "ingest", "ingest_corpus", "ingest_recipe"]

log = logging.getLogger(__name__)
GRAPH_FORMAT = 2
"""Raised whenever this code would write something else from the same input. 2: figures of the partitions."""
_TRIPLES = ("train", "valid", "test", "triples")


def ingest_recipe(store: Store, data: DataConfig, graph: GraphConfig) -> Recipe:
    """What decides a graph: the bytes of its files, their roles and formats, how they are read and divided; or what is
    drawn instead of files.

    Raises DataError: missing files, names that do not tell a format.
    """
    files = graph_files(data)
    config = {
        "files": [[file.role, file.format, file.compression] for file in files],
        "split": _division(data),
        "partitions": graph.partitions,
        **reading_options(data),
    }
    if graph.streams:
        config["partitioner"] = {key: to_dict(graph)[key] for key in ("partitioner", "slack", "triple_slack", "passes")}
    drawn = SyntheticGraph.of(data)
    if drawn is not None:
        config["synthetic"] = {"format": SYNTHETIC_FORMAT, **to_dict(drawn)}
    return Recipe("graph", GRAPH_FORMAT, hashed(store, files), config)


def ingest(draft: Draft, data: DataConfig, graph: GraphConfig, sizes: Sizes | None = None) -> dict[str, int | float]:
    """Write the files of a graph artifact (within a Ray session). Returns its counts.

    Raises DataError naming file and line: bad rows beyond the policy, files that cannot be read, nothing to train
    on; ConfigError: more partitions than entities.
    """
    sizes = sizes or Sizes()
    drawn = SyntheticGraph.of(data)
    text = text_bytes(graph_files(data)) if drawn is None else drawn.triples * SYNTHETIC_BYTES
    small: dict[str, int | float] | None = run_small(text, sizes, _ingest, draft, data, graph, sizes)
    return small if small is not None else _ingest(draft, data, graph, sizes)


def _ingest(draft: Draft, data: DataConfig, graph: GraphConfig, sizes: Sizes) -> dict[str, int | float]:
    run = _Ingest(draft, data, graph, sizes)
    try:
        return run.run()
    finally:
        run.scratch.drop()


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


class _Ingest:
    """One run, stage by stage: what the stages hand each other are files. No stage begins before the one whose files it
    reads has ended, so that those of the one before that can go."""

    def __init__(self, draft: Draft, data: DataConfig, graph: GraphConfig, sizes: Sizes) -> None:
        self.draft, self.data, self.graph, self.sizes = draft, data, graph, sizes
        self.scratch = Scratch(draft)
        self.files = graph_files(data)
        self.drawn = SyntheticGraph.of(data)
        self.paths = [file.path for file in self.files]
        self.bad = BadRows(kept_details(data))
        self.by_entities = _by_entities(data)
        self.cuts: list[float] = []
        self._begun = time.monotonic()

    def run(self) -> dict[str, int | float]:
        """All stages. Returns the counts."""
        hashing = start("hash files", hash_of, hash_groups(self.files))
        log.info("ingest: work begins")
        entities = self._read()
        layout = self._lay_out(entities)
        moved = self._encode(layout)
        writing = self._write_entities(layout)
        told, held, rules, halo = self._finish(layout)
        fetch("write entities", writing)
        kept = np.sum([one.audit.kept for one in told], axis=0)
        support = support_report([one.support for one in told]) if self.by_entities else None
        partitions = partition_report(told, halo, layout, self.graph.partitioner, self.cuts)
        self._write_audit(told, held, rules, layout, moved, partitions, support)
        self._write_tables(layout, told, hashing)
        self._phase("audit")
        return {
            "entities": entities,
            "relations": len(self.relations.codes),
            **{f"triples_{split}": int(kept[s]) for s, split in enumerate(SPLITS)},
            **({f"triples_{SUPPORT}": support["triples"]} if support is not None else {}),
            "quarantined": self.bad.count,
            "partitions": len(layout.ranges),
            "edge_cut": partitions["edge_cut"],
            "halo": partitions["halo"]["mean"],
            "balance_entities": partitions["balance"]["entities"],
            "balance_triples": partitions["balance"]["triples"],
            **({"undirected": 1} if self.data.undirected else {}),
        }

    def _phase(self, name: str) -> None:
        now = time.monotonic()
        log.info("ingest: phase %s done in %.1f s", name, now - self._begun)
        self._begun = now

    # --- reading and the dictionary ---------------------------------------------------------------

    def _read(self) -> int:
        """Stages 1 and 2. Returns the number of entities."""
        triples = self._plan_triples()
        tables = self._plan(("entities",), True, self.sizes)
        relations = self._plan(("relations",), True, self.sizes)
        self.buckets = buckets = max(triples.buckets(self.sizes), tables.buckets(self.sizes))
        scratch, data = self.scratch, self.data
        arguments: list[tuple[Any, ...]]
        arguments = [(scratch, n, group, data, buckets) for n, group in enumerate(triples.groups)]
        reading = start("read triples", read_triples, arguments)
        arguments = [(scratch, f"table/{n}", group, data, buckets) for n, group in enumerate(tables.groups)]
        entity_reading = start("read entities", read_table, arguments)
        arguments = [(scratch, f"relations/{n}", group, data, 1) for n, group in enumerate(relations.groups)]
        relation_reading = start("read relations", read_table, arguments)
        self._told: list[TriplesRead] = self._collect("read triples", reading)
        read: list[TableRead] = self._collect("read entities", entity_reading)
        self._columns = output_columns(read)
        read_relations: list[TableRead] = self._collect("read relations", relation_reading)
        rows = [scratch.read_all(f"relations/{n}") for n in range(len(read_relations))]
        names = {name for one in self._told for name in one.relations}
        self.relations: RelationTable = relation_table(
            rows if relation_reading else None, read_relations, names, self.bad, self.paths
        )
        self._judge()
        self._phase("read")
        merging = [(scratch, b, len(read), len(self._told), data, self.paths) for b in range(buckets)]
        self._merged: list[BucketMerged] = self._collect("merge ids", start("merge ids", merge_bucket, merging))
        self._judge()
        scratch.drop("table")
        self._offsets = [0, *np.cumsum([one.entities for one in self._merged]).tolist()]
        self._phase("merge")
        return int(self._offsets[-1])

    def _plan_triples(self) -> Plan:
        sizes = self.sizes.of_triples()
        return self._plan(_TRIPLES, self.data.header, sizes) if self.drawn is None else plan_drawing(self.drawn, sizes)

    def _plan(self, roles: Sequence[str], header: bool, sizes: Sizes) -> Plan:
        shape = (triple_shape if roles == _TRIPLES else table_shape)(self.data.columns)
        files = [file for file in self.files if file.role in roles]
        return plan_reading(files, header, shape, "data.columns", sizes)

    def _collect(self, name: str, references: Sequence[Any]) -> list[Any]:
        """Small results, their bad rows taken over."""
        results = fetch(name, references)
        for told in results:
            self.bad.take(told.bad)
        return results

    def _judge(self) -> None:
        judge(self.bad, self.data, self.paths)

    # --- numbering --------------------------------------------------------------------------------

    def _lay_out(self, entities: int) -> Layout:
        """Stage 3: the partitions, and their cells."""
        if not entities:
            raise DataError("no entity is left: every row is bad or there is none")
        partitions = self.graph.partitions
        if partitions > entities:
            raise ConfigError("graph.partitions", partitions, f"at most one for each of the {entities} entities")
        rows = sum(told.rows for told in self._told)
        ranges = self._number(entities) if self.graph.streams else partition_ranges(entities, partitions)
        return Layout.of(ranges, rows, self.sizes.cell_triples)

    def _number(self, entities: int) -> list[tuple[int, int]]:
        scratch, starts = self.scratch, self._offsets[:-1]
        codes = self.relations.codes
        rows = np.zeros(len(codes), dtype=np.int64)
        arguments: list[tuple[Any, ...]] = []
        for n, told in enumerate(self._told):
            ids = [codes.get(name, -1) for name in told.relations]
            for code, count in zip(ids, told.relation_rows, strict=True):
                if code >= 0:  # others are told with their triples
                    rows[code] += count
            voting = ids if self.graph.partitioner == "relation" else None
            arguments.append((scratch, n, starts, entities, voting))
        run_all("write votes", partitioning.write_votes, arguments)
        spans = zip(self._offsets[:-1], self._offsets[1:], strict=True)
        arguments = [(scratch, b, low, high, len(self._told)) for b, (low, high) in enumerate(spans)]
        run_all("sort votes", partitioning.sort_votes, arguments)
        scratch.drop("votes")
        self._phase("votes")
        counting = (scratch, self.graph, starts, entities, rows.tolist())
        numbered: partitioning.Numbered = run_all("partition", partitioning.number_entities, [counting])[0]
        self.cuts = numbered.cuts
        scratch.drop("vertices")
        scratch.drop("voters")
        arguments = [(scratch, b, numbered.ranges) for b in range(self.buckets)]
        run_all("part entities", partitioning.part_entities, arguments)
        self._phase("partition")
        return numbered.ranges

    # --- encoding and writing ---------------------------------------------------------------------

    def _encode(self, layout: Layout) -> int:
        """Stage 4. Returns how many held-out triples went to train."""
        codes = self.relations.codes
        in_train = np.zeros(len(codes), dtype=bool)
        for told in self._told:
            for name, rows in zip(told.relations, told.relation_rows, strict=True):
                if rows and name in codes:
                    in_train[codes[name]] = True
        encoding = Encoding(layout, self._offsets[:-1], self.graph.streams, codes, in_train, _divided(self.data))
        arguments = [(self.scratch, n, told.relations, encoding, self.data) for n, told in enumerate(self._told)]
        encoding_tasks = start("encode triples", encode_triples, arguments)
        results: list[TriplesEncoded] = self._collect("encode triples", encoding_tasks)
        self._judge()
        for folder in ("rows", "ids", "places", "numbers"):
            self.scratch.drop(folder)
        self._phase("encode")
        return sum(one.moved_to_train for one in results)

    def _write_entities(self, layout: Layout) -> list[Any]:
        """Start writing the entities, one task for each partition."""
        arguments = []
        for number, (start_id, end_id) in enumerate(layout.ranges):
            if self.graph.streams:
                pieces = [output.Piece(f"parted/{b}", number) for b in range(self.buckets)]
            else:
                pieces = [
                    output.Piece(f"entities/{b}", 0, max(first, start_id) - first, min(after, end_id) - first)
                    for b, (first, after) in enumerate(zip(self._offsets[:-1], self._offsets[1:], strict=True))
                    if max(first, start_id) < min(after, end_id)
                ]
            arguments.append((self.draft, self.scratch, number, start_id, self._columns, pieces))
        return start("write entities", output.write_entities, arguments)

    def _finish(self, layout: Layout) -> tuple[list[cells.CellTold], list[audit.HeldOut], list[audit.Rule], list[int]]:
        """Stages 5 and 6. Returns what was told of each cell, the second pass of the audit, the rules, and of each
        partition how many entities of others are tails of its triples."""
        draft, scratch, relations = self.draft, self.scratch, len(self.relations.codes)
        common = (len(self._told), relations, self.by_entities)
        arguments: list[tuple[Any, ...]] = [(draft, scratch, c, layout, *common) for c in range(layout.num_cells)]
        told: list[cells.CellTold] = run_all("write triples", cells.finish_cell, arguments)
        scratch.drop("own")
        scratch.drop("foreign")
        self._phase("cells")
        halo = [0] * len(layout.ranges)
        for cell, one in enumerate(told):
            halo[layout.owners[cell]] = one.halo
        larger = np.flatnonzero(np.bincount(layout.owners) > 1).tolist()
        arguments = [(draft, scratch, p, layout, self.by_entities) for p in larger]
        for partition, number in zip(larger, run_all("join cells", cells.join_cells, arguments), strict=True):
            halo[partition] = number
        if larger:
            self._phase("join cells")
        parts = [one.audit for one in told]
        if not sum(int(part.kept[0]) for part in parts):
            raise DataError(f"no training triple is left ({self.bad.count} bad rows); expected at least one")
        rules = audit.find_rules(parts, relations)
        run_all("gather entities seen", cells.gather_seen, [(scratch, layout)])
        arguments = [(scratch, c, layout, rules, relations) for c in range(layout.num_cells)]
        held: list[audit.HeldOut] = run_all("audit held-out triples", cells.check_held_out, arguments)
        return told, held, rules, halo

    # --- what the driver writes -------------------------------------------------------------------

    def _write_audit(
        self,
        told: Sequence[cells.CellTold],
        held: Sequence[audit.HeldOut],
        rules: Sequence[audit.Rule],
        layout: Layout,
        moved: int,
        partitions: dict[str, Any],
        support: dict[str, Any] | None,
    ) -> None:
        parts = [one.audit for one in told]
        hubs = sorted(entity for _, entity in audit.hubs(parts))
        naming = run_all("names of hubs", output.external_ids, [(self.draft, hubs, layout.ranges)])[0]
        names = dict(zip(hubs, naming, strict=True))
        shown = moved if _divided(self.data) else None
        report = audit.report(parts, held, rules, list(self.relations.codes), self._text(), shown, names)
        report["partitions"] = partitions
        if support is not None:
            add_support(report, support)
        self.draft.write_json("audit.json", report)

    def _text(self) -> audit.TextAudit:
        """Figures of the audit that need the entity table; without one nothing has a name."""
        shared: list[tuple[int, int]] = []
        if any(file.role == "entities" for file in self.files):
            run_all("names", name_buckets, [(self.scratch, b, self.buckets) for b in range(self.buckets)])
            shared = run_all(
                "shared names", duplicate_names, [(self.scratch, b, self.buckets) for b in range(self.buckets)]
            )
        return audit.TextAudit(
            missing_name=sum(one.missing_name for one in self._merged),
            missing_description=sum(one.missing_description for one in self._merged),
            missing_text=sum(one.missing_text for one in self._merged),
            duplicate_names=sum(names for names, _ in shared),
            entities_with_duplicate_name=sum(entities for _, entities in shared),
            relations_without_text=self.relations.without_text,
            relation_names_shared=self.relations.shared_names,
        )

    def _write_tables(self, layout: Layout, told: Sequence[cells.CellTold], hashing: Sequence[Any]) -> None:
        self.draft.write_table("relations.parquet", self.relations.table)
        sources = [entry for group in fetch("hash files", hashing) for entry in group]
        if self.drawn is not None:
            sources = [{"path": "synthetic", "synthetic": to_dict(self.drawn)}]
        self.draft.write_json("sources.json", sources)
        self.draft.write_json("partitions.json", {"entities": [list(span) for span in layout.ranges]})
        self.draft.write_bytes("quarantine.jsonl", output.quarantine(self.bad.rows, self.paths))
