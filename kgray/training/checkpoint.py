"""Everything a run needs to go on as if it had never stopped: weights, optimisers, RNG, position, best so far.

A checkpoint is a folder of ``checkpoint.pt`` and, written after it, ``checkpoint.json`` with its size and sha256. Both
were computed from what was meant to be written, so a copy that is cut short or has changed is known for one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kgray.artifact.filesystem import join, list_folders, read_bytes
from kgray.artifact.manifest import sha256_stream
from kgray.errors import TrainingError

FILE = "checkpoint.pt"
SEAL = "checkpoint.json"
PREFIX = "epoch-"
"""How the folders of a run's checkpoints begin; their names sort by age."""


@dataclass
class Position:
    """Where a run stands.

    epoch, step: the next step to take; a step is one of all workers together, however many they are.
    loss_sum, steps: running mean of the epoch under way.
    best: the best validation MRR so far and its epoch; stale: validations since. history: one row an epoch.
    best_weights: the model's state at the best validation. snapshots: at the end of each cycle so far but the last.
    phases: where the time went, a row an epoch. parts: batches a share of a step is computed in.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    best: float = -1.0
    best_epoch: int = -1
    stale: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    snapshots: list[dict[str, Tensor]] = field(default_factory=list)
    phases: list[dict[str, Any]] = field(default_factory=list)
    parts: int = 1


class _Hashing:
    """A stream that is hashed as it is written."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()


def save_checkpoint(
    folder: Path,
    run: Mapping[str, Any],
    position: Position,
    model: Mapping[str, Tensor],
    optimisers: Mapping[str, Any],
) -> None:
    """Write the checkpoint of a worker into ``folder``; ``run`` says whose it is (graph version, configuration)."""
    state = {
        "run": dict(run),
        "position": dict(vars(position)),
        "model": dict(model),
        "optimisers": dict(optimisers),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    partial = folder / (FILE + ".part")
    with partial.open("wb") as stream:
        hashing = _Hashing(stream)
        torch.save(state, hashing)  # type: ignore[arg-type]
    partial.replace(folder / FILE)
    seal = {"file": FILE, "bytes": hashing.size, "sha256": hashing.digest.hexdigest()}
    (folder / SEAL).write_text(json.dumps(seal) + "\n")


def load_checkpoint(folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """Read a checkpoint; raises TrainingError when it is another run's. Weights only: no code is ever unpickled."""
    state: dict[str, Any] = torch.load(folder / FILE, map_location="cpu", weights_only=True)
    theirs = state["run"]
    for key in sorted(run.keys() | theirs.keys()):
        if theirs.get(key) != run.get(key):
            raise TrainingError(
                f"the checkpoint in {folder} is of another run: its {key} is {theirs.get(key)!r}, this run's "
                f"{run.get(key)!r}; remove it or train under another storage.root"
            )
    return state


def damage(filesystem: Any, folder: str) -> str | None:
    """What is wrong with the checkpoint in a folder of a pyarrow filesystem, in a few words; None where nothing is."""
    try:
        seal = json.loads(read_bytes(filesystem, join(folder, SEAL)))
        wanted, digest = int(seal["bytes"]), str(seal["sha256"])
    except FileNotFoundError:
        return f"it has no {SEAL}, so it was never finished"
    except (ValueError, KeyError, TypeError):
        return f"its {SEAL} cannot be read"
    try:
        with filesystem.open_input_stream(join(folder, FILE), compression=None) as stream:
            found = sha256_stream(stream)
    except FileNotFoundError:
        return f"{FILE} is missing"
    size = int(filesystem.get_file_info(join(folder, FILE)).size)
    if size != wanted:
        return f"{FILE} has {size} bytes instead of {wanted}"
    if found != digest:
        return f"{FILE} has changed (sha256 {found[:12]}... instead of {digest[:12]}...)"
    return None


def newest_sound(filesystem: Any, run: str, say: Callable[..., None], *, expected: bool) -> str | None:
    """The path of the newest checkpoint in a run's folder that is as it was written; None where there is none.

    Others are told and passed over: a worker that died may have left one half-copied. expected: whether one was
    finished for sure. Raises TrainingError where then none is sound: beginning anew would throw away work.
    """
    names = [name for name in list_folders(filesystem, run) if name.startswith(PREFIX)]
    wrong = []
    for name in reversed(names):
        problem = damage(filesystem, join(run, name))
        if problem is None:
            return join(run, name)
        wrong.append(f"{name}: {problem}")
        say("checkpoint %s/%s is damaged: %s; looking for the one before it", run, name, problem)
    if expected:
        raise TrainingError(
            f"no checkpoint in {run} can be trusted ({'; '.join(wrong[:3]) or 'they are gone'}): put a good copy "
            "there, or remove that folder to train from the start"
        )
    return None
