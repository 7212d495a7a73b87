"""What the last tasks of a graph's ingest write: triples and entities by partition."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from kgray.artifact import Draft
from kgray.data.audit import HeldOut, PartAudit, Rule, audit_held_out, audit_part, seen_in_train
from kgray.data.bad_rows import BadRow
from kgray.data.config import SPLITS, STORED
from kgray.data.tables import combined, named
from kgray.data.triples import Bools, Triples, concat, deduplicate, triple_table
from kgray.data.unseen import SupportAudit

ROW_GROUP = 1 << 16


def part_name(number: int) -> str:
    """File name of a partition."""
    return f"part-{number:05d}.parquet"


def finish_partition(
    draft: Draft, number: int, span: tuple[int, int], relations: int, support: bool, parts: Sequence[Triples]
) -> tuple[PartAudit, Triples, Bools, SupportAudit]:
    """Write the triples whose head is in the partition. ``parts``: all triples with head or tail in it; ``support``:
    whether there is such a split.

    Returns the counts, the triples of SPLITS without duplicates, which entities of the partition train holds, and the
    counts of support.
    """
    given = concat(parts)
    kept, dropped = deduplicate(given)
    own = kept[(kept.head >= span[0]) & (kept.head < span[1])]
    for s, split in enumerate(STORED if support else SPLITS):
        table = triple_table(own[own.split == s])
        draft.write_table(f"triples/{split}/{part_name(number)}", table, row_group_size=ROW_GROUP)
    counted_support = SupportAudit.of(kept, span)
    if support:
        asked, kept = given.split < len(SPLITS), kept[kept.split < len(SPLITS)]
        given, dropped = given[asked], dropped[asked]
    counted = audit_part(kept, dropped, given, span, relations)
    return counted, kept, seen_in_train(kept, span), counted_support


def check_held_out(
    span: tuple[int, int], rules: Sequence[Rule], relations: int, triples: Triples, seen: Sequence[Bools]
) -> HeldOut:
    """The second pass of the audit over one partition. ``seen``: of all partitions, in order."""
    return audit_held_out(triples, span, np.concatenate(seen), rules, relations)


def write_entities(
    draft: Draft,
    number: int,
    first_id: int,
    columns: Sequence[str],
    slices: Sequence[tuple[int, int]],
    tables: Sequence[Any],
) -> int:
    """Write one partition of entities: rows [start, end) of each bucket that reaches into it. Returns its rows."""
    schema = pa.schema([(name, pa.int64() if name == "id" else pa.string()) for name in columns])
    # Row groups must not follow the buckets: the bytes may not depend on how the work was cut.
    held: list[Any] = []
    written = first_id
    with draft.open_parquet(f"entities/{part_name(number)}", schema) as writer:
        for (start, end), table in zip(slices, tables, strict=True):
            while start < end:
                room = ROW_GROUP - sum(rows.num_rows for rows in held)
                held.append(named(table.slice(start, min(room, end - start)), 0, columns))
                start += held[-1].num_rows
                if held[-1].num_rows == room:
                    written += _write_group(writer, held, written)
        if held:
            written += _write_group(writer, held, written)
    return written - first_id


def _write_group(writer: Any, held: list[Any], first_id: int) -> int:
    """Write the rows held back as one row group with ids from ``first_id``, and let them go."""
    rows = pa.concat_tables(held).combine_chunks()
    held.clear()
    ids = pa.array(np.arange(first_id, first_id + rows.num_rows, dtype=np.int64))
    writer.write_table(rows.set_column(0, "id", ids))
    return int(rows.num_rows)


def external_ids(table: Any, rows: Sequence[int]) -> list[str]:
    """The external ids of a few entities of a bucket."""
    ids = combined(table.column("external_id"))
    return [ids[row].as_py() for row in rows]


def quarantine(rows: Sequence[BadRow], paths: Sequence[str]) -> bytes:
    """quarantine.jsonl: one object a bad row, in file order."""
    lines = (
        json.dumps(
            {"file": paths[row.source], "line": row.line, "reason": row.reason, "text": row.text},
            ensure_ascii=False,
        )
        for row in rows
    )
    return "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace")
