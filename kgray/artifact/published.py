"""An artifact that is complete: reading it, and proving it undamaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kgray.artifact.filesystem import (
    checked_relative,
    exists,
    is_local,
    join,
    list_files,
    normalise,
    read_bytes,
    resolve,
    storage_errors,
)
from kgray.artifact.manifest import MANIFEST, Source, parse_manifest, sha256_stream
from kgray.errors import ArtifactError, ArtifactNotFoundError


class Artifact:
    """A folder with a manifest. Pickles to its URI and manifest; reads only files the manifest lists.

    Raises ArtifactError, naming the file, when something is missing, truncated or changed.
    """

    def __init__(self, uri: str, manifest: dict[str, Any]) -> None:
        self.uri = uri
        self.manifest = manifest

    @classmethod
    def load(cls, uri: str | os.PathLike[str]) -> Artifact:
        """Opens the artifact at a URI; sizes are verified.

        Raises ArtifactNotFoundError where there is no manifest, ArtifactError where something is damaged.
        """
        artifact = cls.peek(normalise(uri))
        artifact.verify()
        return artifact

    @classmethod
    def peek(cls, uri: str) -> Artifact:
        """Reads the manifest only."""
        filesystem, path = resolve(uri)
        try:
            text = read_bytes(filesystem, join(path, MANIFEST))
        except (FileNotFoundError, NotADirectoryError):
            raise ArtifactNotFoundError(f"no artifact at {uri}: it has no {MANIFEST}") from None
        return cls(uri, parse_manifest(text, uri))

    def __repr__(self) -> str:
        return f"Artifact({self.kind} {self.version} at {self.uri})"

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "manifest": self.manifest}

    @property
    def kind(self) -> str:
        return str(self.manifest["kind"])

    @property
    def version(self) -> str:
        return str(self.manifest["version"])

    @property
    def counts(self) -> dict[str, Any]:
        """What the job counted, e.g. ``{"entities": 135}``."""
        return dict(self.manifest.get("counts") or {})

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that went into the version."""
        return dict(self.manifest.get("config") or {})

    @property
    def source(self) -> Source:
        """This artifact as an input of another."""
        return Source(self.kind, self.version, self.uri)

    @property
    def inputs(self) -> tuple[Source, ...]:
        return tuple(Source(i["kind"], i["version"], i["uri"]) for i in self.manifest["inputs"])

    @property
    def fs(self) -> Any:
        """The pyarrow filesystem the artifact lies on; paths on it come from :meth:`path_of`."""
        return resolve(self.uri)[0]

    def path_of(self, relpath: str) -> str:
        """A file's (or folder's) path on :attr:`fs`."""
        return join(resolve(self.uri)[1], checked_relative(relpath))

    def uri_of(self, relpath: str) -> str:
        return join(self.uri, checked_relative(relpath))

    @cached_property
    def _entries(self) -> dict[str, dict[str, Any]]:
        return {entry["path"]: entry for entry in self.manifest["files"]}

    def files(self, prefix: str = "") -> list[str]:
        """Sorted relative paths of the files, those under a folder or with a given beginning only if
        asked."""
        return sorted(path for path in self._entries if path.startswith(prefix))

    def bytes_of(self, relpath: str) -> int:
        return int(self._entry(relpath)["bytes"])

    def verify(self, hashes: bool = False, prefix: str = "") -> None:
        """Compares the size, and on request the sha256, of every file (whose path begins so) with the manifest.

        Raises ArtifactError naming every damaged file (the first ten).
        """
        filesystem, path = resolve(self.uri)
        found = list_files(filesystem, path)
        wrong = []
        for name, entry in self._entries.items():
            if not name.startswith(prefix):
                continue
            if name not in found:
                wrong.append(f"{name} is missing")
            elif found[name] != entry["bytes"]:
                wrong.append(f"{name} has {found[name]} bytes instead of {entry['bytes']}")
            elif hashes:
                with filesystem.open_input_stream(join(path, name), compression=None) as stream:
                    digest = sha256_stream(stream)
                if digest != entry["sha256"]:
                    wrong.append(f"{name} has changed (sha256 {digest[:12]}... instead of {entry['sha256'][:12]}...)")
        if wrong:
            more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise ArtifactError(
                f"{self.kind} {self.version} at {self.uri} is damaged: {'; '.join(wrong[:10])}{more}; "
                "remove that folder and run the job again"
            )

    def open(self, relpath: str) -> Any:
        """A binary random-access file (pyarrow NativeFile; a context manager). Its size is verified."""
        entry = self._entry(relpath)
        stream = self.fs.open_input_file(self.path_of(relpath))
        if stream.size() != entry["bytes"]:
            stream.close()
            raise self._truncated(relpath, stream_bytes=self.fs.get_file_info(self.path_of(relpath)).size)
        return stream

    def read_bytes(self, relpath: str) -> bytes:
        with self.open(relpath) as stream:
            return bytes(stream.read())

    def read_json(self, relpath: str) -> Any:
        try:
            return json.loads(self.read_bytes(relpath))
        except ValueError as error:
            raise ArtifactError(f"{self.uri_of(relpath)} is no JSON: {error}") from None

    def read_table(self, relpath: str, columns: Sequence[str] | None = None) -> pa.Table:
        """One Parquet file, or all of a folder in the order of their names."""
        chosen = list(columns) if columns is not None else None
        tables = []
        for name in self.parquet_files(relpath):
            with self.open(name) as stream:
                try:
                    tables.append(pq.ParquetFile(stream).read(columns=chosen))
                except pa.ArrowInvalid as error:
                    raise ArtifactError(f"{self.uri_of(name)} is no Parquet: {error}") from None
        return tables[0] if len(tables) == 1 else pa.concat_tables(tables)

    def parquet_files(self, relpath: str) -> list[str]:
        """The file itself, or the Parquet files of a folder, sorted; ArtifactError when there are none."""
        if relpath in self._entries:
            return [relpath]
        names = [name for name in self.files(relpath.rstrip("/") + "/") if name.endswith(".parquet")]
        if not names:
            raise ArtifactError(f"{self.kind} {self.version} at {self.uri} holds no {relpath}")
        return names

    def local_path(self, relpath: str) -> Path:
        """A local copy of a file or folder: the thing itself where the artifact is local, else downloaded
        once into KGRAY_CACHE (default ``~/.cache/kgray``), its hash verified."""
        names = [relpath] if relpath in self._entries else self.files(relpath and relpath.rstrip("/") + "/")
        if not names:
            raise ArtifactError(f"{self.kind} {self.version} at {self.uri} holds no {relpath}")
        if is_local(self.uri):
            for name in names:
                if (size := _size(Path(self.uri, name))) != self.bytes_of(name):
                    raise self._truncated(name, stream_bytes=size)
            return Path(self.uri, relpath)
        # The URI of a remote artifact is never used twice, so it can name the copy.
        cache = Path(os.environ.get("KGRAY_CACHE") or Path.home() / ".cache" / "kgray")
        folder = cache / f"{self.kind}-{self.version}-{hashlib.sha256(self.uri.encode()).hexdigest()[:8]}"
        for name in names:
            if _size(folder / name) != self.bytes_of(name):
                self._download(name, folder / name)
        return folder / relpath

    def _download(self, relpath: str, target: Path) -> None:
        with storage_errors(str(target.parent)):
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".download-")
            try:
                with os.fdopen(handle, "wb") as output, self.open(relpath) as stream:
                    shutil.copyfileobj(stream, output, 1 << 20)
                with Path(temporary).open("rb") as written:
                    if sha256_stream(written) != self._entry(relpath)["sha256"]:
                        raise ArtifactError(f"{self.uri_of(relpath)} has changed since it was published")
                Path(temporary).replace(target)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise

    def _entry(self, relpath: str) -> dict[str, Any]:
        entry = self._entries.get(checked_relative(relpath))
        if entry is None:
            raise ArtifactError(f"{self.kind} {self.version} at {self.uri} holds no {relpath}")
        return entry

    def _truncated(self, relpath: str, stream_bytes: int) -> ArtifactError:
        return ArtifactError(
            f"{self.uri_of(relpath)} has {stream_bytes} bytes instead of {self.bytes_of(relpath)}: "
            "it was truncated or overwritten"
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1


def is_artifact(uri: str) -> bool:
    """Whether a manifest lies there."""
    filesystem, path = resolve(uri)
    return exists(filesystem, join(path, MANIFEST))
