"""Probabilities that are frequencies, answer sets that keep their promise.

python3 -m pytest tests/unit/test_evaluation_calibration.py
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from kgray.evaluation.calibration import (
    Calibration,
    Monotone,
    TaskCalibration,
    conformal_quantile,
    conformal_thresholds,
    fit_task,
)
from kgray.evaluation.reliability import Reliability, metrics_of
from kgray.model.gate_fit import inverse_temperature

WIDTH, RELATIONS = 40, 3


def overconfident(seed: int, count: int, factor: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (n, WIDTH) that are ``factor`` times the logits the gold answers are drawn by, and the gold columns."""
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, WIDTH, generator=draw)
    gold = torch.multinomial(torch.softmax(logits, 1), 1, generator=draw).squeeze(1)
    return factor * logits, gold


def fitted(seed: int, count: int, *, alpha: float = 0.1, group: int = 200, factor: float = 4.0) -> TaskCalibration:
    """Calibration on candidates that are the whole row, the gold one moved to the front."""
    scores, gold = overconfident(seed, count, factor)
    rows = torch.arange(count)
    front = torch.cat([gold[:, None], torch.arange(WIDTH).expand(count, -1)], 1)
    keep = torch.ones(count, WIDTH + 1, dtype=torch.bool)
    keep[rows, gold + 1] = False
    ordered = scores.gather(1, front[keep].view(count, WIDTH))
    weight = torch.zeros(count, WIDTH)
    relations = (rows % RELATIONS).numpy()
    b = inverse_temperature(ordered, weight)
    return fit_task(ordered, weight, relations, RELATIONS, alpha=alpha, group=group, inverse_temperature=b)


def measured(task: TaskCalibration, seed: int, count: int = 20_000, *, alpha: float = 0.1) -> Reliability:
    scores, gold = overconfident(seed, count)
    found = Reliability()
    out = torch.zeros(count, WIDTH, dtype=torch.bool)
    found.observe(Calibration(alpha, {"tail": task}), "tail", scores, gold, np.arange(count) % RELATIONS, out)
    return found


def test_overconfident_scores_become_frequencies_and_sets_cover_what_they_promise() -> None:
    task = fitted(0, 3000)
    assert task.inverse_temperature == pytest.approx(0.25, rel=0.1)
    metrics = measured(task, 1).metrics()
    assert metrics["ece"] < 0.03
    assert abs(metrics["coverage"] - 0.9) < 0.02
    raw = TaskCalibration(1.0, *(2 * [Monotone(np.zeros(0), np.zeros(0))]), task.thresholds)
    assert measured(raw, 1).metrics()["ece"] > 0.2, "the test has nothing to correct"


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5])
def test_coverage_at_other_levels_and_sets_grow_with_it(alpha: float) -> None:
    metrics = measured(fitted(0, 3000, alpha=alpha), 1, alpha=alpha).metrics()
    assert abs(metrics["coverage"] - (1 - alpha)) < 0.025
    tighter = fitted(0, 3000, alpha=min(0.9, alpha * 1.5))
    assert (tighter.thresholds >= fitted(0, 3000, alpha=alpha).thresholds).all()
    assert measured(tighter, 1).total_size < measured(fitted(0, 3000, alpha=alpha), 1).total_size


def test_the_quantile_promises_no_more_than_it_can() -> None:
    """Over many draws of n exchangeable values, the next one reaches the quantile as often as asked; n too small for
    that means every candidate."""
    draw = np.random.default_rng(0)
    reached = [draw.normal() >= conformal_quantile(draw.normal(size=19), 0.1) for _ in range(4000)]
    assert 0.89 <= float(np.mean(reached)) < 0.92
    assert conformal_quantile(np.zeros(8), 0.1) == -math.inf
    assert conformal_quantile(np.arange(9.0), 0.1) == 0.0
    values = np.concatenate([np.full(300, 5.0), np.arange(40.0), np.arange(40.0)])
    groups = np.repeat([0, 1, 2], [300, 40, 40])
    thresholds = conformal_thresholds(values, groups, 4, alpha=0.1, group=50)
    assert thresholds[0] == 5.0
    assert thresholds[1] == thresholds[2] == thresholds[3] == conformal_quantile(values[300:], 0.1)
    assert conformal_thresholds(values, groups, 4, alpha=0.1, group=100)[1] == conformal_quantile(values, 0.1)


def test_isotonic_regression_against_the_obvious_one() -> None:
    draw = np.random.default_rng(0)
    p = draw.random(300)
    right = (draw.random(300) < p**2).astype(float)
    found = Monotone.fit(p, right)
    assert (np.diff(found(np.linspace(0, 1, 200))) >= 0).all()
    # Min-max formula of isotonic regression: the greatest lower mean of what lies behind.
    order = np.argsort(p)
    y, n = right[order], len(p)
    sums = np.concatenate([[0], np.cumsum(y)])
    means = np.full((n, n), np.inf)
    for i in range(n):
        means[i, i:] = (sums[i + 1 :] - sums[i]) / np.arange(1, n - i + 1)
    obvious = np.maximum.accumulate(means.min(axis=1))
    # Blocks hold one pseudo-observation more, and values between them are interpolated.
    assert np.abs(found(p[order]) - obvious).mean() < 0.05
    assert found(np.array([0.99]))[0] < 1
    assert Monotone.fit(p[:20], right[:20])(np.array([0.3]))[0] == 0.3, "too few observations to say anything"


def test_an_observation_told_several_times_counts_once() -> None:
    draw = np.random.default_rng(1)
    p = draw.random(400)
    right = (draw.random(400) < p).astype(float)
    grid = np.linspace(0, 1, 50)
    told = Monotone.fit(np.tile(p, 3), np.tile(right, 3), 1 / 3)
    assert told(grid) == pytest.approx(Monotone.fit(p, right)(grid), abs=1e-9)
    assert not len(Monotone.fit(np.tile(p[:50], 3), np.tile(right[:50], 3), 1 / 3).x), "50 are too few, told thrice too"


@pytest.mark.parametrize("unknown", [1.0, 2.0])
def test_answers_that_validation_does_not_know_are_made_good(unknown: float) -> None:
    """Questions of one to three answers, each in validation or (``unknown`` times as often) in test; a test query knows
    all others, a validation query those of validation. Without the correction probabilities are far too low."""
    draw = np.random.default_rng(2)
    questions, width = 6000, WIDTH
    true = np.arange(width) < draw.integers(1, 4, questions)[:, None]
    scores = torch.from_numpy((2.5 * true + draw.normal(size=true.shape)).astype(np.float32))
    valid = true & (draw.random(true.shape) < 1 / (1 + unknown))

    def asked(gold: np.ndarray, known: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Scores with the gold one first and what is left out of them, and the question, of each gold answer."""
        rows, columns = np.nonzero(gold)
        left_out = torch.from_numpy(known[rows])
        left_out[torch.arange(len(rows)), torch.from_numpy(columns)] = False
        order = np.argsort(np.arange(width)[None] != columns[:, None], axis=1, kind="stable")
        place = torch.from_numpy(order)
        return scores[rows].gather(1, place), left_out.gather(1, place), rows

    own, out, question = asked(valid, valid)
    weight = torch.zeros_like(own).masked_fill(out, -torch.inf)
    b = inverse_temperature(own.masked_fill(out, -1e4), weight)
    later, later_out, _ = asked(true & ~valid, true)
    errors, covered = [], []
    for told in (question, None):
        task = fit_task(
            *(own, weight, np.zeros(len(own), dtype=np.int64), 1),
            alpha=0.1, group=200, inverse_temperature=b, questions=told, unknown=unknown,
        )  # fmt: skip
        found = Reliability()
        gold = torch.zeros(len(later), dtype=torch.int64)
        found.observe(
            Calibration(0.1, {"tail": task}), "tail", later, gold, np.zeros(len(later), dtype=np.int64), later_out
        )
        metrics = metrics_of({"tail": found}, "test")
        errors.append(metrics["test.tail.calibration.ece"])
        covered.append(metrics["test.tail.calibration.coverage"])
    assert errors[0] < 0.03 and errors[1] > 0.1, errors
    assert abs(covered[0] - 0.9) < 0.015 and covered[1] > covered[0] + 0.02, covered


def test_what_is_known_counts_as_if_it_were_not() -> None:
    """One row by hand: the softmax over the unknown candidates, and of a known one over these and itself."""
    scores = np.array([2.0, 1.0, 0.0, -1.0], dtype=np.float32)
    known = np.array([True, False, False, False])
    task = TaskCalibration(0.5, *(2 * [Monotone(np.zeros(0), np.zeros(0))]), np.array([math.log(0.3)]))
    calibration = Calibration(0.1, {"tail": task})
    rows = calibration.rows("tail", torch.from_numpy(scores)[None], None, torch.from_numpy(known)[None])
    e = np.exp(0.5 * scores.astype(float))
    want = np.array([e[0] / e.sum(), *(e[1:] / e[1:].sum())])
    assert rows.probability(0, scores, known) == pytest.approx(want)
    assert rows.contains(0, scores, known).tolist() == (want >= 0.3).tolist()
    assert rows.contains(0, scores[1:], known[1:]).tolist() == (scores[1:] >= rows.threshold[0]).tolist()
    none = calibration.rows("tail", torch.from_numpy(scores)[None], None, None)
    assert none.probability(0, scores, np.zeros(4, dtype=bool)) == pytest.approx(e / e.sum())
    # Scores far from zero, where the exponentials themselves would overflow.
    far = calibration.rows("tail", torch.from_numpy(scores)[None] + 4096, None, None)
    assert far.probability(0, scores + 4096, np.zeros(4, dtype=bool)) == pytest.approx(e / e.sum(), rel=1e-5)


def test_it_comes_back_from_json() -> None:
    task = fitted(0, 500)
    thresholds = task.thresholds.copy()
    thresholds[0] = -math.inf
    task = TaskCalibration(task.inverse_temperature, task.first, task.others, thresholds)
    before = Calibration(0.2, {"tail": task, "relation": fitted(1, 50)})
    after = Calibration.from_json(json.loads(json.dumps(before.to_json(), allow_nan=False)))
    scores, _ = overconfident(3, 20)
    nothing = np.zeros(WIDTH, dtype=bool)
    for a, b in ((before, after),):
        rows = [one.rows("tail", scores, np.arange(20) % RELATIONS, None) for one in (a, b)]
        for i in range(20):
            p = [r.probability(i, scores[i].numpy(), nothing) for r in rows]
            assert np.array_equal(p[0], p[1])
            inside = [r.contains(i, scores[i].numpy(), nothing) for r in rows]
            assert np.array_equal(inside[0], inside[1]) and (i % RELATIONS or inside[0].all())


def test_reliability_against_the_obvious_sums_and_in_any_order_of_shards() -> None:
    draw = np.random.default_rng(0)
    p = draw.random(3000)
    credit = (draw.random(3000) < p).astype(float)
    covered, sizes = draw.random(3000) < 0.9, draw.integers(0, 5000, 3000)
    whole = Reliability()
    whole.add(p, credit, covered, sizes)
    parts = []
    for chunk in np.array_split(draw.permutation(3000), 7):
        part = Reliability()
        part.add(p[chunk], credit[chunk], covered[chunk], sizes[chunk])
        parts.append(part)
    total = Reliability()
    for part in parts:
        total = total + part
    assert total.metrics() == whole.metrics() and total.bins() == whole.bins()
    metrics = whole.metrics()
    assert metrics["brier"] == pytest.approx(((p - credit) ** 2).mean(), abs=1e-6)
    assert metrics["coverage"] == covered.mean() and metrics["set_size_mean"] == sizes.mean()
    assert metrics["set_size_median"] == pytest.approx(np.median(sizes), rel=0.02)
    assert metrics["set_empty"] == (sizes == 0).mean()
    gaps = [abs(p[i].mean() - credit[i].mean()) * len(i) for i in np.array_split(np.argsort(p), 15)]
    assert metrics["ece"] == pytest.approx(sum(gaps) / 3000, abs=2e-3)
    assert len(whole.bins()) == 15
    both = metrics_of({"tail": whole, "head": whole}, "test")
    assert both["test.both.calibration.ece"] == pytest.approx(metrics["ece"])
    assert Reliability().metrics() == {}


def test_first_places_that_are_shared_share_the_credit() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 0.0]])
    task = TaskCalibration(1.0, *(2 * [Monotone(np.zeros(0), np.zeros(0))]), np.zeros(1) - 20)
    found = Reliability()
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    found.observe(Calibration(0.1, {"tail": task}), "tail", scores, torch.tensor([1, 1]), None, nothing)
    assert found.fine[:, 2].sum() / (1 << 30) == pytest.approx(0.5)
    assert found.covered == 2 and found.total_size == 6
