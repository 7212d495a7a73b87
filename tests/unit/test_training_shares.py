"""A step's shares: whoever computes them, and in how many parts, the weights move alike.

python3 -m pytest tests/unit/test_training_shares.py
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))

from kept_checkpoints import Keeping, StopError
from model_graphs import ONE_VS_ALL, SMALL, TRAIN, graph, vectors

from kgray.errors import TrainingError
from kgray.model.paths_config import PathsConfig
from kgray.model.relations_config import RelationsConfig
from kgray.training.loop import Trainer, fit
from kgray.training.worker import Worker

CALM = replace(ONE_VS_ALL, dropout=0.0, text=replace(SMALL.text, dropout=0.0), gnn=replace(SMALL.gnn, dropout=0.0))
CALM = replace(CALM, structure=replace(SMALL.structure, drop=0.0))
FOUR = replace(TRAIN, batch_size=4, workers=4, epochs=2)


def gradients(trainer: Trainer, step: int) -> dict[str, torch.Tensor]:
    batches = trainer.batches.epoch(0, step)
    trainer.model.train()
    trainer.compute(step, batches)
    batches.close()
    trainer.worker.average_gradients(trainer.model.parameters(), trainer.batches.world)
    return {n: p.grad.to_dense().clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("model", "reads"),
    [
        (CALM, True),
        (replace(CALM, gnn=replace(CALM.gnn, remove="pair")), True),
        (PathsConfig(layers=2, dim=8, dropout=0.0, remove_batch=True, edge_drop=0.2), False),
        (RelationsConfig(text=False, dim=8, hidden=8, bodies=20, dropout=0.0, drop=0.0), False),
    ],
)
@pytest.mark.parametrize("batch_size", [16, 15])
def test_two_halves_have_the_gradients_of_the_whole(model: Any, reads: bool, batch_size: int) -> None:
    config = replace(TRAIN, batch_size=batch_size)
    read = vectors() if reads else None
    whole, halves = (Trainer(graph(), read, model, config, Worker("cpu"), parts=parts) for parts in (1, 2))
    for step in (0, whole.batches.steps - 1):
        torch.manual_seed(0)
        expected = gradients(whole, step)
        torch.manual_seed(0)
        found = gradients(halves, step)
        assert expected.keys() == found.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        for trainer in (whole, halves):
            trainer.model.zero_grad(set_to_none=True)


def test_halves_of_sampled_candidates_ask_for_every_triple_once() -> None:
    trainer = Trainer(graph(), vectors(), SMALL, TRAIN, Worker("cpu"), parts=2)
    batches = trainer.batches
    for step in range(batches.steps):
        pieces = batches.pieces(step)
        whole = batches._positions(0, step)
        assert [len(batches._positions(0, step, piece)) for piece in pieces] == [piece.triples for piece in pieces]
        assert sum(piece.triples for piece in pieces) == len(whole) == pieces[0].of
        made = [batches.make(0, step, piece) for piece in pieces]
        asked = torch.cat([batch.neighbourhood.nodes[batch.head[: len(batch.head) // 2]] for batch in made])
        assert asked.tolist() == batches.triples[whole, 0].tolist()
    assert "not the same" in trainer.task.halves


def test_one_worker_of_two_shares_trains_as_itself_alone_and_says_whose_checkpoints_it_reads(tmp_path: Path) -> None:
    victim = Keeping(tmp_path / "a", last=3)
    config = replace(FOUR, checkpoint_steps=2)
    undisturbed = fit(graph(), vectors(), SMALL, config)
    with pytest.raises(StopError):
        fit(graph(), vectors(), SMALL, config, victim)
    torch.manual_seed(99)
    resumed = fit(graph(), vectors(), SMALL, config, resume=victim.kept[-1])
    assert resumed.history == undisturbed.history
    with pytest.raises(TrainingError, match="another run: its shares is 4, this run's 2"):
        fit(graph(), vectors(), SMALL, replace(config, workers=2), resume=victim.kept[-1])


def _worker(rank: int, world: int, port: int, folder: str, died: str) -> None:
    """Trains FOUR on ``world`` workers, from the checkpoint ``died`` if that is a path; rank 0 keeps checkpoints."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.set_num_threads(1)

    class Rank(Worker):
        def report(self, metrics: Any, checkpoint: Path | None) -> None:
            if checkpoint is not None:
                (Path(folder) / f"{int(metrics['epoch'])}-{int(metrics.get('step', 0))}.pt").write_bytes(
                    (checkpoint / "checkpoint.pt").read_bytes()
                )

    done = fit(
        graph(), vectors(), SMALL, replace(FOUR, checkpoint_steps=2), Rank("cpu"), resume=Path(died) if died else None
    )
    if rank == 0:
        torch.save({"model": done.model.state_dict(), "phases": done.phases}, Path(folder) / "done.pt")
    dist.destroy_process_group()


def _spawn(world: int, folder: Path, died: str = "", spawn: Callable[..., Any] = mp.spawn) -> dict[str, Any]:
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_worker, args=(world, port, str(folder), died), nprocs=world)
    return torch.load(folder / "done.pt", weights_only=False)  # type: ignore[no-any-return]


def test_fewer_workers_go_on_where_more_had_stopped(tmp_path: Path) -> None:
    """Of four configured workers three are there, then one: the same samples, candidates and dropout, sums in another
    order."""
    alone = fit(graph(), vectors(), SMALL, replace(FOUR, checkpoint_steps=2))
    three = _spawn(3, tmp_path / "three")
    left = tmp_path / "left"
    left.mkdir()
    (tmp_path / "three" / "0-4.pt").rename(left / "checkpoint.pt")
    resumed = fit(graph(), vectors(), SMALL, replace(FOUR, checkpoint_steps=2), resume=left)
    for name, value in alone.model.state_dict().items():
        for other in (three["model"], resumed.model.state_dict()):
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)
    row = next(row for row in three["phases"] if row["part"] == "epoch 1")
    assert row["ranks"] == 3 and row["counts"]["triples"] == len(graph().triples["train"])
    assert row["counts"]["exchanged bytes"] > 0 and row["seconds"]["exchange"][0] > 0
