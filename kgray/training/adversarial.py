"""Adversarial training of the inputs (FGM, Miyato et al. 2017).

After the gradient of a step is known, the vectors that entities enter the model with are moved a little to where the
loss grows fastest, and the loss there is trained as well. The vectors are what some modules give (rows of a table, a
projection of text), so hooks on those modules see and move them: no weight is touched, and no table copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_TINY = torch.finfo(torch.float32).tiny

Record = list[list[Tensor]]
"""Outputs (n, d) of each watched module, in the order of its calls."""


@contextmanager
def watched(modules: Sequence[nn.Module]) -> Iterator[Record]:
    """Keep what the modules give, gradients and all, while the context lasts."""
    seen: Record = [[] for _ in modules]

    def keep(place: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.retain_grad()
            seen[place].append(output)

        return hook

    with _hooked(modules, keep):
        yield seen


@contextmanager
def shifted(modules: Sequence[nn.Module], seen: Record, epsilon: float) -> Iterator[None]:
    """Add to what the modules give now the worst shift of length ``epsilon``, by the gradients of what was ``seen``.

    The calls must be those of :func:`watched`, in their order.
    """
    shifts = [iter([worst(output.grad, epsilon) for output in outputs]) for outputs in seen]

    def add(place: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda module, inputs, output: output + next(shifts[place])

    with _hooked(modules, add):
        yield


@torch.no_grad()
def worst(gradient: Tensor | None, epsilon: float) -> Tensor | float:
    """(n, d) gradient of a loss -> (n, d): epsilon g / ||g|| of each row, 0 where the gradient is."""
    if gradient is None:
        return 0.0
    # Largest entry first: squares of small gradients would be lost.
    unit = gradient.float() / gradient.float().abs().amax(dim=1, keepdim=True).clamp(min=_TINY)
    norms = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
    shift: Tensor = epsilon * unit / norms.clamp(min=1.0)
    return shift.to(gradient.dtype)


@contextmanager
def _hooked(modules: Sequence[nn.Module], hook: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook(place)) for place, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
