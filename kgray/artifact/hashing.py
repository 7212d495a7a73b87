"""Hashes of input files, remembered so that an unchanged file is read once."""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pyarrow import fs as pafs

from kgray.artifact.filesystem import join, normalise, read_bytes, resolve, write_bytes
from kgray.artifact.manifest import Source, sha256_stream
from kgray.errors import DataError, StorageError

# A file may change again within the resolution of its time stamp, unnoticed; only older times are believed.
_SETTLED_S = 2.0


def hash_files(paths: list[str], cache: str) -> list[Source]:
    """``paths`` (or URIs) as sources; the cache is a folder of small JSON files, one an input file."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(lambda path: _source(path, cache), paths))


def _source(path: str, cache: str) -> Source:
    uri = normalise(path)
    filesystem, inside = resolve(uri)
    info = filesystem.get_file_info(inside)
    if info.type == pafs.FileType.NotFound:
        raise DataError(f"no such file: {path}")
    if info.type == pafs.FileType.Directory:
        raise DataError(f"{path} is a folder, not a file")
    changed = int(info.mtime_ns or 0)
    key = {"uri": uri, "bytes": int(info.size), "mtime_ns": changed}
    remembered = join(cache, hashlib.sha256(uri.encode()).hexdigest()[:32] + ".json")
    known = _read(remembered)
    if known and {name: known.get(name) for name in key} == key and isinstance(known.get("sha256"), str):
        return Source("file", known["sha256"], uri)
    try:
        with filesystem.open_input_stream(inside, compression=None) as stream:
            digest = sha256_stream(stream)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from None
    after = filesystem.get_file_info(inside)
    if (after.size, after.mtime_ns) != (info.size, info.mtime_ns):
        raise DataError(f"{path} changed while it was read: try again when it is complete")
    if changed and changed < (time.time() - _SETTLED_S) * 1e9:
        _remember(remembered, {**key, "sha256": digest})
    return Source("file", digest, uri)


def _read(uri: str) -> dict[str, Any] | None:
    try:
        filesystem, path = resolve(uri)
        known = json.loads(read_bytes(filesystem, path))
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) else None


def _remember(uri: str, entry: dict[str, Any]) -> None:
    """Not being able to remember (a read-only or full storage) only costs time."""
    try:
        filesystem, path = resolve(uri)
        write_bytes(filesystem, path, json.dumps(entry).encode())
    except (OSError, StorageError):
        return
