"""The tasks that let a partitioner decide the ids: who votes for whom, the stream of entities, the new numbers.

Until then entities go by their place in the order of hashes. What is written to scratch:

* ``votes/T``: of each reading task, a batch for each hash bucket of (entity, voter).
* ``vertices/B`` and ``voters/B``: of each bucket, the votes sorted by entity.
* ``numbers/B``: of each bucket the new ids, in the order of hashes; ``parted/B``: its entities, a batch a partition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from kgray.data.dictionary import I64
from kgray.data.partition import GraphConfig, partition_of
from kgray.data.partitioners import Homes, Vertices, assign
from kgray.data.scratch import Scratch
from kgray.data.triples import grouped, places_of, read_rows_of


def write_votes(
    scratch: Scratch, number: int, offsets: Sequence[int], entities: int, relations: Sequence[int] | None
) -> None:
    """The votes of one reading task's training triples. ``offsets``: the first entity of each bucket; ``relations``: of
    the task's relations their ids where those vote, None where neighbours do. A loop votes for nobody."""
    ids, _ = places_of(scratch, number, offsets, renumbered=False)
    rows = read_rows_of(scratch, f"rows/{number}")
    head, tail = ids[rows.head], ids[rows.tail]
    use = (rows.split == 0) & (head >= 0) & (tail >= 0)
    if relations is None:
        use &= head != tail
        head, tail = head[use], tail[use]
        entity, voter = np.concatenate([head, tail]), np.concatenate([tail, head])
        own = np.arange(len(entity)) < len(head)
    else:
        numbers = np.asarray(relations, dtype=np.int64)[rows.relation]
        use &= numbers >= 0
        entity, voter = head[use], numbers[use]
        own = np.ones(len(entity), dtype=bool)
    bounds = [(start, end) for start, end in zip(offsets, [*offsets[1:], entities], strict=True)]
    bucket = partition_of(entity, bounds)
    order, cuts = grouped(bucket.astype(np.uint16), len(bounds))
    kind = np.uint32 if entities <= 2**32 else np.int64
    scratch.write_arrays(
        f"votes/{number}", cuts, entity=entity[order].astype(kind), voter=voter[order].astype(kind), own=own[order]
    )


def sort_votes(scratch: Scratch, bucket: int, start: int, end: int, tasks: int) -> None:
    """The votes of all tasks for the entities [start, end) of a bucket, sorted by entity."""
    parts = [scratch.read(f"votes/{task}", bucket) for task in range(tasks)]
    entity, voter, own = (
        np.concatenate([part.column(name).to_numpy(zero_copy_only=False) for part in parts])
        for name in ("entity", "voter", "own")
    )
    entity = entity.astype(np.int64) - start
    loads = np.bincount(entity[own], minlength=end - start)
    order = np.argsort(entity, kind="stable")
    scratch.write_arrays(
        f"vertices/{bucket}", votes=np.bincount(entity, minlength=end - start).astype(np.int64), load=loads
    )
    scratch.write_arrays(f"voters/{bucket}", voter=voter[order])


@dataclass
class Numbered:
    """What the driver is told: the id range of each partition, and of each pass the share of votes not followed."""

    ranges: list[tuple[int, int]]
    cuts: list[float]


def number_entities(
    scratch: Scratch, graph: GraphConfig, offsets: Sequence[int], entities: int, relation_rows: Sequence[int]
) -> Numbered:
    """Let the stream of all entities pass, and give ids partition by partition, within one in the order of hashes.

    One task: it holds four bytes for each entity, and of votes a bucket at a time.
    """

    def stream() -> Iterator[Vertices]:
        for bucket in range(len(offsets)):
            votes = scratch.column(f"vertices/{bucket}", "votes")
            loads = scratch.column(f"vertices/{bucket}", "load").astype(np.int64)
            voters = scratch.column(f"voters/{bucket}", "voter").astype(np.int64)
            yield Vertices(np.concatenate([[0], np.cumsum(votes)]).astype(np.int64), voters, loads)

    homes = Homes.build(relation_rows, graph.partitions) if graph.partitioner == "relation" else None
    found = assign(stream, entities, graph.partitions, graph.slack, graph.triple_slack, graph.passes, homes)
    ends = np.cumsum(found.sizes)
    following = ends - found.sizes
    for bucket, (start, end) in enumerate(zip(offsets, [*offsets[1:], entities], strict=True)):
        parts = found.parts[start:end]
        order = np.argsort(parts, kind="stable")
        counts = np.bincount(parts, minlength=graph.partitions)
        begins = np.cumsum(counts) - counts
        numbers = np.empty(end - start, dtype=np.int64)
        ordered = parts[order]
        numbers[order] = following[ordered] + np.arange(end - start) - begins[ordered]
        following = following + counts
        scratch.write_arrays(f"numbers/{bucket}", number=numbers)
    ranges = list(zip((ends - found.sizes).tolist(), ends.tolist(), strict=True))
    return Numbered(ranges, found.cuts)


def part_entities(scratch: Scratch, bucket: int, ranges: list[tuple[int, int]]) -> None:
    """The entities of a bucket in the order of their new ids, a batch for each partition."""
    numbers: I64 = scratch.column(f"numbers/{bucket}", "number")
    order = np.argsort(numbers)
    counts = np.bincount(partition_of(numbers, ranges), minlength=len(ranges))
    table = scratch.read_all(f"entities/{bucket}").take(pa.array(order))
    scratch.write(f"parted/{bucket}", table, [0, *np.cumsum(counts).tolist()])
