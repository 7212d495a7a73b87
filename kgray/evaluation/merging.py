"""What is known of a query's scores when only a range of its candidates was looked at, and how that adds up.

Each of these is made ``of`` the scores of one range and added to those of other ranges, in any order: top candidates,
counts and bests come out as from the whole row, equal scores included, bit by bit; sums (of exponentials, of moments)
are those of float64, to its rounding. Ranges are disjoint and may have any size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kgray.evaluation.answers import Bools, Doubles, Floats, Ints, best_candidates


@dataclass(frozen=True)
class Top:
    """The K best candidates of B queries so far, best first, of equal ones the lower id first.

    values (B, K) float32, -inf where there are fewer; ids (B, K) int64, -1 there. carried (B, K, M) float32: other
    scores of the same candidates.
    """

    values: Floats
    ids: Ints
    carried: Floats

    @classmethod
    def of(
        cls, scores: Tensor, start: int, count: int, out: Tensor | None = None, carried: Tensor | None = None
    ) -> Top:
        """Of scores (B, C) of the candidates from ``start``, without those in out (B, C). carried (B, C, M)."""
        width = scores.shape[1]
        values, places = best_candidates(scores, min(count, width), out)
        more = np.zeros((*values.shape, 0), dtype=np.float32)
        if carried is not None:
            more = carried.numpy()[np.arange(len(places))[:, None], places].astype(np.float32)
        ids = np.where(np.isneginf(values), -1, places + start)
        pad = count - values.shape[1]
        return cls(
            np.pad(values, ((0, 0), (0, pad)), constant_values=-np.inf),
            np.pad(ids, ((0, 0), (0, pad)), constant_values=-1),
            np.pad(more, ((0, 0), (0, pad), (0, 0))),
        )

    def __add__(self, other: Top) -> Top:
        values = np.concatenate([self.values, other.values], axis=1)
        ids = np.concatenate([self.ids, other.ids], axis=1)
        # What is missing stands behind all that is there, whatever its id.
        order = np.lexsort((np.where(ids < 0, np.iinfo(np.int64).max, ids), -values), axis=1)[:, : self.ids.shape[1]]
        carried = np.concatenate([self.carried, other.carried], axis=1)
        return Top(
            np.take_along_axis(values, order, axis=1),
            np.take_along_axis(ids, order, axis=1),
            np.take_along_axis(carried, order[..., None], axis=1),
        )


@dataclass(frozen=True)
class LogSum:
    """The softmax of B queries so far, (B,) each: the highest score and how many candidates have it, and the logarithm
    of the sum of exponentials of the scores times an inverse temperature; -inf where there is no candidate."""

    best: Doubles
    leading: Ints
    log_sum: Doubles

    @classmethod
    def of(cls, scores: Tensor, inverse_temperature: float, out: Tensor) -> LogSum:
        """Of scores (B, C) without those in out (B, C) bool."""
        own = scores.masked_fill(out, -torch.inf)
        best = own.amax(1)
        # As in calibration: differences are exact enough in float32, the scores themselves would not be.
        level = torch.where(torch.isinf(best), 0.0, best)
        exponentials = torch.exp((own - level[:, None]) * inverse_temperature)
        with np.errstate(divide="ignore"):
            log_sum = np.log(exponentials.sum(1, dtype=torch.float64).numpy())
        top, leading = best.double().numpy(), (own == best[:, None]).sum(1).numpy()
        return cls(top, leading, log_sum + level.double().numpy() * inverse_temperature)

    def __add__(self, other: LogSum) -> LogSum:
        best = np.maximum(self.best, other.best)
        leading = self.leading * (self.best == best) + other.leading * (other.best == best)
        return LogSum(best, leading, np.logaddexp(self.log_sum, other.log_sum))


@dataclass(frozen=True)
class Rivals:
    """Candidates of B queries so far, (B,) int64 each: above and level with a reference score, known ones left out."""

    above: Ints
    level: Ints

    @classmethod
    def of(cls, scores: Tensor, reference: Tensor, out: Tensor) -> Rivals:
        """Of scores (B, C) against reference (B,), without those in out (B, C) bool."""
        above, level = scores > reference[:, None], scores == reference[:, None]
        return cls((above & ~out).sum(1).numpy(), (level & ~out).sum(1).numpy())

    def __add__(self, other: Rivals) -> Rivals:
        return Rivals(self.above + other.above, self.level + other.level)


@dataclass(frozen=True)
class Moments:
    """How the scores of B queries are distributed so far, (B,) float64 each but ``count``: number, lowest, highest,
    second highest, mean, and sum of squared differences to it (merged as Chan, Golub and LeVeque 1979)."""

    count: int
    low: Doubles
    high: Doubles
    second: Doubles
    mean: Doubles
    squares: Doubles

    @classmethod
    def of(cls, scores: Tensor) -> Moments:
        """Of scores (B, C), C at least 1."""
        own = scores.double()
        best = own.topk(min(2, own.shape[1]), dim=1).values
        second = best[:, 1] if best.shape[1] > 1 else torch.full_like(best[:, 0], -torch.inf)
        mean = own.mean(1)
        squares = ((own - mean[:, None]) ** 2).sum(1)
        parts = (own.amin(1), best[:, 0], second, mean, squares)
        return cls(own.shape[1], *(part.numpy() for part in parts))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        apart = other.mean - self.mean
        return Moments(
            count,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            np.maximum(np.minimum(self.high, other.high), np.maximum(self.second, other.second)),
            self.mean + apart * (other.count / count),
            self.squares + other.squares + apart**2 * (self.count * other.count / count),
        )

    def features(self) -> Tensor:
        """(B, 3) float32: what ``kgray.model.gate.row_features`` makes of the whole rows, to their rounding."""
        span = self.high - self.low
        safe = np.where(span > 0, span, 1.0)
        second = np.where(np.isneginf(self.second), self.high, self.second)
        variance = self.squares / self.count / safe**2
        found = np.stack([1 - (self.mean - self.low) / safe, variance, (self.high - second) / safe], axis=1)
        return torch.from_numpy(np.where((span > 0)[:, None], found, 0.0).astype(np.float32))


def total(parts: Iterable[Any]) -> Any:
    """The sum of at least one part; of dictionaries and tuples of parts one by one."""
    return reduce(_plus, parts)


def _plus(one: Any, other: Any) -> Any:
    if isinstance(one, dict):
        return {key: _plus(value, other[key]) for key, value in one.items()}
    if isinstance(one, tuple):
        return tuple(_plus(a, b) for a, b in zip(one, other, strict=True))
    return None if one is None else one + other


def known_in(known: tuple[Ints, Ints], rows: int, start: int, stop: int) -> Tensor:
    """(rows, stop - start) bool: which candidates of a range are in ``known`` = (rows, candidates)."""
    inside = (known[1] >= start) & (known[1] < stop)
    mask = torch.zeros(rows, stop - start, dtype=torch.bool)
    mask[torch.from_numpy(known[0][inside]), torch.from_numpy(known[1][inside] - start)] = True
    return mask


def finite_rows(scores: Tensor) -> Bools:
    """(B,) whether all scores of a row are numbers."""
    finite: npt.NDArray[np.bool_] = torch.isfinite(scores).all(1).numpy()
    return finite
