"""Storage URIs as pyarrow filesystems, and what goes wrong there told in one line.

``resolve`` accepts local paths, ``file://``, and whatever pyarrow (s3, gs, abfs, hdfs) or fsspec speaks. S3
is set up from the usual variables: AWS_ENDPOINT_URL[_S3], AWS_REGION / AWS_DEFAULT_REGION and the AWS
credential chain.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pyarrow import fs as pafs

from kgray.errors import ArtifactError, StorageError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
_OBJECT_STORES = ("s3", "gcs", "gs", "abfs")


def normalise(uri: str | os.PathLike[str]) -> str:
    """An absolute local path, or a URI without a trailing slash; ``file://`` becomes a path."""
    text = os.fspath(uri)
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    if _SCHEME.match(text):
        return text.rstrip("/")
    return str(Path(text).expanduser().absolute())


def is_local(uri: str) -> bool:
    return not _SCHEME.match(uri)


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts if part.strip("/"))])


def resolve(uri: str | os.PathLike[str]) -> tuple[Any, str]:
    """The filesystem of a URI and the path inside it.

    Raises StorageError when no installed library speaks the scheme or the storage cannot be reached.
    """
    text = normalise(uri)
    if is_local(text):
        return pafs.LocalFileSystem(), text
    scheme, rest = text.split("://", 1)
    settings = tuple(os.environ.get(name, "") for name in _S3_VARIABLES) if scheme == "s3" else ()
    return _remote(scheme, settings, text if scheme not in ("s3",) else ""), _path_in(scheme, rest, text)


_S3_VARIABLES = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ACCESS_KEY_ID",
)


def _path_in(scheme: str, rest: str, text: str) -> str:
    if scheme in ("s3", "gs"):
        return unquote(rest).strip("/")
    try:
        return str(pafs.FileSystem.from_uri(text)[1])
    except (OSError, ValueError):
        from fsspec.core import url_to_fs

        return str(url_to_fs(text)[1])


@lru_cache(maxsize=16)
def _remote(scheme: str, settings: tuple[str, ...], text: str) -> Any:
    if scheme == "s3":
        endpoint, region = settings[0] or settings[1], settings[2] or settings[3]
        options: dict[str, Any] = {"region": region or "us-east-1"} if endpoint or region else {}
        if endpoint:
            options["scheme"], _, options["endpoint_override"] = endpoint.rstrip("/").partition("://")
        return pafs.S3FileSystem(**options)
    try:
        return pafs.FileSystem.from_uri(text)[0]
    except (OSError, ValueError):
        pass
    try:
        from fsspec.core import url_to_fs

        return pafs.PyFileSystem(pafs.FSSpecHandler(url_to_fs(text)[0]))
    except (ImportError, ValueError, OSError) as error:
        raise StorageError(f"cannot use the storage {text}: {error}") from None


def is_object_store(filesystem: Any) -> bool:
    """Whether folders there are only a manner of speaking (and need not be made)."""
    name = str(filesystem.type_name)
    return name in _OBJECT_STORES or any(kind in name for kind in ("s3", "gcs", "abfs", "memory"))


def make_parent(filesystem: Any, path: str) -> None:
    if not is_object_store(filesystem):
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)


def describe_refusal(error: BaseException, uri: str) -> StorageError | None:
    """The one line for an error that means the storage refused (full, no rights), looked for in the whole
    chain of causes, Ray's among them; None for any other error."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        cause = getattr(one, "cause", None)
        if isinstance(one, StorageError) and not isinstance(cause, StorageError):
            return one if one is error else StorageError(str(one))
        number = getattr(one, "errno", None)
        if isinstance(one, OSError) and number in _FULL:
            return StorageError(_full(one, uri))
        if isinstance(one, OSError) and number in _REFUSED and is_local(uri) and _concerns(one, uri):
            return StorageError(f"cannot write to {uri}: {os.strerror(int(number or 0)).lower()}")
        if number is None and isinstance(one, OSError) and "No space left on device" in str(one):
            return StorageError(_full(one, uri))
        # Ray's copy of a worker's exception is of the same class too, but reads as a traceback; its cause is
        # the exception itself. The list is a stack, so the cause is looked at first.
        todo += [one.__context__, one.__cause__, cause if isinstance(cause, BaseException) else None]
    return None


def _concerns(error: OSError, uri: str) -> bool:
    """Whether it is this storage that refused, and not some input; pyarrow names the file only in its
    message."""
    return uri in (os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error))


def _full(error: OSError, uri: str) -> str:
    place, free = uri, ""
    if is_local(uri):
        folder = Path(uri)
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        usage = shutil.disk_usage(folder)
        free = f" ({usage.free / 2**20:.1f} MiB of {usage.total / 2**20:.1f} MiB free there)"
    what = "disk quota exceeded" if error.errno == errno.EDQUOT else "no space left on device"
    return f"cannot write to {place}: {what}{free}"


@contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """Turns a refusal of the storage at ``uri`` into a StorageError of one line; other errors pass."""
    try:
        yield
    except Exception as error:
        told = describe_refusal(error, uri)
        if told is None or told is error:
            raise
        raise told from None


def list_files(filesystem: Any, path: str) -> dict[str, int]:
    """Relative path -> bytes of all files under ``path``; empty when there is no such folder."""
    selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
    prefix = path.rstrip("/") + "/"
    return {
        info.path[len(prefix) :]: int(info.size)
        for info in filesystem.get_file_info(selector)
        if info.type == pafs.FileType.File and info.path.startswith(prefix)
    }


def list_folders(filesystem: Any, path: str) -> list[str]:
    """Names of the folders directly under ``path``, sorted; empty when there is no such folder."""
    selector = pafs.FileSelector(path, recursive=False, allow_not_found=True)
    return sorted(i.base_name for i in filesystem.get_file_info(selector) if i.type == pafs.FileType.Directory)


def exists(filesystem: Any, path: str) -> bool:
    return bool(filesystem.get_file_info(path).type == pafs.FileType.File)


def read_bytes(filesystem: Any, path: str) -> bytes:
    with filesystem.open_input_stream(path, compression=None) as stream:
        return bytes(stream.read())


def write_bytes(filesystem: Any, path: str, data: bytes) -> None:
    make_parent(filesystem, path)
    with filesystem.open_output_stream(path, compression=None) as stream:
        stream.write(data)


def copy_file(filesystem: Any, source: str, target: str) -> None:
    """A second file of the same bytes, which nobody may change afterwards: on a local disk another name for them, on
    object storage copied where they lie."""
    make_parent(filesystem, target)
    if isinstance(filesystem, pafs.LocalFileSystem):
        try:
            os.link(source, target)
        except OSError:  # a file system without links, or two of them
            shutil.copyfile(source, target)
        return
    filesystem.copy_file(source, target)


@contextmanager
def local_copy(filesystem: Any, path: str) -> Iterator[Path]:
    """The folder itself where it is local, else a copy of it that is gone afterwards."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="kgray-copy-") as folder:
        pafs.copy_files(path, folder, source_filesystem=filesystem)
        yield Path(folder)


def delete_folder(filesystem: Any, path: str) -> None:
    """Removes a folder and all in it; not an error when it is gone already."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        filesystem.delete_dir(path)
    except FileNotFoundError:
        return


def checked_relative(relpath: str) -> str:
    """A path inside an artifact; ArtifactError for one that leads out of it or is reserved."""
    parts = relpath.split("/")
    if not relpath or relpath.startswith("/") or any(part in ("", ".", "..") for part in parts):
        raise ArtifactError(f"{relpath!r} is no path inside an artifact")
    return relpath
