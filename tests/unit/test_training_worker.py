"""One worker's mistake is every worker's: nobody waits for it.

python3 -m pytest tests/unit/test_training_worker.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from kgray.errors import ConfigError, GraphStoreError
from kgray.training.worker import Worker


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    worker = Worker("cpu")

    def fails_on_the_second() -> int:
        if rank == 1:
            raise ConfigError("model.dim", 7, "an even number")
        return rank

    try:
        worker.together(fails_on_the_second)
        told = "nothing"
    except ConfigError as error:
        told = str(error)
    Path(folder, f"{rank}.txt").write_text(f"{told}, then {worker.together(lambda: rank)}")
    dist.destroy_process_group()


def test_all_ranks_raise_what_one_met(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    told = [Path(tmp_path, f"{rank}.txt").read_text() for rank in (0, 1)]
    assert all("model.dim" in one and "an even number" in one for one in told)
    assert [one[-1] for one in told] == ["0", "1"], "and they go on together"


def test_alone_it_is_the_call_itself() -> None:
    worker = Worker("cpu")
    assert worker.together(lambda: None) is None

    def lost() -> None:
        raise GraphStoreError("an owner is gone")

    with pytest.raises(GraphStoreError):
        worker.together(lost)
