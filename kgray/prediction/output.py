"""The one file of answers a user asked for, written from the parts of a ``predictions`` artifact. No Ray."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from kgray.artifact import Artifact
from kgray.artifact.filesystem import is_local, normalise, resolve, storage_errors
from kgray.errors import ConfigError

log = logging.getLogger(__name__)

ANSWERS = "answers.parquet"
"""Folder of the artifact's Parquet files of answers."""

_KEY = "predict.output"
_VERSION = b"kgray.predictions"


def check_output(output: str) -> None:
    """Raises ConfigError for a place where no file can be written, and for a file that is no predictions: it may be
    the queries. Asked before anything is computed."""
    place = normalise(output)
    if is_local(place):
        folder = Path(place).parent
        if not folder.is_dir():
            raise ConfigError(_KEY, output, f"a file in a folder that exists; there is no {folder}")
    filesystem, path = resolve(place)
    info = filesystem.get_file_info(path)
    if info.type == pa.fs.FileType.Directory:
        raise ConfigError(_KEY, output, "the name of a file; this is a folder")
    if info.type == pa.fs.FileType.File and _version_of(filesystem, path) is None:
        raise ConfigError(_KEY, output, "a new file, or one that this job wrote; what lies there is something else")


def write_output(predictions: Artifact, output: str) -> bool:
    """Write the answers of a ``predictions`` artifact as one file, row group by row group; whether it was not there
    yet. A file is seen only when it is whole. Raises StorageError where it cannot be written."""
    place = normalise(output)
    filesystem, path = resolve(place)
    if _version_of(filesystem, path) == predictions.version:
        log.info("predict: %s is up to date", output)
        return False
    names = predictions.parquet_files(ANSWERS)
    # On object storage a file appears when it is closed; elsewhere it is renamed then.
    target = f"{path}.{secrets.token_hex(4)}.partial" if is_local(place) else path
    with storage_errors(place):
        try:
            _join(predictions, names, filesystem, target)
            if target != path:
                filesystem.move(target, path)
        finally:
            if target != path and filesystem.get_file_info(target).type == pa.fs.FileType.File:
                filesystem.delete_file(target)
    log.info("predict: answers written to %s", output)
    return True


def _join(predictions: Artifact, names: list[str], filesystem: Any, target: str) -> None:
    with predictions.open(names[0]) as stream:
        schema = pq.ParquetFile(stream).schema_arrow
    with pq.ParquetWriter(target, schema, filesystem=filesystem, compression="zstd") as writer:
        for name in names:
            with predictions.open(name) as stream:
                file = pq.ParquetFile(stream)
                for group in range(file.metadata.num_row_groups):
                    writer.write_table(file.read_row_group(group))


def _version_of(filesystem: Any, path: str) -> str | None:
    """The version of the predictions a file holds; None where there is no such file."""
    try:
        found = (pq.read_schema(path, filesystem=filesystem).metadata or {}).get(_VERSION)
    except (OSError, pa.ArrowException):
        return None
    return None if found is None else found.decode()
