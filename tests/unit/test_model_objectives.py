"""Losses of the entities against loops over queries and candidates, and each learning the ring.

python3 -m pytest tests/unit/test_model_objectives.py
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from model_graphs import ENTITIES, ONE_VS_ALL, SMALL, TRAIN, graph, vectors

from kgray.errors import ConfigError
from kgray.model.config import ObjectiveConfig
from kgray.model.objectives import LOSSES, Batch, entity_loss
from kgray.training.config import OptimiserConfig
from kgray.training.loop import fit

QUERIES, CANDIDATES = 3, 5
GOLD = [1, 2, 0]
KNOWN = {(0, 3), (1, 0), (1, 4)}
LOG_INCLUSION = [0.0, -1.0, -0.5, 0.0, -2.0]
SMOOTHING = 0.1


def batch() -> Batch:
    return Batch(
        neighbourhood=None,  # type: ignore[arg-type]
        head=torch.zeros(QUERIES, dtype=torch.int64),
        relation=torch.zeros(QUERIES, dtype=torch.int64),
        tail=torch.tensor(GOLD),
        known_query=torch.tensor([q for q, _ in sorted(KNOWN)]),
        known_candidate=torch.tensor([c for _, c in sorted(KNOWN)]),
        log_inclusion=torch.tensor(LOG_INCLUSION),
    )


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def softmax(config: ObjectiveConfig, scores: list[float], query: int) -> float:
    allowed = [c for c in range(CANDIDATES) if (query, c) not in KNOWN]
    adjusted = {c: scores[c] - LOG_INCLUSION[c] for c in allowed}
    log_z = math.log(sum(math.exp(v) for v in adjusted.values()))
    spread = sum(v - log_z for v in adjusted.values()) / len(adjusted)
    s = config.label_smoothing
    return -((1 - s) * (adjusted[GOLD[query]] - log_z) + s * spread)


def bce(config: ObjectiveConfig, scores: list[float], query: int) -> float:
    terms = []
    for c, score in enumerate(scores):
        known = (query, c) in KNOWN
        if known and not config.all_answers:
            continue
        label = float(c == GOLD[query] or known)
        label = (1 - config.label_smoothing) * label + config.label_smoothing / CANDIDATES
        terms.append(-(label * log_sigmoid(score) + (1 - label) * log_sigmoid(-score)))
    return sum(terms) / len(terms)


def negatives(query: int) -> list[int]:
    return [c for c in range(CANDIDATES) if c != GOLD[query] and (query, c) not in KNOWN]


def self_adversarial(config: ObjectiveConfig, scores: list[float], query: int) -> float:
    weights = {c: math.exp(config.temperature * scores[c]) for c in negatives(query)}
    total = -log_sigmoid(config.margin + scores[GOLD[query]])
    for c, weight in weights.items():
        total -= weight / sum(weights.values()) * log_sigmoid(-config.margin - scores[c])
    return total


def margin(config: ObjectiveConfig, scores: list[float], query: int) -> float:
    gaps = [max(0.0, config.margin - scores[GOLD[query]] + scores[c]) for c in negatives(query)]
    return sum(gaps) / len(gaps)


SLOW = {
    "softmax": (softmax, [{}, {"label_smoothing": SMOOTHING}]),
    "bce": (bce, [{}, {"label_smoothing": SMOOTHING}, {"all_answers": True}]),
    "self_adversarial": (self_adversarial, [{}, {"temperature": 0.0, "margin": 0.0}, {"temperature": 2.0}]),
    "margin": (margin, [{}, {"margin": 0.3}]),
}


def test_every_loss_is_tested() -> None:
    assert sorted(SLOW) == LOSSES.names()


@pytest.mark.parametrize(("name", "more"), [(name, more) for name, (_, cases) in SLOW.items() for more in cases])
def test_losses_equal_their_formulas(name: str, more: dict[str, float]) -> None:
    torch.manual_seed(0)
    scores = torch.randn(QUERIES, CANDIDATES)
    config = ObjectiveConfig(loss=name, **more)  # type: ignore[arg-type]
    slow = [SLOW[name][0](config, row, query) for query, row in enumerate(scores.tolist())]
    assert float(entity_loss(scores, batch(), config)) == pytest.approx(sum(slow) / QUERIES, abs=1e-5)


def test_no_gradient_flows_through_the_weights_of_negatives() -> None:
    torch.manual_seed(0)
    scores = torch.randn(QUERIES, CANDIDATES, requires_grad=True)
    entity_loss(scores, batch(), ObjectiveConfig(loss="self_adversarial")).backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    for query, row in enumerate(scores.tolist()):
        weights = {c: math.exp(row[c]) for c in negatives(query)}
        for c in range(CANDIDATES):
            want = 0.0
            if c == GOLD[query]:
                want = -1 / (1 + math.exp(1 + row[c]))
            elif c in weights:
                want = weights[c] / sum(weights.values()) / (1 + math.exp(-1 - row[c]))
            assert float(scores.grad[query, c]) == pytest.approx(want / QUERIES, abs=1e-5)


@pytest.mark.parametrize("name", LOSSES.names())
def test_a_query_without_negatives_breaks_nothing(name: str) -> None:
    scores = torch.randn(1, 2, requires_grad=True)
    alone = replace(
        batch(), tail=torch.tensor([1]), known_query=torch.tensor([0]), known_candidate=torch.tensor([0]),
        log_inclusion=None,
    )  # fmt: skip
    entity_loss(scores, alone, ObjectiveConfig(loss=name)).backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None and torch.isfinite(scores.grad).all()


def test_options_that_a_loss_does_not_read_are_refused() -> None:
    with pytest.raises(ConfigError, match="label_smoothing"):
        ObjectiveConfig(loss="margin", label_smoothing=0.1)
    with pytest.raises(ConfigError, match="all_answers"):
        ObjectiveConfig(all_answers=True)
    with pytest.raises(ConfigError, match="temperature"):
        ObjectiveConfig(loss="self_adversarial", temperature=-1.0)


@pytest.mark.parametrize("kind", ["one_vs_all", "sampled_softmax"])
@pytest.mark.parametrize("loss", LOSSES.names())
def test_each_learns_the_ring_whatever_the_candidates(loss: str, kind: str) -> None:
    base = ONE_VS_ALL if kind == "one_vs_all" else SMALL
    model = replace(base, objective=replace(base.objective, loss=loss, margin=1.0), dropout=0.0)
    train = replace(TRAIN, epochs=30, evaluate_every=15, optimiser=OptimiserConfig(lr=0.02, table_lr=0.2))
    chance = sum(1 / rank for rank in range(1, ENTITIES + 1)) / ENTITIES
    assert fit(graph(), vectors(), model, train).best > 2 * chance
