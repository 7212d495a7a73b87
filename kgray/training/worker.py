"""What the training loop needs to know of where it runs: one process, or one of several under torch.distributed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)


class Worker:
    """A worker alone in a notebook, a test or on a GPU box; Ray Train's workers derive from it.

    report is called by every rank equally often, with a checkpoint folder on rank 0 only.
    """

    def __init__(self, device: str = "auto") -> None:
        # oneDNN keeps a compiled kernel for each shape it has met, and sampled blocks have a new shape every step: its
        # default of 1,024 grew a worker by gigabytes an hour. Read by oneDNN at its first product.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.device = torch.device(kind)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        """Called after every checkpoint and validation; nothing to tell anyone here."""

    def say(self, message: str, *values: object) -> None:
        """Log on rank 0 only."""
        if self.rank == 0:
            log.info(message, *values)

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks, in rank order; (sum of counts, d) from (counts[rank], d).

        A row's gradient is the sum of what all ranks' losses ask of it, so that after :meth:`average_gradients` the
        weights move as if one worker had computed the mean of those losses. Every rank must call backward.
        """
        if self.world == 1:
            return rows
        gathered: Tensor = _GatherRows.apply(rows, tuple(counts), self.rank)  # type: ignore[no-untyped-call]
        return gathered

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its mean over the workers; row-sparse ones stay sparse.

        Dense gradients travel as one flat tensor: one exchange a step instead of one a parameter.
        """
        if self.world == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        dense = [g for g in grads if not g.is_sparse]
        flat = torch.cat([g.reshape(-1) for g in dense])
        dist.all_reduce(flat)
        flat /= self.world
        offset = 0
        for grad in dense:
            grad.copy_(flat[offset : offset + grad.numel()].view_as(grad))
            offset += grad.numel()
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = self._average_sparse(parameter.grad)

    def _average_sparse(self, grad: Tensor) -> Tensor:
        grad = grad.coalesce()
        rows, values = grad.indices()[0], grad.values()
        counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
        longest = int(max(int(c) for c in counts))
        all_rows = _all_gather(rows, longest)
        all_values = _all_gather(values, longest)
        keep = [slice(0, int(c)) for c in counts]
        together = torch.cat([r[k] for r, k in zip(all_rows, keep, strict=True)])
        summed = torch.cat([v[k] for v, k in zip(all_values, keep, strict=True)]) / self.world
        return torch.sparse_coo_tensor(together[None], summed, grad.shape, check_invariants=False).coalesce()


class _GatherRows(torch.autograd.Function):
    """See :meth:`Worker.gather_rows`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: tuple[int, ...], rank: int) -> Tensor:  # type: ignore[override]
        ctx.own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        parts = _all_gather(rows, max(counts))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[ctx.own], None, None


def _all_gather(part: Tensor, longest: int) -> list[Tensor]:
    """The (n, ...) parts of all ranks, n at most ``longest``, each padded to it."""
    padded = part.new_zeros((longest, *part.shape[1:]))
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded)
    return parts
