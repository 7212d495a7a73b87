"""The two sides of an entity: its text vector C_e and its structural vector R_e."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kgray.model.config import StructureConfig, TextTowerConfig
from kgray.phases import counted, phase


class FrozenText(nn.Module):
    """A trained projection of stored text vectors.

    The vectors themselves are no parameters and are not saved with the model: they belong to the ``vectors``
    artifact. An all-zero row means "no text" and becomes one learned vector.
    """

    vectors: Tensor

    def __init__(self, config: TextTowerConfig, vectors: Tensor, dim: int) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors, persistent=False)
        width = vectors.shape[1]
        self.linear = nn.Linear(width, dim)
        self.mlp = (
            nn.Sequential(
                nn.Linear(width, config.hidden),
                nn.GELU(),
                nn.Dropout(config.dropout),
                nn.Linear(config.hidden, dim),
            )
            if config.hidden
            else None
        )
        self.missing = nn.Parameter(torch.zeros(dim))

    def forward(self, rows: Tensor, new: Tensor | None = None) -> Tensor:
        """(n,) ids -> (n, dim). new: (m, width) text vectors of entities without stored ones, whose ids follow."""
        with phase("fetching"):
            counted("rows", len(rows))
            if new is None:
                text = self.vectors[rows]
            else:
                count = len(self.vectors)
                text = self.vectors[rows.clamp(max=count - 1)]
                text[rows >= count] = new[rows[rows >= count] - count].to(text.dtype)
        with phase("encoding"):
            return self.project(text.to(self.linear.weight.dtype))

    def project(self, text: Tensor) -> Tensor:
        """(n, width) text vectors of any entity, known or new -> (n, dim)."""
        out = self.linear(text)
        if self.mlp is not None:
            out = out + self.mlp(text)
        absent = (text == 0).all(dim=1, keepdim=True)
        return torch.where(absent, self.missing.to(out.dtype), out)


class Table(nn.Embedding):
    """Vectors that Adagrad moves (see Optimisers): a rare row then takes steps as large as a frequent one."""


class StructuralTable(nn.Module):
    """One learned vector an entity; entities without a training triple, and new ones beyond the table, have none.

    With sparse gradients a step touches the rows of its batch, whatever the size of the table; where every row is in
    every step, dense ones are quicker.
    """

    present: Tensor

    def __init__(self, config: StructureConfig, present: Tensor, dim: int, *, sparse: bool) -> None:
        super().__init__()
        self.register_buffer("present", present, persistent=True)
        self.table = Table(len(present), dim, sparse=sparse)
        nn.init.normal_(self.table.weight, std=config.init_scale)
        self.drop = config.drop

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) ids -> (n, dim) vectors and (n, 1) whether the entity has one."""
        stored = rows.clamp(max=len(self.present) - 1)
        has = self.present[stored] & (rows == stored)
        if self.training and self.drop:
            has = has & (torch.rand(len(rows), device=rows.device) >= self.drop)
        mask = has[:, None]
        with phase("fetching"):
            counted("rows", len(rows))
            vectors = self.table(stored)
        return vectors * mask, mask
