"""The softmax that makes its gradients as it goes, against the one that autograd takes apart.

python3 -m pytest tests/unit/test_model_softmax.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from model_graphs import ONE_VS_ALL, SMALL, graph

from kgray.graph.resident import ResidentStore
from kgray.model import softmax
from kgray.model.config import ModelConfig, ObjectiveConfig
from kgray.model.fused import Neighbourhood
from kgray.model.objectives import Batch, entity_loss
from kgray.model.softmax import product_softmax_loss
from kgray.training.batches import BatchMaker

QUERIES, CANDIDATES, DIM = 37, 53, 6


def inputs(seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """Queries, candidates, gold columns, left-out pairs, log inclusion. One row has many left out, some none, and one
    has nothing but its gold answer left."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(QUERIES, DIM, generator=generator) * scale
    candidates = torch.randn(CANDIDATES, DIM, generator=generator)
    gold = torch.randint(0, CANDIDATES, (QUERIES,), generator=generator)
    left_out = torch.rand(QUERIES, CANDIDATES, generator=generator) < 0.1
    left_out[3], left_out[7], left_out[20:24] = True, torch.arange(CANDIDATES) % 2 == 0, False
    left_out[torch.arange(QUERIES), gold] = False
    log_inclusion = torch.rand(CANDIDATES, generator=generator).log()
    rows, columns = left_out.nonzero().unbind(1)
    return queries, candidates, gold, (rows, columns), log_inclusion


def plainly(
    queries: Tensor,
    candidates: Tensor,
    gold: Tensor,
    known: tuple[Tensor, Tensor],
    log_inclusion: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    nowhere = Neighbourhood(torch.arange(CANDIDATES), [])
    batch = Batch(nowhere, gold, gold, gold, *known, log_inclusion)
    scores = (queries @ candidates.T).float()
    return entity_loss(scores, batch, ObjectiveConfig(label_smoothing=label_smoothing))


@pytest.fixture(params=["whole", "in parts"])
def _parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in parts":  # blocks, blocks of blocks and parts of the matrix, none of which divides the rows
        monkeypatch.setattr(softmax, "_ROWS", 5)
        monkeypatch.setattr(softmax, "_CACHED", 2 * CANDIDATES)
        monkeypatch.setattr(softmax, "_KEPT", {"cpu": 16 * CANDIDATES})


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_those_of_autograd(
    label_smoothing: float, corrected: bool, precision: torch.dtype
) -> None:
    queries, candidates, gold, known, log_inclusion = inputs()
    found = []
    for loss in (plainly, product_softmax_loss):
        one, two = queries.clone().requires_grad_(), candidates.clone().requires_grad_()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            value = loss(
                torch.nn.functional.dropout(one * 2, 0.3), two, gold, known, log_inclusion if corrected else None,
                label_smoothing,
            )  # fmt: skip
            value = value * 3  # what comes after the loss reaches the gradients
        value.backward()  # type: ignore[no-untyped-call]
        found.append((value.detach(), one.grad, two.grad))
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if precision == torch.float32 else {"rtol": 2e-2, "atol": 3e-3}
    for slow, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, **tolerance)


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    queries, candidates, gold, known, _ = inputs(scale=300.0)
    one = queries.clone().requires_grad_()
    loss = product_softmax_loss(one, candidates, gold, known)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss.detach(), plainly(queries, candidates, gold, known, None, 0.0))
    assert one.grad is not None and bool(torch.isfinite(one.grad).all())


def test_a_broken_score_breaks_the_loss() -> None:
    queries, candidates, gold, known, _ = inputs()
    queries[0, 0] = float("nan")
    assert not bool(torch.isfinite(product_softmax_loss(queries, candidates, gold, known)))


@pytest.mark.usefixtures("_parts")
def test_the_same_input_gives_the_same_bits() -> None:
    def gradients() -> tuple[Tensor | None, Tensor | None]:
        queries, candidates, gold, known, log_inclusion = inputs()
        product_softmax_loss(
            queries.requires_grad_(), candidates.requires_grad_(), gold, known, log_inclusion
        ).backward()  # type: ignore[no-untyped-call]
        return queries.grad, candidates.grad

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [SMALL, ONE_VS_ALL])
def test_batches_name_known_answers_by_ascending_query_and_once(config: ModelConfig) -> None:
    data = graph()
    maker = BatchMaker(ResidentStore.of(data), config, 40, seed=1)
    for step in range(2):
        batch = maker.make(0, step)
        keys = batch.known_query * len(batch.neighbourhood.nodes) + batch.known_candidate
        assert bool((batch.known_query.diff() >= 0).all()) and len(keys.unique()) == len(keys)
        assert not bool((batch.tail[batch.known_query] == batch.known_candidate).any())
