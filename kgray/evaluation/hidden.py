"""Answers that validation does not know: how likely each candidate is one, and worlds in which they are known.

A validation query leaves out what training and validation know; a test query leaves out the answers of test besides. So
a candidate that stands first in validation may be right, only not known yet, and counts as wrong there although a later
test would have left it out. Which ones these are nobody can see, but what they look like can be seen: given one answer
of a question, its others fell to validation or to a later split by chance, so a hidden answer looks as the other
answers of validation look (selected completely at random, Elkan and Noto 2008). A regression tells these from
candidates that are none; by it worlds are drawn in which hidden answers are known and left out, and probabilities are
fitted to several such worlds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.special
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

WORLDS = 5
"""Their spread is then well below that of the queries themselves."""

LEAST_PAIRS = 50
"""Fewer pairs of answers to one question say nothing: then no candidate is taken for a hidden answer."""

_MOST = 64
_RIDGE = 1.0
_FAR = 30.0


def chances(scores: Tensor, log_weight: Tensor, questions: Ints, unknown: float) -> Floats:
    """(Q, C) float64: of each candidate of Q validation queries to be an answer that only a later split knows.

    scores (Q, C): tempered, the gold answer's first; log_weight (Q, C): as :class:`kgray.model.candidates.Candidates`
    has it. questions (Q,): queries that ask the same share a number. unknown: answers hidden, as a multiple of those
    that validation knows. 0 of the gold answer, of candidates left out and of those that stand for several.
    """
    scores, weight = scores.double(), log_weight.double()
    total = torch.logsumexp(scores + weight, dim=1)
    found = np.zeros(scores.shape)
    query, answer, times = _pairs(questions)
    if unknown <= 0 or len(query) < LEAST_PAIRS:
        return found
    known = np.bincount(questions)[questions] - 1
    own, others = scores[answer, 0], total[query]
    answers = _features((own - torch.logaddexp(own, others)).numpy(), known[query] - 1)
    there = torch.isfinite(weight)
    there[:, 0] = False
    row, column = (part.numpy() for part in there.nonzero(as_tuple=True))
    rivals = _features((scores - total[:, None])[row, column].numpy(), known[row])
    x = np.concatenate([answers, rivals])
    standing = np.concatenate([times, weight.exp()[row, column].numpy()])
    beta = _fit(x, np.arange(len(x)) < len(answers), standing, unknown)
    alone = (weight[row, column] == 0).numpy()
    found[row, column] = np.where(alone, scipy.special.expit(rivals @ beta), 0.0)
    return found


def worlds(log_p: Tensor, chance: Floats, count: int, seed: int) -> Tensor:
    """(count * Q, C) float64 logarithms of probabilities with hidden answers left out, one world after the other.

    log_p (Q, C) float64: of the candidates as they are, -inf of what is left out or stands for several.
    """
    draw, found = np.random.default_rng(seed), []
    for _ in range(count):
        gone = torch.from_numpy(draw.random(chance.shape) < chance)
        left = torch.log1p(-(log_p.exp() * gone).sum(1, keepdim=True).clamp(max=1.0))
        # Where next to nothing is left the difference would be noise: the gold answer itself always is.
        left = torch.maximum(left, log_p[:, :1])
        found.append((log_p - left).masked_fill(gone, -torch.inf))
    return torch.cat(found)


def _pairs(questions: Ints) -> tuple[Ints, Ints, Floats]:
    """Ordered pairs of different queries with the same question, and what each stands for; (n,) each.

    A query has _MOST pairs at most, evenly spread; they stand for all of its pairs.
    """
    order = np.argsort(questions, kind="stable")
    _, start, count = np.unique(questions[order], return_index=True, return_counts=True)
    size = np.repeat(count, count)
    place = np.arange(len(order)) - np.repeat(start, count)
    taken = np.minimum(size - 1, _MOST)
    query = np.repeat(np.arange(len(order)), taken)
    number = np.arange(len(query)) - np.repeat(np.cumsum(taken) - taken, taken)
    ahead = 1 + number * (size[query] - 1) // taken[query]
    answer = np.repeat(start, count)[query] + (place[query] + ahead) % size[query]
    return order[query], order[answer], (size[query] - 1) / taken[query]


def _features(log_p: Floats, known: Ints) -> Floats:
    """(n, 6) of candidates with that probability, whose question has that many other answers in validation."""
    with np.errstate(divide="ignore"):
        logit = np.clip(log_p - np.log(-np.expm1(np.minimum(log_p, -1e-9))), -_FAR, _FAR)
    many = np.log1p(known)
    return np.stack([np.ones_like(logit), logit, logit**2 / 10, many, many * logit, known > 0], axis=1)


def _fit(x: Floats, answer: Bools, weight: Floats, unknown: float) -> Floats:
    """(d,) coefficients whose sigmoid is the chance of a candidate that is no answer of validation to be a hidden one.

    x (n, d), answer (n,) whether it is one of validation, weight (n,). Maximum likelihood: hidden answers being
    ``unknown`` times as many, one of chance p is an answer of validation with probability p / (unknown + p).
    """
    ridge = np.full(x.shape[1], _RIDGE)
    ridge[0] = 0.0

    def loss(beta: Floats) -> tuple[float, Floats]:
        z = x @ beta
        p = scipy.special.expit(z)
        told = np.log(unknown + p) + np.where(answer, np.logaddexp(0.0, -z), -np.log(unknown))
        slope = (1 - p) * np.where(answer, -unknown, p) / (unknown + p)
        value = weight @ told + 0.5 * ridge @ beta**2
        return float(value), x.T @ (weight * slope) + ridge * beta

    found: Floats = scipy.optimize.minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x
    return found
