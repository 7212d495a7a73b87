"""Every family's training tells where its time went.

python3 -m pytest tests/unit/test_training_phases.py
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from kept_checkpoints import Keeping, StopError
from model_graphs import ONE_VS_ALL, SMALL, TRAIN, graph, vectors

from kgray.model.paths_config import PathsConfig
from kgray.model.relations_config import RelationsConfig
from kgray.phases import PHASES, Spent
from kgray.training.loop import Fit, fit
from kgray.training.worker import Worker


class Listening(Worker):
    """Keeps what it is told, as a Ray worker passes it on to Ray's metrics."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.heard: list[Spent] = []
        self.reports: list[dict[str, float]] = []

    def spent(self, spent: Spent) -> None:
        self.heard.append(spent)

    def report(self, metrics: Any, checkpoint: Path | None) -> None:
        self.reports.append(dict(metrics))


def rows_of(done: Fit) -> list[str]:
    return [str(row["part"]) for row in done.phases]


@pytest.mark.parametrize(
    ("model", "reads", "spent", "counts"),
    [
        (SMALL, True, {"fetching", "encoding"}, {"triples", "edges", "rows"}),
        (replace(ONE_VS_ALL, gnn=replace(SMALL.gnn, kind="none")), True, {"fetching", "encoding"}, {"triples", "rows"}),
        (PathsConfig(layers=2, dim=8), False, set(), {"triples"}),
        (RelationsConfig(text=False, dim=8, hidden=8, bodies=20), False, {"fetching"}, {"triples", "rows"}),
    ],
)
def test_a_training_tells_where_its_time_went(model: Any, reads: bool, spent: set[str], counts: set[str]) -> None:
    worker, data = Listening(), graph()
    done = fit(data, vectors() if reads else None, model, replace(TRAIN, epochs=2), worker)
    assert rows_of(done) == ["start", "epoch 1", "epoch 2", "end"]
    for row in done.phases[1:3]:
        # Seconds are rounded to the microsecond, a dozen of them.
        assert sum(mean for _, mean, _ in row["seconds"].values()) == pytest.approx(row["wall"][1], abs=1e-4)
        assert {"waiting", "forward", "backward", "optimiser", "evaluation"} | spent <= set(row["seconds"])
        assert set(row["seconds"]) <= {*PHASES, "other"} and set(row["counts"]) == counts
        assert row["counts"]["triples"] == len(data.triples["train"]) and row["ahead"]["sampling"][1] > 0
        assert row["calls"]["backward"] >= row["calls"]["optimiser"] == done.task.batches.steps
    assert "checkpointing" not in done.phases[1]["seconds"], "the first is written after the row"
    assert done.phases[2]["calls"]["checkpointing"] == 1 and len(worker.heard) == 4
    assert worker.reports[0]["seconds.forward"] == done.phases[1]["seconds"]["forward"][1]
    assert "seconds.forward" not in done.history[0], "history stays what the same seed gives again"


def test_the_epoch_s_line_tells_the_largest_phases(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kgray")
    fit(graph(), vectors(), SMALL, replace(TRAIN, epochs=1))
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("epoch 1 of 1")]
    assert "%" in line and any(f"{name} " in line for name in ("forward", "backward", "evaluation"))


def test_a_resumed_run_keeps_the_rows_of_before(tmp_path: Path) -> None:
    worker = Keeping(tmp_path, last=2)
    with pytest.raises(StopError):
        fit(graph(), vectors(), SMALL, TRAIN, worker)
    done = fit(graph(), vectors(), SMALL, TRAIN, resume=worker.kept[-1])
    assert rows_of(done) == ["start", "epoch 1", "epoch 2", "resume", "epoch 3", "end"]
