"""Optimisers of the fused model and their common schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kgray.model.towers import Table
from kgray.training.config import OptimiserConfig


class Optimisers:
    """AdamW for dense weights and Adagrad (Duchi et al. 2011) for tables of vectors, moved together.

    cycles: weight updates of each fall of the learning rate, in order; the schedule is a function of the update's
    number alone.
    """

    def __init__(self, model: nn.Module, config: OptimiserConfig, cycles: Sequence[int]) -> None:
        self.config = config
        self.cycles = tuple(cycles)
        self.updates = 0
        tables = [m.weight for m in model.modules() if isinstance(m, Table)]
        others = {id(table) for table in tables}
        self.dense = [p for p in model.parameters() if id(p) not in others]
        self.tables = tables
        self._optimisers: list[tuple[torch.optim.Optimizer, float]] = []
        if self.dense:
            adam = torch.optim.AdamW(self.dense, lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
            self._optimisers.append((adam, config.lr))
        if self.tables:
            # torch warns until somebody decides; gradients of an embedding are well-formed by construction.
            torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
            self._optimisers.append((torch.optim.Adagrad(self.tables, lr=config.table_lr), config.table_lr))

    def factor(self, update: int) -> float:
        """What the peak learning rates are multiplied by at this update."""
        *earlier, last = self.cycles
        steps = last
        for cycle in earlier:
            if update < cycle:
                steps = cycle
                break
            update -= cycle
        warmup = self.config.warmup * steps
        rise = min(1.0, (update + 1) / warmup) if warmup else 1.0
        done = min(1.0, update / max(1, steps))
        if self.config.schedule == "linear":
            return rise * (1 - done)
        if self.config.schedule == "cosine":
            return rise * 0.5 * (1 + math.cos(math.pi * done))
        return rise

    def step(self) -> None:
        """Clip the dense gradient, move the weights, forget the gradients."""
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.dense, self.config.clip_norm)
        factor = self.factor(self.updates)
        for optimiser, peak in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = peak * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.updates += 1

    def rehearse(self) -> None:
        """All the work of a step, at a learning rate of 0, and the gradients forgotten: no weight moves. To be followed
        by :meth:`forget` before the first real step."""
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.dense, self.config.clip_norm)
        for optimiser, _ in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = 0.0
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def forget(self) -> None:
        """The state before the first step."""
        for optimiser, _ in self._optimisers:
            if isinstance(optimiser, torch.optim.Adagrad):  # made with the optimiser, not at its first step
                start = optimiser.defaults["initial_accumulator_value"]
                for state in optimiser.state.values():
                    state["step"].zero_()
                    state["sum"].fill_(start)
            else:
                optimiser.state.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "optimisers": [o.state_dict() for o, _ in self._optimisers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for (optimiser, _), saved in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
