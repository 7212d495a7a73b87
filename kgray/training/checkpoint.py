"""Everything a run needs to go on as if it had never stopped: weights, optimisers, RNG, position, best so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kgray.errors import TrainingError

FILE = "checkpoint.pt"


@dataclass
class Position:
    """Where a run stands.

    epoch, step: the next step to take. loss_sum, steps: running mean of the epoch under way.
    best: the best validation MRR so far and its epoch; stale: validations since. history: one row an epoch.
    best_weights: the model's state at the best validation. snapshots: at the end of each cycle so far but the last.
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
    torch.save(state, partial)
    partial.replace(folder / FILE)


def load_checkpoint(folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """Read a checkpoint; raises TrainingError when it is another run's. Weights only: no code is ever unpickled."""
    state: dict[str, Any] = torch.load(folder / FILE, map_location="cpu", weights_only=True)
    theirs = state["run"]
    for key, value in run.items():
        if theirs.get(key) != value:
            raise TrainingError(
                f"the checkpoint in {folder} is of another run: its {key} is {theirs.get(key)!r}, this run's "
                f"{value!r}; remove it or train under another storage.root"
            )
    return state
