"""What an ingest writes besides triples: the entities of a partition, the rows set aside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kgray.artifact import Draft
from kgray.data.bad_rows import BadRow
from kgray.data.scratch import Scratch
from kgray.data.tables import named

ROW_GROUP = 1 << 16


def part_name(number: int) -> str:
    """File name of a partition."""
    return f"part-{number:05d}.parquet"


@dataclass(frozen=True)
class Piece:
    """Some entities of a partition: rows [start, end) of a batch of a scratch file (end None: to its end)."""

    name: str
    batch: int = 0
    start: int = 0
    end: int | None = None


def write_entities(
    draft: Draft, scratch: Scratch, number: int, first_id: int, columns: Sequence[str], pieces: Sequence[Piece]
) -> int:
    """Write one partition of entities, piece after piece. Returns its rows."""
    schema = pa.schema([(name, pa.int64() if name == "id" else pa.string()) for name in columns])
    # Row groups must not follow the pieces: the bytes may not depend on how the work was cut.
    held: list[Any] = []
    written = first_id
    with draft.open_parquet(f"entities/{part_name(number)}", schema) as writer:
        for piece in pieces:
            table = pa.Table.from_batches([scratch.read(piece.name, piece.batch)])
            start, end = piece.start, table.num_rows if piece.end is None else piece.end
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


def external_ids(draft: Draft, entities: Sequence[int], ranges: Sequence[tuple[int, int]]) -> list[str]:
    """The external ids of a few entities, from the written partitions."""
    found = []
    for entity in entities:
        part = next(n for n, (start, end) in enumerate(ranges) if start <= entity < end)
        with draft.fs.open_input_file(draft.path_of(f"entities/{part_name(part)}")) as raw:
            group, row = divmod(entity - ranges[part][0], ROW_GROUP)
            found.append(pq.ParquetFile(raw).read_row_group(group, columns=["external_id"])[0][row].as_py())
    return found


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
