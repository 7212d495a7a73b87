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


@FUSIONS.register("cross_attention")
class CrossAttentionFusion(nn.Module):
    """Text and structure as two tokens that attend to each other (Vaswani et al. 2017), their mean the result.

    Without a structural vector the text attends to itself alone.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.kinds = nn.Parameter(torch.randn(2, dim) * 0.1)
        self.attention = nn.MultiheadAttention(dim, 4 if dim % 4 == 0 else 2, batch_first=True)

    def forward(self, text: Tensor, structure: Tensor, has_structure: Tensor) -> Tensor:
        tokens = torch.stack([text, structure.to(text.dtype)], dim=1)
        places = tokens + self.kinds
        absent = torch.cat([torch.zeros_like(has_structure), ~has_structure], dim=1)
        seen, _ = self.attention(places, places, places, key_padding_mask=absent, need_weights=False)
        own = tokens + seen
        return torch.where(has_structure, own.mean(dim=1), own[:, 0])


@FUSIONS.register("lstm")
class RecurrentFusion(nn.Module):
    """The last state of an LSTM (Hochreiter & Schmidhuber 1997) over structure, then text, added to the text vector.

    Without a structural vector the sequence is the text alone.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(dim, dim)

    def forward(self, text: Tensor, structure: Tensor, has_structure: Tensor) -> Tensor:
        hidden, memory = self.cell(structure.to(text.dtype))
        begun = hidden * has_structure, memory * has_structure
        return text + self.cell(text, begun)[0]  # type: ignore[no-any-return]
