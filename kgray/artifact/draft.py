"""An artifact being written: invisible until the store publishes it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kgray.artifact.filesystem import (
    checked_relative,
    is_local,
    join,
    make_parent,
    resolve,
    storage_errors,
    write_bytes,
)
from kgray.artifact.manifest import MANIFEST
from kgray.errors import ArtifactError

RESERVED = (MANIFEST, "_draft.json")


class Draft:
    """A folder to write an artifact's files into, from this process or (it pickles to its URI) from Ray
    workers.

    Every file that lies under it when ``make`` returns becomes part of the artifact, so files may also be
    written straight to ``uri`` (Ray Data's ``write_parquet``). Writing to a full or forbidden storage raises
    StorageError.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._local: Path | None = None

    def __repr__(self) -> str:
        return f"Draft({self.uri!r})"

    def __getstate__(self) -> dict[str, Any]:
        # A local folder beside a remote draft belongs to the process that publishes.
        return {"uri": self.uri, "_local": None}

    @property
    def fs(self) -> Any:
        """The pyarrow filesystem the draft lies on; paths on it come from :meth:`path_of`."""
        return resolve(self.uri)[0]

    def uri_of(self, relpath: str) -> str:
        """The URI of a file of the draft."""
        return join(self.uri, self._checked(relpath))

    def path_of(self, relpath: str) -> str:
        """The file's path on :attr:`fs`."""
        return join(resolve(self.uri)[1], self._checked(relpath))

    @contextmanager
    def open(self, relpath: str) -> Iterator[Any]:
        """A binary output stream to a new file."""
        path = self.path_of(relpath)
        with storage_errors(self.uri):
            make_parent(self.fs, path)
            with self.fs.open_output_stream(path, compression=None) as stream:
                yield stream

    def write_bytes(self, relpath: str, data: bytes) -> None:
        path = self.path_of(relpath)
        with storage_errors(self.uri):
            write_bytes(self.fs, path, data)

    def write_json(self, relpath: str, value: Any) -> None:
        """Readable JSON, UTF-8; non-finite numbers are a ValueError."""
        self.write_bytes(relpath, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())

    def write_table(self, relpath: str, table: pa.Table, **options: Any) -> None:
        """One Parquet file; ``options`` go to pyarrow.parquet.write_table."""
        path = self.path_of(relpath)
        with storage_errors(self.uri):
            make_parent(self.fs, path)
            pq.write_table(table, path, filesystem=self.fs, **options)

    @contextmanager
    def open_parquet(self, relpath: str, schema: pa.Schema, **options: Any) -> Iterator[pq.ParquetWriter]:
        """A Parquet file written piece by piece: ``write_table`` / ``write_batch`` on what is yielded."""
        path = self.path_of(relpath)
        with storage_errors(self.uri):
            make_parent(self.fs, path)
            with pq.ParquetWriter(path, schema, filesystem=self.fs, **options) as writer:
                yield writer

    def local_dir(self) -> Path:
        """A local folder whose files become part of the artifact: the draft itself where it is local, else
        one that is uploaded at publish. Only for the process that runs ``make``, not for workers."""
        if is_local(self.uri):
            return Path(self.uri)
        if self._local is None:
            self._local = Path(tempfile.mkdtemp(prefix="kgray-draft-"))
        return self._local

    def upload_local(self) -> None:
        """Copies the local folder beside a remote draft into it (the store calls this at publish)."""
        if self._local is None:
            return
        with storage_errors(self.uri):
            for file in sorted(f for f in self._local.rglob("*") if f.is_file()):
                relpath = file.relative_to(self._local).as_posix()
                with file.open("rb") as data, self.open(relpath) as stream:
                    shutil.copyfileobj(data, stream, 1 << 20)

    def drop_local(self) -> None:
        """Removes the local folder beside a remote draft."""
        if self._local is not None:
            shutil.rmtree(self._local, ignore_errors=True)
            self._local = None

    def _checked(self, relpath: str) -> str:
        if relpath in RESERVED:
            raise ArtifactError(f"{relpath!r} is written by the store alone")
        return checked_relative(relpath)
