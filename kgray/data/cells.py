"""The last tasks of a graph's ingest: triples without duplicates by cell, and partitions from their cells.

A cell takes the triples with their head in its range of ids (*own*), and of those with their tail alone in it what the
audit needs (*foreign*). Triples are sorted as single numbers of 64 bits where they fit, which they do while entities of
the cell x relations x entities are below 2**61.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kgray.artifact import Draft
from kgray.data.audit import HeldOut, PartAudit, Rule, audit_held_out, audit_part, may_meet, overlaps
from kgray.data.config import SPLITS, STORED
from kgray.data.output import ROW_GROUP, part_name
from kgray.data.partition import Layout
from kgray.data.scratch import Scratch, as_numpy
from kgray.data.triples import I64, Bools, Triples, concat, read_rows_of, triple_table, write_rows
from kgray.data.unseen import SupportAudit

_LINES = 1 << 40  # more than any file has


@dataclass
class CellTold:
    """What the driver is told of a cell. cut: own triples whose tail is in another partition; halo: how many entities
    of other partitions are their tails, where the cell is a whole partition; relations: which occur, (R,) bool."""

    audit: PartAudit
    support: SupportAudit
    cut: int
    halo: int
    relations: Bools


def finish_cell(
    draft: Draft, scratch: Scratch, cell: int, layout: Layout, tasks: int, relations: int, support: bool
) -> CellTold:
    """Drop duplicates, count, and write: the partition's files where the cell is all of it, else runs of the cell.
    ``support``: whether there is such a split."""
    span = layout.cells[cell]
    own = concat([read_rows_of(scratch, f"own/{task}", cell) for task in range(tasks)])
    key = triple_codes(own.head - span[0], own.relation, own.tail, relations, layout.num_entities) * 4 + own.split
    keep, ordered = first_of_each(key)
    dropped = own.split[~keep]
    if not keep.all():
        own = own[keep]
    home = layout.ranges[layout.owners[cell]]
    away = (own.tail < home[0]) | (own.tail >= home[1])
    cut, others = int(away.sum()), np.unique(own.tail[away])
    alone = layout.cells[cell] == home
    _write(draft, scratch, own, cell, layout.owners[cell] if alone else None, support, layout)
    if not alone:
        scratch.write_arrays(f"halo/{cell}", entity=others)
    foreign = _foreign(scratch, cell, layout, tasks, span, relations)
    counted = SupportAudit.of(own, foreign, span)
    if support:
        own, foreign = own[own.split < len(SPLITS)], foreign[foreign.split < len(SPLITS)]
    told = audit_part(own, foreign, dropped[dropped < len(SPLITS)], overlaps(ordered), span, relations)
    scratch.write_arrays(f"seen/{cell}", train=np.packbits(told.seen))
    _keep_held_out(scratch, cell, own, foreign, span, layout)
    used = np.zeros(relations, dtype=bool)
    used[own.relation] = True
    told.seen = np.empty(0, dtype=bool)
    return CellTold(told, counted, cut, len(others), used)


def _foreign(scratch: Scratch, cell: int, layout: Layout, tasks: int, span: tuple[int, int], relations: int) -> Triples:
    """Triples of others with their tail in the cell, each of a split once; where they stood is not known."""
    batches = [scratch.read(f"foreign/{task}", cell) for task in range(tasks)]
    head, relation, tail, split = (
        np.concatenate([as_numpy(batch.column(name)) for batch in batches])
        for name in ("head", "relation", "tail", "split")
    )
    head, tail = head.astype(np.int64), tail.astype(np.int64)
    key = triple_codes(tail - span[0], relation, head, relations, layout.num_entities) * 4 + split
    rows = np.flatnonzero(first_of_each(key)[0])
    return placeless(head[rows], relation[rows], tail[rows], split[rows])


def placeless(head: I64, relation: npt.NDArray[np.int32], tail: I64, split: npt.NDArray[np.int8]) -> Triples:
    """Triples of which nobody asks where they stood."""
    nowhere = np.zeros(len(head), dtype=np.int64)
    return Triples(head, relation, tail, split, nowhere.astype(np.int32), nowhere)


def triple_codes(first: I64, relation: npt.NDArray[np.int32], second: I64, relations: int, entities: int) -> I64:
    """A number for each triple, below 2**61: equal for equal ones and only those. ``first``: below the cell's size."""
    if (int(first.max(initial=0)) + 1) * relations * entities < 2**61:
        return (first * relations + relation) * entities + second
    order = np.lexsort((second, relation, first))
    a, b, c = first[order], relation[order], second[order]
    new = np.zeros(len(order), dtype=np.int64)
    new[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1]) | (c[1:] != c[:-1])
    codes = np.empty(len(order), dtype=np.int64)
    codes[order] = np.cumsum(new)
    return codes


def first_of_each(keys: I64) -> tuple[Bools, I64]:
    """Which of n keys stand there for the first time, (n,), and the distinct keys, sorted."""
    order = np.argsort(keys)
    ordered = keys[order]
    new = np.ones(len(keys), dtype=bool)
    new[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(new)
    keep = np.zeros(len(keys), dtype=bool)
    if len(starts):
        keep[np.minimum.reduceat(order, starts)] = True  # the sort is not stable
    return keep, ordered[starts]


# --- writing --------------------------------------------------------------------------------------


def _write(
    draft: Draft, scratch: Scratch, own: Triples, cell: int, partition: int | None, support: bool, layout: Layout
) -> None:
    for s, split in enumerate(STORED if support else SPLITS):
        rows = own[own.split == s]
        if partition is not None:
            draft.write_table(f"triples/{split}/{part_name(partition)}", triple_table(rows), row_group_size=ROW_GROUP)
        else:
            bounds = [*range(0, len(rows), ROW_GROUP), len(rows)]
            write_rows(scratch, f"runs/{split}/{cell}", rows, bounds, layout.id_type)


def join_cells(draft: Draft, scratch: Scratch, partition: int, layout: Layout, support: bool) -> int:
    """Merge the runs of a partition of several cells into its files, in the order of the input. Returns how many
    entities of other partitions are tails of its triples."""
    cells = layout.cells_of(partition)
    for split in STORED if support else SPLITS:
        path = f"triples/{split}/{part_name(partition)}"
        schema = triple_table(concat([])).schema
        held: list[Any] = []
        with draft.open_parquet(path, schema) as writer:
            written = 0
            for rows in _merged([_Run(scratch, f"runs/{split}/{cell}") for cell in cells]):
                held.append(triple_table(rows))
                if sum(len(table) for table in held) >= ROW_GROUP:
                    table = pa.concat_tables(held)
                    whole = len(table) // ROW_GROUP * ROW_GROUP
                    for start in range(0, whole, ROW_GROUP):
                        writer.write_table(table.slice(start, ROW_GROUP).combine_chunks())
                    written += whole
                    held = [table.slice(whole)]
            rest = pa.concat_tables(held) if held else schema.empty_table()
            if len(rest) or not written:
                writer.write_table(rest.combine_chunks())
    others: I64 = np.empty(0, dtype=np.int64)
    for cell in cells:
        others = np.union1d(others, scratch.column(f"halo/{cell}", "entity"))
    return len(others)


class _Run:
    """A sorted file of triples, a batch of it in memory."""

    def __init__(self, scratch: Scratch, name: str) -> None:
        self.scratch, self.name = scratch, name
        self.left = list(range(scratch.batches(name)))[::-1]
        self._fill()

    def _fill(self) -> None:
        self.rows: Triples | None = None
        while self.left and (self.rows is None or not len(self.rows)):
            self.rows = read_rows_of(self.scratch, self.name, self.left.pop())
        if self.rows is not None and not len(self.rows):
            self.rows = None
        self.keys = _places(self.rows) if self.rows is not None else np.empty(0, dtype=np.int64)

    def take(self, limit: int) -> Triples | None:
        """What stands no later than ``limit``, of what is in memory."""
        if self.rows is None:
            return None
        end = int(np.searchsorted(self.keys, limit, side="right"))
        taken = self.rows[:end]
        if end == len(self.rows):
            self._fill()
        else:
            self.rows, self.keys = self.rows[end:], self.keys[end:]
        return taken


def _places(rows: Triples) -> I64:
    """Where triples stand in the input, as sortable numbers."""
    return rows.source.astype(np.int64) * _LINES + rows.line


def _merged(runs: Sequence[_Run]) -> Iterator[Triples]:
    """All triples of sorted runs, sorted, some at a time."""
    while any(run.rows is not None for run in runs):
        limit = min(int(run.keys[-1]) for run in runs if run.rows is not None)
        taken = concat([rows for run in runs if (rows := run.take(limit)) is not None and len(rows)])
        yield taken[np.argsort(_places(taken), kind="stable")]


# --- the second pass of the audit -----------------------------------------------------------------


def _keep_held_out(
    scratch: Scratch, cell: int, own: Triples, foreign: Triples, span: tuple[int, int], layout: Layout
) -> None:
    """Write what the second pass looks at: held-out triples, and the training triples between the same two entities the
    other way round (and a few besides)."""
    held = own[own.split > 0]
    train = concat([own[(own.split == 0) & (own.tail >= span[0]) & (own.tail < span[1])], foreign[foreign.split == 0]])
    width = layout.num_entities
    _, meets = may_meet((held.head - span[0]) * width + held.tail, (train.tail - span[0]) * width + train.head)
    write_rows(scratch, f"held/{cell}", concat([held, train[meets]]), None, layout.id_type)


def gather_seen(scratch: Scratch, layout: Layout) -> None:
    """Put together which entities training triples hold: ``seen``, one bit for each."""
    seen = [
        np.unpackbits(scratch.column(f"seen/{cell}", "train"), count=end - start).astype(bool)
        for cell, (start, end) in enumerate(layout.cells)
    ]
    scratch.write_arrays("all_seen", train=np.packbits(np.concatenate(seen)))


def check_held_out(scratch: Scratch, cell: int, layout: Layout, rules: Sequence[Rule], relations: int) -> HeldOut:
    """The second pass of the audit over one cell."""
    held = read_rows_of(scratch, f"held/{cell}")
    seen = np.unpackbits(scratch.column("all_seen", "train"), count=layout.num_entities).astype(bool)
    return audit_held_out(held, layout.cells[cell], seen, rules, relations)
