"""Whether probabilities are frequencies and answer sets keep their promise: mergeable sums, and the metrics of them.

As with ranks every sum is an integer, so that shards merge in any order to the same bits: probabilities are held in
fixed point with 30 fractional bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kgray.evaluation.calibration import Calibration

BINS = 15
"""Of equal mass; see :meth:`Reliability.bins`."""

Int64 = npt.NDArray[np.int64]
_FINE = 4096
_ONE = 1 << 30
_EXACT = 1024
_GROWTH = 1.01
_SIZES = _EXACT + 4096


@dataclass(slots=True)
class Reliability:
    """Of one task. ``fine`` (4096, 3): queries, their first-placed probabilities and their share of right answers, by
    that probability. ``sizes``: queries by the size of their answer set, exact to 1024, then to 1%. Sums: squared
    error of the first-placed probability, true answers in the set, set sizes, empty sets."""

    fine: Int64 = field(default_factory=lambda: np.zeros((_FINE, 3), dtype=np.int64))
    sizes: Int64 = field(default_factory=lambda: np.zeros(_SIZES, dtype=np.int64))
    brier: int = 0
    covered: int = 0
    total_size: int = 0
    empty: int = 0

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(
            self.fine + other.fine,
            self.sizes + other.sizes,
            self.brier + other.brier,
            self.covered + other.covered,
            self.total_size + other.total_size,
            self.empty + other.empty,
        )

    @property
    def count(self) -> int:
        return int(self.fine[:, 0].sum())

    def add(
        self, probability: npt.NDArray[Any], credit: npt.NDArray[Any], covered: npt.NDArray[np.bool_], sizes: Int64
    ) -> None:
        """Add B queries: probability of the first-placed candidate, its share of being right (a tie shares it),
        whether the answer set holds the true answer, and the set's size; (B,) each."""
        p, right = (np.rint(np.asarray(v, dtype=np.float64) * _ONE).astype(np.int64) for v in (probability, credit))
        place = np.minimum(np.asarray(probability) * _FINE, _FINE - 1).astype(np.int64)
        for column, values in enumerate((np.ones_like(p), p, right)):
            np.add.at(self.fine[:, column], place, values)
        # Of g candidates that share the credit one is right by chance: E (p - right)^2 = p^2 - 2 p credit + credit.
        squared = probability**2 - 2 * probability * credit + credit
        self.brier += int(np.rint(squared * _ONE).astype(np.int64).sum())
        self.covered += int(covered.sum())
        self.total_size += int(sizes.sum())
        self.empty += int((sizes == 0).sum())
        beyond = np.log(np.maximum(sizes, _EXACT) / _EXACT) / np.log(_GROWTH)
        self.sizes += np.bincount(
            np.minimum(np.where(sizes < _EXACT, sizes, _EXACT + beyond.astype(np.int64)), _SIZES - 1),
            minlength=_SIZES,
        )

    def bins(self) -> list[dict[str, float]]:
        """At most BINS bins of near-equal mass: ``probability`` and ``right`` (means) and ``count``, rising.

        Queries whose probabilities share a 4096th stay together, so bins may be fewer.
        """
        before = np.cumsum(self.fine[:, 0]) - self.fine[:, 0]
        which = before * BINS // max(self.count, 1)
        found = []
        for number in range(BINS):
            count, p, right = self.fine[which == number].sum(axis=0).tolist()
            if count:
                found.append({"probability": p / count / _ONE, "right": right / count / _ONE, "count": float(count)})
        return found

    def metrics(self) -> dict[str, float]:
        """ece (mean gap between probability and frequency over the bins), brier, coverage, set_size_mean,
        set_size_median, set_empty (share of empty sets); nothing where there was no query."""
        count = self.count
        if not count:
            return {}
        gaps = [b["count"] * abs(b["probability"] - b["right"]) for b in self.bins()]
        middle = int(np.searchsorted(np.cumsum(self.sizes), (count + 1) // 2))
        return {
            "ece": sum(gaps) / count,
            "brier": self.brier / count / _ONE,
            "coverage": self.covered / count,
            "set_size_mean": self.total_size / count,
            "set_size_median": float(middle if middle < _EXACT else round(_EXACT * _GROWTH ** (middle - _EXACT))),
            "set_empty": self.empty / count,
        }

    def observe(
        self, calibration: Calibration, task: str, scores: Tensor, gold: Tensor, relations: Int64 | None, out: Tensor
    ) -> None:
        """Add B queries by their score matrix (B, C); gold (B,), out (B, C) bool: other known answers."""
        rows = calibration.rows(task, scores, relations, out)
        own = scores.float().masked_fill(out, -torch.inf)
        true = own.gather(1, gold[:, None])
        best = torch.from_numpy(rows.best).float()
        leading = own == best[:, None]
        credit = ((true.squeeze(1) == best) / leading.sum(1)).numpy()
        log_p = np.minimum(rows.best * rows.task.inverse_temperature - rows.log_sum, 0.0)
        threshold = rows.threshold
        sizes = (own.double() >= torch.from_numpy(threshold)[:, None]).sum(1).numpy()
        sizes = np.where(np.isinf(threshold), (~out).sum(1).numpy(), sizes)
        covered = true.squeeze(1).double().numpy() >= threshold
        self.add(rows.task.first(np.exp(log_p)), credit, covered, sizes)


def merge(parts: Mapping[str, Reliability], others: Mapping[str, Reliability]) -> dict[str, Reliability]:
    """The sums of both, by task."""
    return {t: parts.get(t, Reliability()) + others.get(t, Reliability()) for t in (*parts, *others)}


def metrics_of(parts: Mapping[str, Reliability], split: str) -> dict[str, float]:
    """``test.both.calibration.ece`` and so on: by task, and of both directions together where there are both."""
    together = dict(parts)
    if {"tail", "head"} <= parts.keys():
        together = {"both": parts["tail"] + parts["head"], **parts}
    return {
        f"{split}.{side}.calibration.{name}": value
        for side, one in together.items()
        for name, value in one.metrics().items()
    }
