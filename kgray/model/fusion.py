"""How the text vector and the structural vector of an entity become one, S_e = fuse(C_e, R_e).

Every fusion takes ``text`` (n, d), ``structure`` (n, d) and ``has_structure`` (n, 1) and gives (n, d); where an
entity has no structural vector the text alone must carry it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kgray.model.registry import Registry

FUSIONS: Registry[type[nn.Module]] = Registry("model.fusion")


@FUSIONS.register("gated")
class GatedFusion(nn.Module):
    """A gate an entity and dimension: g * text + (1 - g) * structure (GMU, Arevalo et al. 2017)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * dim, dim)

    def forward(self, text: Tensor, structure: Tensor, has_structure: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(torch.cat([text, structure], dim=1)))
        return torch.where(has_structure, gate * text + (1 - gate) * structure, text)


@FUSIONS.register("weighted")
class WeightedFusion(nn.Module):
    """One learned weight a dimension, the same for all entities."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(dim))

    def forward(self, text: Tensor, structure: Tensor, has_structure: Tensor) -> Tensor:
        weight = torch.sigmoid(self.logit)
        return torch.where(has_structure, weight * text + (1 - weight) * structure, text)


@FUSIONS.register("late")
class LateFusion(nn.Module):
    """The text alone: structure then speaks through neighbours and through the decoder of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, text: Tensor, structure: Tensor, has_structure: Tensor) -> Tensor:
        return text


@FUSIONS.register("concat")
class ConcatFusion(nn.Module):
    """A linear map of both, added to the text vector."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * dim, dim)

    def forward(self, text: Tensor, structure: Tensor, has_structure: Tensor) -> Tensor:
        return text + self.mix(torch.cat([text, structure * has_structure], dim=1))  # type: ignore[no-any-return]
