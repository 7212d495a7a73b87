"""Rows on their way from one task of an ingest to others: files, so that no memory need hold them.

They lie in the draft's own folder, on the storage that every node reaches, and are gone before it is published; those
of a run that died go with its draft. A file holds one batch of rows for each receiver, which reads its own alone.
Writing one again gives the same file, so a task whose worker died is simply run again: what it reads stays until all
tasks of its stage are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kgray.artifact import Draft
from kgray.artifact.filesystem import delete_folder, make_parent, storage_errors

FOLDER = "scratch"


class Scratch:
    """Arrow IPC files of a draft, by names such as ``ids/3``. Pickles to its place."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft

    def write(self, name: str, rows: Any, bounds: Sequence[int] | None = None) -> None:
        """A file of rows (a pyarrow Table or RecordBatch), cut at ``bounds`` (0 first, the number of rows last) into
        batches; one batch without."""
        batch = _one_batch(rows)
        cuts = [0, batch.num_rows] if bounds is None else bounds
        path = self._path(name)
        with storage_errors(self.draft.uri):
            make_parent(self.draft.fs, path)
            sink = self.draft.fs.open_output_stream(path, compression=None)
            with sink, pa.ipc.new_file(sink, batch.schema) as writer:
                for start, end in pairwise(cuts):
                    writer.write_batch(batch.slice(start, end - start))

    def write_arrays(self, name: str, bounds: Sequence[int] | None = None, **columns: npt.NDArray[Any]) -> None:
        """:meth:`write` of numpy columns of one length."""
        self.write(name, pa.record_batch({key: pa.array(column) for key, column in columns.items()}), bounds)

    def read(self, name: str, number: int = 0) -> Any:
        """One batch of a file, a RecordBatch; nothing else of the file is read."""
        with self.draft.fs.open_input_file(self._path(name)) as raw:
            return pa.ipc.open_file(raw).get_batch(number)

    def batches(self, name: str) -> int:
        """Batches of a file."""
        with self.draft.fs.open_input_file(self._path(name)) as raw:
            return int(pa.ipc.open_file(raw).num_record_batches)

    def read_all(self, name: str) -> Any:
        """A file as a Table."""
        with self.draft.fs.open_input_file(self._path(name)) as raw:
            return pa.ipc.open_file(raw).read_all()

    def column(self, name: str, column: str, number: int = 0) -> npt.NDArray[Any]:
        """A column of a batch as a numpy array."""
        return as_numpy(self.read(name, number).column(column))

    def drop(self, folder: str = "") -> None:
        """Remove what has been consumed: all files whose names begin with ``folder/``, or everything."""
        delete_folder(self.draft.fs, self.draft.path_of(f"{FOLDER}/{folder}".rstrip("/")))

    def _path(self, name: str) -> str:
        return self.draft.path_of(f"{FOLDER}/{name}.arrow")


def as_numpy(column: Any) -> npt.NDArray[Any]:
    """A column without nulls, boolean ones unpacked."""
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _one_batch(rows: Any) -> Any:
    if isinstance(rows, pa.RecordBatch):
        return rows
    batches = rows.combine_chunks().to_batches()
    if len(batches) == 1:
        return batches[0]
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in rows.schema], schema=rows.schema)
