"""A worker that keeps what it reports, and can die, for tests of resuming."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from kgray.training.worker import Worker


class StopError(Exception):
    """Stands for a death of the process."""


class Keeping(Worker):
    """Keeps every checkpoint in a folder; dies after ``last`` of them."""

    def __init__(self, folder: Path, last: int | None = None) -> None:
        super().__init__("cpu")
        self.folder, self.last = folder, last
        self.kept: list[Path] = []

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        assert checkpoint is not None
        self.kept.append(Path(shutil.copytree(checkpoint, self.folder / f"{len(self.kept)}")))
        if len(self.kept) == self.last:
            raise StopError
