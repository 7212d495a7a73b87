"""Answers that validation does not know: found by what the known ones look like, and left out in drawn worlds.

python3 -m pytest tests/unit/test_evaluation_hidden.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kgray.evaluation import hidden
from kgray.evaluation.hidden import chances, worlds

WIDTH = 30


def asked(unknown: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    """Validation queries (scores, log_weight, questions) of 3,000 questions, some with many answers, the gold one
    first; and (Q, C) bool: which candidates are answers that only a later split knows."""
    draw = np.random.default_rng(seed)
    many = draw.choice([1, 2, 8], size=3000, p=[0.6, 0.3, 0.1])
    true = np.arange(WIDTH) < many[:, None]
    scores = 2.0 * true + draw.normal(size=true.shape)
    valid = true & (draw.random(true.shape) < 1 / (1 + unknown))
    rows, columns = np.nonzero(valid)
    order = np.argsort(np.arange(WIDTH)[None] != columns[:, None], axis=1, kind="stable")
    left_out = np.take_along_axis(valid[rows], order, 1)
    left_out[:, 0] = False
    weight = np.where(left_out, -np.inf, 0.0)
    later = np.take_along_axis((true & ~valid)[rows], order, 1)
    own = np.take_along_axis(scores[rows], order, 1)
    return torch.from_numpy(own), torch.from_numpy(weight), rows, later


@pytest.mark.parametrize("unknown", [0.5, 1.0, 2.0])
def test_chances_are_frequencies(unknown: float) -> None:
    scores, weight, questions, later = asked(unknown)
    found = chances(1.5 * scores, weight, questions, unknown)
    there = np.isfinite(weight.numpy())
    there[:, 0] = False
    assert not found[~there].any(), "neither the gold answer nor what is left out is hidden"
    chance, right = found[there], later[there]
    for low, high in ((0.0, 0.05), (0.05, 0.2), (0.2, 0.4), (0.4, 0.7), (0.7, 1.01)):
        mine = (chance >= low) & (chance < high)
        if mine.sum() > 200:
            assert chance[mine].mean() == pytest.approx(right[mine].mean(), abs=0.1), (low, high)
    assert chance.sum() == pytest.approx(right.sum(), rel=0.1)


def test_a_question_with_other_known_answers_has_more_hidden_ones() -> None:
    scores, weight, questions, _ = asked(1.0)
    found = chances(1.5 * scores, weight, questions, 1.0)
    several = np.bincount(questions)[questions] > 2
    assert found[several].sum(1).mean() > 3 * found[~several].sum(1).mean()


def test_sampled_candidates_count_as_many_and_are_never_hidden() -> None:
    scores, weight, questions, _ = asked(1.0)
    sampled = weight.clone()
    sampled[:, 20:] = torch.where(torch.isinf(weight[:, 20:]), weight[:, 20:], np.log(40.0))
    found = chances(1.5 * scores, sampled, questions, 1.0)
    assert not found[:, 20:].any()
    # Four hundred more candidates that are no answers: an answer stands out the less.
    assert 0 < found.sum() < chances(1.5 * scores, weight, questions, 1.0).sum()


def test_nothing_is_said_where_nothing_is_known() -> None:
    scores, weight, questions, _ = asked(1.0)
    assert not chances(scores, weight, questions, 0.0).any()
    assert not chances(scores, weight, np.arange(len(questions)), 1.0).any(), "no question has two answers"
    assert not chances(scores[:7], weight[:7], np.zeros(7, dtype=np.int64), 1.0).any(), "42 pairs are too few"


def test_pairs_of_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = np.random.default_rng(0).integers(0, 12, 60)
    want = {(i, j) for i in range(60) for j in range(60) if i != j and questions[i] == questions[j]}
    query, answer, times = hidden._pairs(questions)
    assert set(zip(query.tolist(), answer.tolist(), strict=True)) == want and len(query) == len(want)
    assert (times == 1).all()
    monkeypatch.setattr(hidden, "_MOST", 3)
    query, answer, times = hidden._pairs(questions)
    some = list(zip(query.tolist(), answer.tolist(), strict=True))
    assert set(some) <= want and len(set(some)) == len(some) < len(want)
    assert np.bincount(query, times, minlength=60) == pytest.approx(np.bincount(questions)[questions] - 1)
    assert not len(hidden._pairs(np.arange(5))[0])


def test_worlds_against_the_obvious_one() -> None:
    draw = np.random.default_rng(0)
    log_p = torch.log_softmax(torch.from_numpy(draw.normal(size=(50, 8)) * 3), 1)
    log_p[:, 7] = -torch.inf
    chance = draw.random((50, 8)) * (draw.random((50, 8)) < 0.7)
    chance[:, 0] = 0.0
    found = worlds(log_p, chance, 40, seed=1).view(40, 50, 8)
    gone = torch.isinf(found)
    assert gone[:, :, 7].all() and not gone[:, :, 0].any()
    assert gone[:, :, :7].double().mean(0).numpy() == pytest.approx(chance[:, :7], abs=0.35)
    left = 1 - (log_p.exp() * gone).sum(2)
    assert torch.where(gone, 0.0, found.exp() * left[..., None]).numpy() == pytest.approx(
        torch.where(gone, 0.0, log_p.exp().expand_as(found)).numpy(), abs=1e-9
    )
    certain = worlds(torch.tensor([[-60.0, 0.0]], dtype=torch.float64), np.array([[0.0, 1.0]]), 1, seed=0)
    assert certain[0, 0] == 0.0, "what is left is the gold answer, however unlikely it was"


def test_the_regression_finds_the_chances_it_assumes() -> None:
    """Candidates are hidden answers with chance p, else, in the proportion 1 to ``unknown``, answers of validation."""
    draw, unknown = np.random.default_rng(0), 0.5
    x = np.concatenate([np.ones((40_000, 1)), draw.normal(size=(40_000, 2))], axis=1)
    beta = np.array([-1.0, 2.0, 0.5])
    p = 1 / (1 + np.exp(-(x @ beta)))
    answer = draw.random(len(x)) < p / (unknown + p)
    assert hidden._fit(x, answer, np.ones(len(x)), unknown) == pytest.approx(beta, abs=0.1)
    twice = hidden._fit(np.tile(x, (2, 1)), np.tile(answer, 2), np.full(2 * len(x), 0.5), unknown)
    assert twice == pytest.approx(hidden._fit(x, answer, np.ones(len(x)), unknown), abs=1e-3)
