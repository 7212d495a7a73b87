"""Who is building what: advisory locks that a dead process cannot keep."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kgray.errors import ArtifactError

log = logging.getLogger(__name__)
_held = threading.local()


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Holds the lock file ``path``, waiting (and saying so) while another live process or thread holds it.

    The kernel releases it when the process dies. Where the file system knows no locks, it does nothing.
    Raises ArtifactError when this thread holds it already, which would wait for ever.
    """
    mine: set[Path] = _held.__dict__.setdefault("paths", set())
    if path in mine:
        raise ArtifactError(f"{what} is being built by this very thread")
    handle = _acquire(path, what, wait=True)
    mine.add(path)
    try:
        yield
    finally:
        mine.discard(path)
        if handle is not None:
            path.unlink(missing_ok=True)  # before the release: see _acquire
            os.close(handle)


def is_free(path: Path) -> bool:
    """Whether nobody alive holds the lock (any more)."""
    handle = _acquire(path, "", wait=False)
    if handle is None:
        return False
    path.unlink(missing_ok=True)
    os.close(handle)
    return True


def _acquire(path: Path, what: str, wait: bool) -> int | None:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    os.close(handle)
                    return None
                log.info("waiting for another process that is building %s", what)
                fcntl.flock(handle, fcntl.LOCK_EX)
            # The one before us removes the file; whoever waited on that file locked a name nobody else will
            # see.
            if os.fstat(handle).st_ino == path.stat().st_ino:
                return handle
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
                return None
            raise
        os.close(handle)
