"""One shard of a split: reading its triples, ranking them, writing the ranks away. No Ray; flat memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kgray.artifact import Artifact, Draft
from kgray.errors import ArtifactError, DataError
from kgray.evaluation.answers import Task
from kgray.evaluation.baselines import BASELINES
from kgray.evaluation.config import EvaluateConfig
from kgray.evaluation.counts import Counts, Strata
from kgray.evaluation.links import LinkScores, adjacency
from kgray.evaluation.members import LinkWatch, Watch
from kgray.evaluation.ranged import RangedAnswerer, sizes
from kgray.evaluation.ranged_ranking import rank_ranged
from kgray.evaluation.ranking import Ranks, Scorer, filter_splits, rank_triples
from kgray.evaluation.reliability import Reliability, merge
from kgray.graph.filter_index import FilterIndex
from kgray.graph.graph import Graph
from kgray.model.bundle import Bundle

RANKS = "ranks.parquet"
RANKS_SCHEMA = pa.schema(
    [
        ("side", pa.string()),
        ("head", pa.string()),
        ("relation", pa.string()),
        ("tail", pa.string()),
        ("rank_optimistic", pa.int64()),
        ("rank_realistic", pa.float64()),
        ("rank_pessimistic", pa.int64()),
        ("candidates", pa.int64()),
        ("score", pa.float32()),
    ]
)
_COLUMNS = ["head", "relation", "tail"]
_READ_ROWS = 8192
_WRITE_ROWS = 1 << 15
_LEAST_ROWS = 256
_LEAST_SCORES = 1 << 24

RANK_EDGES: tuple[int, ...] = tuple(m * 10**e for e in range(10) for m in (1, 2, 5))
"""Lower edges of the histogram's bins: 1, 2, 5, 10, 20, ... The last bin is open."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``start`` to ``stop`` of one Parquet file of the graph artifact."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all shards need of the graph. Its arrays are shared by all workers of a node through Ray.

    ``known``: :meth:`FilterIndex.to_arrays` of the splits that filter; ``baselines``: fitted scorers by name;
    ``near``: (N, N) sparse adjacency where links are held against pairs without one, else None.
    """

    known: Mapping[str, npt.NDArray[Any]]
    strata: Strata
    baselines: Mapping[str, Scorer]
    near: Any = None


@dataclass(slots=True)
class Measured:
    """Results of a shard or of many: counts of the model, of each baseline and of each member where the model is an
    ensemble, histogram of the model's ranks, by task how its probabilities did where it has some; scores of links of
    "model", "member.<name>", "baseline.<name>" where they were asked for.

    ``histogram[side]`` (len(RANK_EDGES),) int64: queries by realistic rank, rounded down.
    """

    model: Counts
    baselines: dict[str, Counts]
    histogram: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    members: dict[str, Counts] = field(default_factory=dict)
    reliability: dict[str, Reliability] = field(default_factory=dict)
    links: dict[str, LinkScores] = field(default_factory=dict)

    def __add__(self, other: Measured) -> Measured:
        """Both together; see :meth:`Counts.__add__`."""
        sides = {**self.histogram, **other.histogram}
        none = np.zeros(len(RANK_EDGES), dtype=np.int64)
        return Measured(
            self.model + other.model,
            {name: counts + other.baselines[name] for name, counts in self.baselines.items()},
            {side: self.histogram.get(side, none) + other.histogram.get(side, none) for side in sides},
            {name: counts + other.members[name] for name, counts in self.members.items()},
            merge(self.reliability, other.reliability),
            {name: links + other.links[name] for name, links in self.links.items()},
        )


def plan(graph: Artifact, split: str, shards: int) -> list[list[Piece]]:
    """At most ``shards`` near-equal parts of a split, read from the files' metadata alone.

    Fewer where a part would be less work than starting a process for it.

    Raises DataError when the split has no triples.
    """
    sizes = {}
    for name in graph.parquet_files(f"triples/{split}"):
        with graph.open(name) as stream:
            sizes[name] = pq.ParquetFile(stream).metadata.num_rows
    total = sum(sizes.values())
    if not total:
        raise DataError(
            f"graph {graph.version} has no {split} triples to evaluate on: give data.triples.{split}, or a "
            f"share of the triples by data.split.{split}"
        )
    least = max(_LEAST_ROWS, _LEAST_SCORES // max(int(graph.counts["entities"]), 1))
    shards = max(1, min(shards, total // least))
    bounds = [total * i // shards for i in range(shards + 1)]
    parts = []
    for low, high in pairwise(bounds):
        part, offset = [], 0
        for name, rows in sizes.items():
            start, stop = max(low - offset, 0), min(high - offset, rows)
            if start < stop:
                part.append(Piece(name, start, stop))
            offset += rows
        parts.append(part)
    return parts


def read_triples(graph: Artifact, pieces: Sequence[Piece]) -> Iterator[npt.NDArray[np.int64]]:
    """The triples of the pieces as (n, 3) int64 arrays of at most a few thousand rows, in file order."""
    for piece in pieces:
        with graph.open(piece.file) as stream:
            file = pq.ParquetFile(stream)
            groups, first = _row_groups(file.metadata, piece)
            at = first
            for batch in file.iter_batches(batch_size=_READ_ROWS, row_groups=groups, columns=_COLUMNS):
                low, high = max(piece.start - at, 0), min(piece.stop - at, len(batch))
                at += len(batch)
                if low < high:
                    rows = batch.slice(low, high - low)
                    yield np.stack([rows[name].to_numpy().astype(np.int64) for name in _COLUMNS], axis=1)


def _row_groups(metadata: Any, piece: Piece) -> tuple[list[int], int]:
    """Row groups that hold rows of the piece, and the row the first of them begins at."""
    groups: list[int] = []
    first, start = 0, 0
    for group in range(metadata.num_row_groups):
        stop = start + metadata.row_group(group).num_rows
        if start < piece.stop and stop > piece.start:
            first = start if not groups else first
            groups.append(group)
        start = stop
    return groups, first


def prepare(graph: Artifact, config: EvaluateConfig) -> Prepared:
    """Filter, strata and fitted baselines of a graph artifact."""
    loaded = Graph.load(graph)
    size = (loaded.num_entities, loaded.num_relations)
    train = loaded.triples["train"]
    links = config.link_negatives > 0
    chosen = [
        b for b in BASELINES.values() if config.baselines and set(b.tasks) & set(config.tasks) and b.links <= links
    ]
    return Prepared(
        known=loaded.known(filter_splits(config.split)).to_arrays(),
        strata=Strata.of(train, *size),
        baselines={baseline.name: baseline.scorer(loaded.context, *size) for baseline in chosen},
        near=adjacency(train, size[0]) if links else None,
    )


def measure(
    draft: Draft,
    config: EvaluateConfig,
    model: Artifact,
    graph: Artifact,
    prepared: Prepared,
    pieces: Sequence[Piece],
    number: int,
) -> Measured:
    """Rank one shard by the model and by every baseline; writes ``ranks.parquet/part-<number>.parquet``.

    Raises ArtifactError when the model was trained on another graph.
    """
    bundle = Bundle.load(model)
    if bundle.graph_version != graph.version:
        raise ArtifactError(
            f"model {model.version} was trained on graph {bundle.graph_version}, not on {graph.version}"
        )
    known = FilterIndex.from_arrays(prepared.known)
    common: dict[str, Any] = {
        "split": config.split,
        "train": prepared.strata,
        "batch_size": config.batch_size,
        "score_budget": config.score_memory_mb << 18,  # four bytes a score
    }
    links = None if prepared.near is None else LinkWatch(prepared.near, config.link_negatives)
    baselines = {}
    for name, scorer in prepared.baselines.items():
        tasks = [task for task in config.tasks if task in BASELINES[name].tasks]
        see = None if links is None else partial(links.see, f"baseline.{name}")
        baselines[name] = rank_triples(
            scorer, read_triples(graph, pieces), known, tasks=tasks, on_scores=see, **common
        )
    asked = tasks_of(config, bundle)
    histogram = {str(task): np.zeros(len(RANK_EDGES), dtype=np.int64) for task in asked}
    watch = Watch.of(bundle, config.split, prepared.strata, asked, links)
    with ExitStack() as stack:
        writer: _RankWriter | None = None
        if config.ranks:
            path = f"{RANKS}/part-{number:05d}.parquet"
            file = stack.enter_context(draft.open_parquet(path, RANKS_SCHEMA, compression="zstd"))
            writer = _RankWriter(file, bundle)

        def keep(ranks: Ranks) -> None:
            _tally(histogram, ranks)
            if writer is not None:
                writer.add(ranks)

        counts = _rank_model(config, watch, known, partial(read_triples, graph, pieces), asked, keep)
        if writer is not None:
            writer.flush()
    scores = {} if links is None else links.scores
    return Measured(counts, baselines, histogram, watch.members, watch.reliability, scores)


def _rank_model(
    config: EvaluateConfig,
    watch: Watch,
    known: FilterIndex,
    triples: Callable[[], Iterator[npt.NDArray[np.int64]]],
    asked: tuple[Task, ...],
    keep: Callable[[Ranks], None],
) -> Counts:
    """The model's ranks of one shard, by whole rows or, where these are too much, by ranges of candidates."""
    bundle, budget = watch.bundle, config.score_memory_mb << 18  # four bytes a score
    whole: Callable[..., Counts] = partial(
        rank_triples,
        watch.scorer,
        known=known,
        split=config.split,
        train=watch.strata,
        batch_size=config.batch_size,
        # The rows of every member are held beside those that are ranked.
        score_budget=budget // (1 + len(watch.members)),
        on_ranks=keep,
        on_scores=watch.see,
    )
    ranges = sizes(bundle.scorer, bundle.num_entities, budget) if config.ranged else None
    if ranges is None:
        return whole(triples(), tasks=asked)
    counts = rank_ranged(
        *(RangedAnswerer(bundle, bundle.scorer, *ranges), triples(), known),
        split=config.split,
        train=watch.strata,
        tasks=[task for task in asked if task != "relation"],
        on_ranks=keep,
        reliability=watch.reliability,
    )
    return counts + whole(triples(), tasks=("relation",)) if "relation" in asked else counts


def tasks_of(config: EvaluateConfig, bundle: Bundle) -> tuple[Task, ...]:
    """What is asked of the model: the tasks of the configuration that it can do; ArtifactError where it can do none."""
    tasks = tuple(task for task in config.tasks if task in bundle.tasks)
    if not tasks:
        raise ArtifactError(
            f"model {bundle.model_version} answers {', '.join(bundle.tasks)} queries, none of evaluate.tasks"
        )
    return tasks


def _tally(histogram: dict[str, npt.NDArray[np.int64]], ranks: Ranks) -> None:
    bins = np.searchsorted(RANK_EDGES, np.floor(ranks.realistic), side="right") - 1
    histogram[ranks.side] += np.bincount(bins, minlength=len(RANK_EDGES))


class _RankWriter:
    """Gathers small batches of ranks into row groups, with external ids for people and other tools."""

    def __init__(self, file: pq.ParquetWriter, bundle: Bundle) -> None:
        self.file = file
        self.entities = pa.array(bundle.entity_ids, pa.string())
        self.relations = pa.array(bundle.relation_ids, pa.string())
        self.waiting: list[pa.RecordBatch] = []
        self.rows = 0

    def add(self, ranks: Ranks) -> None:
        count = len(ranks.triples)
        columns = [
            pa.repeat(pa.scalar(ranks.side), count),
            self.entities.take(pa.array(ranks.triples[:, 0])),
            self.relations.take(pa.array(ranks.triples[:, 1])),
            self.entities.take(pa.array(ranks.triples[:, 2])),
            pa.array(ranks.optimistic),
            pa.array(ranks.realistic),
            pa.array(ranks.pessimistic),
            pa.array(ranks.candidates),
            pa.array(ranks.scores),
        ]
        self.waiting.append(pa.record_batch(columns, schema=RANKS_SCHEMA))
        self.rows += count
        if self.rows >= _WRITE_ROWS:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            self.file.write_table(pa.Table.from_batches(self.waiting))
        self.waiting, self.rows = [], 0
