"""FGM: the shift by hand on a linear model, and in the loop.

python3 -m pytest tests/unit/test_training_adversarial.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kept_checkpoints import Keeping, StopError
from model_graphs import SMALL, TRAIN, graph, vectors
from torch import nn

from kgray.errors import ConfigError
from kgray.model.paths_config import PathsConfig
from kgray.training.adversarial import shifted, watched, worst
from kgray.training.loop import Trainer, fit
from kgray.training.worker import Worker

EPSILON = 0.3


class Linear(nn.Module):
    """loss = mean over rows of (w . table[row])^2 / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3, sparse=True)
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 2.0]))

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        return ((self.table(rows) @ self.w) ** 2 / 2).mean()


def test_the_shift_and_its_gradients_are_those_made_by_hand() -> None:
    torch.manual_seed(0)
    model, rows = Linear(), torch.tensor([2, 0, 2])
    with torch.no_grad():
        model.table.weight[0] = torch.tensor([2.0, 2.0, 1.0])  # at right angles to w: no gradient, no shift
    table, w = model.table.weight.detach().clone(), model.w.detach().clone()
    with watched([model.table]) as seen:
        model.loss(rows).backward()  # type: ignore[no-untyped-call]
    with shifted([model.table], seen, EPSILON):
        adversarial = model.loss(rows)
        adversarial.backward()  # type: ignore[no-untyped-call]
    # The gradient of row x is (w . x) w / 3: its direction is that of w, its sign that of w . x.
    x = table[rows]
    dots = x @ w
    moved = x + EPSILON * dots.sign()[:, None] * (w / w.norm())
    torch.testing.assert_close(adversarial.detach(), ((moved @ w) ** 2 / 2).mean())
    torch.testing.assert_close(model.w.grad, ((dots[:, None] * x) + (moved @ w)[:, None] * moved).mean(0))
    want = torch.zeros(4, 3)
    for row, one, two in zip(rows.tolist(), dots, moved @ w, strict=True):
        want[row] += (one + two) * w / 3
    torch.testing.assert_close(model.table.weight.grad.to_dense(), want)  # type: ignore[union-attr]
    assert torch.equal(model.table.weight, table), "no weight is touched"
    assert not model.table._forward_hooks


def test_hooks_are_gone_after_an_error() -> None:
    model = Linear()
    with pytest.raises(IndexError), watched([model.table]):
        model.loss(torch.tensor([9]))
    assert not model.table._forward_hooks


def test_the_worst_shift_of_a_row_has_its_length() -> None:
    gradient = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0]])
    torch.testing.assert_close(worst(gradient, 0.5), torch.tensor([[0.3, 0.4], [0.0, 0.0], [0.5, 0.0]]))
    assert worst(None, 0.5) == 0.0


def test_shifted_inputs_have_a_higher_loss_and_both_are_told() -> None:
    still = replace(SMALL, dropout=0.0, text=replace(SMALL.text, dropout=0.0), gnn=replace(SMALL.gnn, dropout=0.0))
    still = replace(still, structure=replace(still.structure, drop=0.0))
    done = fit(graph(), vectors(), still, replace(TRAIN, adversarial=0.1))
    assert all(row["train.adversarial"] > row["train.loss"] for row in done.history)
    plain = fit(graph(), vectors(), still, TRAIN)
    assert "train.adversarial" not in plain.history[0]
    weights = done.model.state_dict(), plain.model.state_dict()
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("decoder", "precision"),
    [("complex", "bfloat16"), ("rotate", "float32"), ("lstm", "float32"), ("conve", "bfloat16")],
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, decoder: str, precision: str) -> None:
    model = replace(SMALL, decoder=decoder, fusion="cross_attention", gnn=replace(SMALL.gnn, kind="compgcn"))
    config = replace(TRAIN, adversarial=0.1, checkpoint_steps=2, accumulate=2, precision=precision)  # type: ignore
    undisturbed = fit(graph(), vectors(), model, config, Keeping(tmp_path / "a"))
    victim = Keeping(tmp_path / "b", last=2)
    with pytest.raises(StopError):
        fit(graph(), vectors(), model, config, victim)
    torch.manual_seed(99)
    resumed = fit(graph(), vectors(), model, config, Keeping(tmp_path / "c"), resume=victim.kept[-1])
    assert undisturbed.history == resumed.history
    for name, weight in undisturbed.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_a_model_without_vectors_of_entities_is_told() -> None:
    with pytest.raises(ConfigError, match=r"train\.adversarial"):
        Trainer(graph(), None, PathsConfig(), replace(TRAIN, adversarial=0.1), Worker("cpu"))
    with pytest.raises(ConfigError, match="adversarial"):
        replace(TRAIN, adversarial=-0.1)
