"""Checkpoints that were cut short, changed or never finished are known, named and passed over.

python3 -m pytest tests/unit/test_training_checkpoint.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import fs as pafs

sys.path.insert(0, str(Path(__file__).parent))

from kept_checkpoints import Keeping, StopError
from model_graphs import SMALL, TRAIN, graph, vectors

from kgray.artifact.manifest import sha256_stream
from kgray.errors import TrainingError
from kgray.training.checkpoint import FILE, SEAL, damage, newest_sound
from kgray.training.loop import Fit, fit

LOCAL = pafs.LocalFileSystem()


@pytest.fixture()
def run(tmp_path: Path) -> Path:
    """The folder of a run that died after three checkpoints."""
    worker = Keeping(tmp_path / "kept", last=3)
    with pytest.raises(StopError):
        fit(graph(), vectors(), SMALL, TRAIN, worker)
    folder = tmp_path / "run"
    folder.mkdir()
    for number, kept in enumerate(worker.kept, start=1):
        kept.rename(folder / f"epoch-{number:04d}-step-00000000-ab12")
    return folder


def truncate(folder: Path) -> None:
    file = folder / FILE
    file.write_bytes(file.read_bytes()[:-100])


def flip(folder: Path) -> None:
    data = bytearray((folder / FILE).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / FILE).write_bytes(data)


def unfinish(folder: Path) -> None:
    (folder / SEAL).unlink()


def empty(folder: Path) -> None:
    (folder / FILE).unlink()


def garble(folder: Path) -> None:
    (folder / SEAL).write_text('{"bytes": 12')


def test_the_seal_is_of_the_file_as_it_lies_there(run: Path) -> None:
    newest = max(run.iterdir())
    seal = json.loads((newest / SEAL).read_text())
    with (newest / FILE).open("rb") as stream:
        assert seal == {"file": FILE, "bytes": (newest / FILE).stat().st_size, "sha256": sha256_stream(stream)}
    assert newest_sound(LOCAL, str(run), print, expected=True) == str(newest)
    assert newest_sound(LOCAL, str(run / "nothing"), print, expected=False) is None


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (truncate, r"checkpoint\.pt has \d+ bytes instead of \d+"),
        (flip, r"has changed \(sha256 [0-9a-f]{12}\.\.\. instead of [0-9a-f]{12}"),
        (unfinish, "never finished"),
        (empty, r"checkpoint\.pt is missing"),
        (garble, "cannot be read"),
    ],
)
def test_a_damaged_one_is_told_and_the_one_before_it_taken(run: Path, harm: Callable[[Path], None], told: str) -> None:
    import re

    *_, before, newest = sorted(run.iterdir())
    harm(newest)
    said: list[str] = []
    assert newest_sound(LOCAL, str(run), lambda text, *values: said.append(text % values), expected=True) == str(before)
    assert len(said) == 1 and newest.name in said[0] and re.search(told, said[0])


def test_from_the_one_before_the_damaged_one_the_same_bits_follow(run: Path) -> None:
    truncate(max(run.iterdir()))
    found = newest_sound(LOCAL, str(run), print, expected=True)
    assert found is not None
    resumed: Fit = fit(graph(), vectors(), SMALL, TRAIN, resume=Path(found))
    assert resumed.history == fit(graph(), vectors(), SMALL, TRAIN).history


def test_where_all_are_damaged_nothing_is_thrown_away(run: Path) -> None:
    for folder in run.iterdir():
        flip(folder)
    with pytest.raises(TrainingError, match=r"no checkpoint in .*run can be trusted \(epoch-0003.*remove that folder"):
        newest_sound(LOCAL, str(run), print, expected=True)
    assert damage(LOCAL, str(max(run.iterdir()))) is not None
    # Where none was ever finished, a half-copied one is no loss.
    assert newest_sound(LOCAL, str(run), print, expected=False) is None
