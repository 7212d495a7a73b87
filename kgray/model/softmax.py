"""Softmax cross-entropy of inner products, with its gradients, in one pass over the scores.

Written plainly, a (q, u) matrix of scores is stored and read again eight times over: product, float32 copy, correction,
mask, log-softmax, and as much on the way back. Here rows of scores are made, turned into gradients and handed to the
next product while they lie in the cache; of the whole matrix only the gradients are kept, in the type of the product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS = 128
"""Rows a product makes at once on a CPU: enough for its kernels, few enough for the cache."""

_CACHED = 1 << 18
"""Float32 scores worked on at once on a CPU, 1 MiB; elsewhere there is no cache to keep them in."""

KEPT_ON_CPU = 1 << 26
_KEPT = {"cpu": KEPT_ON_CPU}
_KEPT_ELSEWHERE = 1 << 28
"""Gradients of scores kept at once: a larger matrix is gone through in several parts."""


def product_softmax_loss(
    queries: Tensor,
    candidates: Tensor,
    gold: Tensor,
    known: tuple[Tensor, Tensor],
    log_inclusion: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The mean over queries of the cross-entropy of their softmax over ``queries @ candidates.T``, a float32 scalar.

    queries (q, d), candidates (u, d) floating; gold (q,) int64 column of the true answer. known: rows, ascending, and
    columns (m,) int64 of scores left out of the softmax, each pair once, no gold one among them. log_inclusion (u,)
    float32 is subtracted from every row. label_smoothing: the share of probability spread evenly over what is not left
    out. Products are in autocast's type where autocast is on; everything else is in float32, and the same input gives
    the same bits. Gradients flow to queries and candidates, once.
    """
    device = queries.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    with torch.autocast(device, enabled=False):
        loss: Tensor = _ProductSoftmax.apply(  # type: ignore[no-untyped-call]
            queries, candidates, gold, known, log_inclusion, label_smoothing, dtype
        )
    return loss


class _ProductSoftmax(torch.autograd.Function):
    """The gradients are computed with the loss, while the scores are at hand; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        candidates: Tensor,
        gold: Tensor,
        known: tuple[Tensor, Tensor],
        log_inclusion: Tensor | None,
        label_smoothing: float,
        dtype: torch.dtype,
    ) -> Tensor:
        q, u = len(queries), len(candidates)
        ctx.types = queries.dtype, candidates.dtype
        low_queries, low_candidates = queries.to(dtype), candidates.to(dtype)
        step = max(_ROWS, _KEPT.get(queries.device.type, _KEPT_ELSEWHERE) // u)
        kept = queries.new_empty((min(step, q), u), dtype=dtype)
        to_queries = torch.empty_like(low_queries)
        to_candidates: Tensor | None = None
        losses = queries.new_empty(q, dtype=torch.float32)
        for start in range(0, q, step):
            rows = slice(start, min(start + step, q))
            part = low_queries[rows]
            losses[rows] = _rows(
                part,
                low_candidates,
                gold[rows],
                _within(known, rows),
                log_inclusion,
                label_smoothing,
                kept[: len(part)],
                to_queries[rows],
            )
            more = kept[: len(part)].T @ part
            if to_candidates is None:
                to_candidates = more.float() if step < q else more
            else:
                to_candidates += more
        ctx.save_for_backward(to_queries, to_candidates)
        return losses.mean()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        to_queries, to_candidates = ctx.saved_tensors
        factor = outer[0] / len(to_queries)
        grads = (g.to(t).mul_(factor) for g, t in zip((to_queries, to_candidates), ctx.types, strict=True))
        return (*grads, None, None, None, None, None)


def _rows(
    queries: Tensor,
    candidates: Tensor,
    gold: Tensor,
    known: tuple[Tensor, Tensor],
    log_inclusion: Tensor | None,
    label_smoothing: float,
    gradients: Tensor,
    to_queries: Tensor,
) -> Tensor:
    """(b,) losses of b queries; writes d loss / d scores to gradients (b, u) and d loss / d queries to to_queries."""
    u = len(candidates)
    on_cpu = queries.device.type == "cpu"
    step = _ROWS if on_cpu else len(queries)
    few = max(1, _CACHED // u) if on_cpu else len(queries)
    losses = []
    for start in range(0, len(queries), step):
        block = slice(start, min(start + step, len(queries)))
        scores = queries[block] @ candidates.T
        for first in range(block.start, block.stop, few):
            some = slice(first, min(first + few, block.stop))
            part = scores[first - start : some.stop - start].float()
            if log_inclusion is not None:
                part -= log_inclusion
            loss, gradients[some] = _cross_entropy(part, gold[some], _within(known, some), label_smoothing)
            losses.append(loss)
        torch.mm(gradients[block], candidates, out=to_queries[block])
    return torch.cat(losses)


def _cross_entropy(
    scores: Tensor, gold: Tensor, known: tuple[Tensor, Tensor], label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """(b,) losses of (b, u) float32 scores, which are changed, and their gradients (b, u)."""
    every = torch.arange(len(gold), device=gold.device)
    losses = scores[every, gold] * (label_smoothing - 1)
    evenly = None
    if label_smoothing:
        left_out = torch.bincount(known[0], minlength=len(gold))
        evenly = label_smoothing / (scores.shape[1] - left_out)
        losses -= scores.index_put(known, scores.new_zeros(())).sum(dim=1) * evenly
    scores.index_put_(known, scores.new_tensor(float("-inf")))
    # One kernel makes the softmax, at half the cost of exp alone; its largest entry then tells the normaliser.
    gradients = scores.softmax(dim=1)
    losses += scores.amax(dim=1) - gradients.amax(dim=1).log()
    if evenly is not None:
        gradients -= evenly[:, None]
        gradients.index_put_(known, gradients.new_zeros(()))
    gradients[every, gold] -= 1 - label_smoothing
    return losses, gradients


def _within(known: tuple[Tensor, Tensor], rows: slice) -> tuple[Tensor, Tensor]:
    """The pairs of these rows, counted from the first of them."""
    first, last = torch.searchsorted(known[0], known[0].new_tensor([rows.start, rows.stop])).tolist()
    return known[0][first:last] - rows.start, known[1][first:last]
