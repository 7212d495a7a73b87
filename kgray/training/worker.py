"""What the training loop needs to know of where it runs: one process, or one of several under torch.distributed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from kgray.errors import GraphStoreError, UserError
from kgray.phases import Phases, Spent, counted, phase

log = logging.getLogger(__name__)

T = TypeVar("T")


class Worker:
    """A worker alone in a notebook, a test or on a GPU box; Ray Train's workers derive from it.

    report is called by every rank equally often, with a checkpoint folder on rank 0 only. watch: where this worker's
    time goes.
    """

    def __init__(self, device: str = "auto") -> None:
        # oneDNN keeps a compiled kernel for each shape it has met, and sampled blocks have a new shape every step: its
        # default of 1,024 grew a worker by gigabytes an hour. Read by oneDNN at its first product.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.device = torch.device(kind)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.watch = Phases()

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        """Called after every checkpoint and validation; nothing to tell anyone here."""

    def shares(self, workers: int) -> int:
        """Into how many shares a step's triples are split where ``workers`` are configured: one for each of those, be
        there fewer here, who then take several."""
        return max(workers, self.world)

    def spent(self, spent: Spent) -> None:
        """Called on every rank with what it spent of late (once an epoch); nobody to tell here."""

    def say(self, message: str, *values: object) -> None:
        """Log on rank 0 only."""
        if self.rank == 0:
            log.info(message, *values)

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with phase("waiting"):
            dist.all_gather_object(values, value)
        return values

    def together(self, make: Callable[[], T]) -> T:
        """What ``make`` gives, or on every rank the UserError of the first that had one: the others would wait for it,
        and what the user did wrong would be told as their impatience. GraphStoreError is no one's mistake."""
        made, trouble = None, None
        try:
            made = make()
        except GraphStoreError:
            raise
        except UserError as error:
            trouble = error
        first = next((error for error in self.gather(trouble) if error is not None), None)
        if first is not None:
            raise first
        return cast(T, made)

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks, in rank order; (sum of counts, d) from (counts[rank], d).

        A row's gradient is the sum of what all ranks' losses ask of it, so that after :meth:`average_gradients` the
        weights move as if one worker had computed the mean of those losses. Every rank must call backward.
        """
        if self.world == 1:
            return rows
        with phase("exchange"):
            gathered: Tensor = _GatherRows.apply(rows, tuple(counts), self.rank)  # type: ignore[no-untyped-call]
            counted("exchanged bytes", rows.numel() * rows.element_size())
        return gathered

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter], shares: int | None = None) -> None:
        """Replace every gradient by the sum over the workers, divided by ``shares`` (by default one a worker).

        Row-sparse ones stay sparse. Dense gradients travel as one flat tensor: one exchange a step instead of one a
        parameter.
        """
        shares = shares or self.world
        held = [p for p in parameters if p.grad is not None]
        if self.world == 1:
            if shares > 1:
                for gradient in [p.grad for p in held if p.grad is not None]:
                    gradient /= shares
            return
        self._meet()
        with phase("exchange"):
            dense = [p.grad for p in held if p.grad is not None and not p.grad.is_sparse]
            flat = torch.cat([g.reshape(-1) for g in dense])
            dist.all_reduce(flat)
            counted("exchanged bytes", flat.numel() * flat.element_size())
            flat /= shares
            offset = 0
            for grad in dense:
                grad.copy_(flat[offset : offset + grad.numel()].view_as(grad))
                offset += grad.numel()
            for parameter in held:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    parameter.grad = self._average_sparse(parameter.grad, shares)

    def _meet(self) -> None:
        """Wait for the slowest worker, so that the exchange itself can be told from waiting for it. Only where it costs
        next to nothing: on a GPU it would make the device wait."""
        if self.device.type == "cpu":
            with phase("waiting"):
                dist.barrier()

    def _average_sparse(self, grad: Tensor, shares: int) -> Tensor:
        grad = grad.coalesce()
        rows, values = grad.indices()[0], grad.values()
        counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
        longest = int(max(int(c) for c in counts))
        all_rows = _all_gather(rows, longest)
        all_values = _all_gather(values, longest)
        row = rows.element_size() + values[0].numel() * values.element_size() if len(values) else 0
        counted("exchanged bytes", len(rows) * row)
        keep = [slice(0, int(c)) for c in counts]
        together = torch.cat([r[k] for r, k in zip(all_rows, keep, strict=True)])
        summed = torch.cat([v[k] for v, k in zip(all_values, keep, strict=True)]) / shares
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
        with phase("exchange"):
            grad = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad)
            counted("exchanged bytes", grad.numel() * grad.element_size())
        return grad[ctx.own], None, None


def _all_gather(part: Tensor, longest: int) -> list[Tensor]:
    """The (n, ...) parts of all ranks, n at most ``longest``, each padded to it."""
    padded = part.new_zeros((longest, *part.shape[1:]))
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded)
    return parts
