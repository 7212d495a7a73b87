"""The training loop without Ray: it learns, it resumes to the bit, it stops with a word when the loss breaks.

python3 -m pytest tests/unit/test_training.py
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))

from kept_checkpoints import Keeping, StopError
from model_graphs import ENTITIES, ONE_VS_ALL, RELATIONS, SMALL, TRAIN, graph, vectors

from kgray.errors import TrainingError
from kgray.graph.graph import Graph
from kgray.graph.resident import ResidentStore
from kgray.model.config import GnnConfig, TextTowerConfig
from kgray.model.objectives import batch_loss
from kgray.training.batches import BatchMaker
from kgray.training.config import OptimiserConfig
from kgray.training.loop import METRIC, Fit, Trainer, fit
from kgray.training.optimisers import Optimisers
from kgray.training.worker import Worker

FAST = replace(TRAIN, epochs=30, optimiser=OptimiserConfig(lr=0.02, table_lr=0.2))


def same(one: Fit, two: Fit) -> bool:
    weights = one.model.state_dict(), two.model.state_dict()
    return (
        one.history == two.history
        and all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
        and torch.equal(one.scorer.tails, two.scorer.tails)
    )


@pytest.mark.parametrize("model", [SMALL, ONE_VS_ALL])
def test_it_learns_what_is_there_to_learn(model: object) -> None:
    done = fit(graph(), vectors(), model, FAST)  # type: ignore[arg-type]
    first, last = done.history[0]["train.loss"], done.history[-1]["train.loss"]
    assert last < 0.5 * first
    assert done.best > 0.6, "the ring's missing edges follow from its other relations"


@pytest.mark.parametrize("kind", ["one_vs_all", "sampled_softmax"])
def test_two_tables_alone_learn_it_too(kind: str) -> None:
    structure = replace(
        SMALL,
        text=TextTowerConfig(kind="none"),
        gnn=GnnConfig(kind="none"),
        dropout=0.0,
        objective=replace(SMALL.objective, kind=kind, n3=0.01, relation_weight=1.0),
    )
    done = fit(graph(), None, structure, replace(FAST, epochs=60))
    assert done.best > 0.6 and float(done.model.structure_weight) == 1.0  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    assert same(fit(graph(), vectors(), SMALL, TRAIN), fit(graph(), vectors(), SMALL, TRAIN))
    other = fit(graph(), vectors(), SMALL, replace(TRAIN, seed=1))
    assert not same(fit(graph(), vectors(), SMALL, TRAIN), other)


@pytest.mark.parametrize("died_after", [1, 2, 3, 5])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, died_after: int, precision: str) -> None:
    """Checkpoints 1, 2, 4, 5 lie in the middle of an epoch (84 triples, 6 steps, one checkpoint every 2)."""
    config = replace(TRAIN, checkpoint_steps=2, accumulate=2, precision=precision)  # type: ignore[arg-type]
    undisturbed = fit(graph(), vectors(), SMALL, config, Keeping(tmp_path / "a"))
    victim = Keeping(tmp_path / "b", last=died_after)
    with pytest.raises(StopError):
        fit(graph(), vectors(), SMALL, config, victim)
    torch.manual_seed(99)
    resumed = fit(graph(), vectors(), SMALL, config, Keeping(tmp_path / "c"), resume=victim.kept[-1])
    assert same(undisturbed, resumed)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    worker = Keeping(tmp_path, last=1)
    with pytest.raises(StopError):
        fit(graph(), vectors(), SMALL, TRAIN, worker)
    with pytest.raises(TrainingError, match=r"another run: its train"):
        fit(graph(), vectors(), SMALL, replace(TRAIN, batch_size=8), resume=worker.kept[0])


def test_the_best_weights_are_restored(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "kgray")
    # A learning rate that ruins the model after a good start: the last epoch is not the best.
    config = replace(FAST, epochs=12, optimiser=OptimiserConfig(lr=0.5, table_lr=2.0, schedule="constant", warmup=0.5))
    done = fit(graph(), vectors(), SMALL, config)
    curve = [row[METRIC] for row in done.history]
    assert done.best == max(curve) and done.best_epoch == curve.index(max(curve)) + 1
    assert f"weights of epoch {done.best_epoch} restored" in caplog.text
    data = graph()
    trainer = Trainer(data, vectors(), SMALL, config, Worker("cpu"))
    trainer.model.load_state_dict(done.model.state_dict())
    assert trainer._validate()[METRIC] == pytest.approx(done.best)


def test_patience_ends_training_early() -> None:
    config = replace(TRAIN, epochs=50, patience=2, optimiser=OptimiserConfig(lr=1e-9, table_lr=1e-9))
    done = fit(graph(), vectors(), SMALL, config)
    assert len(done.history) == 3 and done.best_epoch == 1


def test_accumulated_steps_give_the_gradient_of_one_large_step() -> None:
    """Two half batches of equal size with the same candidates (all entities) and no dropout."""
    data = graph()
    model = replace(ONE_VS_ALL, dropout=0.0, gnn=replace(SMALL.gnn, kind="none"))
    model = replace(model, structure=replace(model.structure, drop=0.0))
    gradients = []
    for size in (32, 16):
        trainer = Trainer(data, vectors(), model, replace(TRAIN, batch_size=size), Worker("cpu"))
        steps = 32 // size
        for step in range(steps):
            loss, _ = batch_loss(trainer.model, trainer.batches.make(0, step), model.objective)
            (loss / steps).backward()  # type: ignore[no-untyped-call]
        gradients.append(trainer.model.fused_view.relations.weight.grad.clone())  # type: ignore[union-attr]
    torch.testing.assert_close(*gradients)


def test_a_non_finite_loss_is_told_with_its_place_and_what_to_turn() -> None:
    text = vectors()
    text.parts[0][11] = np.inf
    with pytest.raises(TrainingError, match=r"epoch 0, step \d+ .*train\.optimiser\.lr \(now 0\.001\)"):
        fit(graph(), text, SMALL, TRAIN)


def test_graphs_one_cannot_learn_from_are_told() -> None:
    data = graph()
    with pytest.raises(TrainingError, match="no training triples"):
        fit(Graph.from_arrays({"valid": data.triples["valid"]}, ENTITIES, RELATIONS), vectors(), SMALL, TRAIN)
    with pytest.raises(TrainingError, match=r"data\.split\.valid"):
        fit(Graph.from_arrays({"train": data.triples["train"]}, ENTITIES, RELATIONS), vectors(), SMALL, TRAIN)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_triple_is_seen_once_an_epoch_whatever_the_workers(world: int) -> None:
    data = graph()
    train = data.triples["train"]
    seen: list[int] = []
    for rank in range(world):
        maker = BatchMaker(ResidentStore.of(data), SMALL, 16, 0, rank, world)
        for step in range(maker.steps):
            seen += maker._positions(1, step).tolist()
    assert sorted(seen) == list(range(len(train)))


@pytest.mark.parametrize("remove", ["edge", "pair"])
def test_what_carries_no_message_in_a_step(remove: Literal["edge", "pair"]) -> None:
    rng = np.random.default_rng(0)
    triples = np.unique(rng.integers(0, [12, 3, 12], (200, 3)), axis=0)
    data = Graph.from_arrays({"train": triples}, 12, 3)
    pseudo = np.stack([triples[:, 0], (triples[:, 1] + 1) % 3, triples[:, 2]], axis=1)
    labelled = np.concatenate([triples, pseudo])
    config = replace(SMALL, gnn=replace(SMALL.gnn, fanouts=(-1,), remove=remove))
    maker = BatchMaker(ResidentStore.of(data), config, 16, 0, pseudo=pseudo)
    for step in range(maker.steps):
        positions = maker._positions(0, step)
        asked = [tuple(t) for t in labelled[positions].tolist()]
        own = {tuple(t) for t in labelled[positions[positions < len(triples)]].tolist()}
        pairs = {frozenset((h, t)) for h, _, t in asked}
        around = maker.make(0, step).neighbourhood
        ((targets, source, target, relation),) = around.hops
        ends = zip(around.nodes[source].tolist(), relation.tolist(), around.nodes[target].tolist(), strict=True)
        heard = {(s, r, d) if r < 3 else (d, r - 3, s) for s, r, d in ends}
        reached = set(around.nodes[:targets].tolist())
        left = {(h, r, t) for h, r, t in map(tuple, triples.tolist()) if {h, t} & reached} - own
        if remove == "pair":
            left = {(h, r, t) for h, r, t in left if frozenset((h, t)) not in pairs}
        assert heard == left


def test_batches_made_ahead_are_those_made_in_place() -> None:
    data = graph()
    args = (ResidentStore.of(data), SMALL, 16, 0)
    ahead = list(BatchMaker(*args).epoch(2, first_step=1))
    here = BatchMaker(*args)
    assert len(ahead) == here.steps - 1
    for step, batch in enumerate(ahead, start=1):
        assert torch.equal(batch.neighbourhood.nodes, here.make(2, step).neighbourhood.nodes)


def test_an_error_while_making_a_batch_reaches_the_loop() -> None:
    data = graph()
    maker = BatchMaker(ResidentStore.of(data), SMALL, 16, 0)
    maker.triples = maker.triples[:3]
    maker._order = (0, np.arange(900, 1000))
    with pytest.raises(IndexError):
        next(maker.epoch(0))


def test_schedule_rises_and_falls() -> None:
    model = torch.nn.Linear(2, 2)
    optimisers = Optimisers(model, OptimiserConfig(warmup=0.1, schedule="linear"), [100])
    factors = [optimisers.factor(u) for u in range(101)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == factors[9] and factors[100] == 0
    assert sorted(factors[9:], reverse=True) == factors[9:]


def test_a_schedule_of_cycles_rises_anew() -> None:
    model, config = torch.nn.Linear(2, 2), OptimiserConfig(warmup=0.1, schedule="cosine")
    whole = Optimisers(model, config, [60, 40])
    for start, length in ((0, 60), (60, 40)):
        alone = Optimisers(model, config, [length])
        factors = [whole.factor(start + update) for update in range(length)]
        assert factors == [alone.factor(update) for update in range(length)]
        assert factors[0] < 0.3 and factors[-1] < 0.01 < 0.9 < max(factors)
    assert whole.factor(100) < 1e-9


def test_snapshots_are_the_weights_at_the_ends_of_cycles_also_of_a_resumed_run(tmp_path: Path) -> None:
    config = replace(TRAIN, epochs=5, patience=1, evaluate_every=5)
    whole = fit(graph(), vectors(), SMALL, config, Keeping(tmp_path / "a"), snapshots=2)
    assert len(whole.history) == 5, "patience does not end a training in cycles"
    assert [METRIC in row for row in whole.history] == [True, False, True, False, True]
    victim = Keeping(tmp_path / "b", last=3)
    with pytest.raises(StopError):
        fit(graph(), vectors(), SMALL, config, victim, snapshots=2)
    resumed = fit(graph(), vectors(), SMALL, config, resume=victim.kept[-1], snapshots=2)
    assert same(whole, resumed) and len(whole.snapshots) == len(resumed.snapshots) == 2
    for one, other in zip(whole.snapshots, resumed.snapshots, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(TrainingError, match="another run: its snapshots"):
        fit(graph(), vectors(), SMALL, config, resume=victim.kept[-1], snapshots=1)

    for weights, row in zip(whole.snapshots, (whole.history[0], whole.history[2]), strict=True):
        trainer = Trainer(graph(), vectors(), SMALL, config, Worker("cpu"))
        done = trainer.finish_with(weights)
        assert done.history[0][METRIC] == row[METRIC], "what was validated then"
        assert done.best >= row[METRIC], "the weight of the structural view is found anew"


def _two_workers(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    done = fit(graph(), vectors(), SMALL, replace(TRAIN, batch_size=8, epochs=2), Worker("cpu"))
    torch.save({"weights": done.model.state_dict(), "best": done.best}, Path(folder) / f"{rank}.pt")
    # Averaging, sparse rows among it, against the mean of the gradients computed one by one.
    worker = Worker("cpu")
    dense, table = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(5, 2))
    dense.grad = torch.full((3,), float(rank + 1))
    rows = torch.tensor([[0, 3], [1, 3]][rank])
    table.grad = torch.sparse_coo_tensor(rows[None], torch.full((2, 2), float(rank + 1)), (5, 2))
    worker.average_gradients([dense, table])
    torch.save((dense.grad, table.grad.to_dense()), Path(folder) / f"grad{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_stay_equal_and_average_their_gradients(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_two_workers, args=(port, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    one, two = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    assert one["best"] == two["best"] > 0
    for name, value in one["weights"].items():
        assert torch.equal(value, two["weights"][name]), name
    dense, table = torch.load(tmp_path / "grad0.pt")
    assert dense.tolist() == [1.5] * 3
    assert table[:, 0].tolist() == [0.5, 1.0, 0.0, 1.5, 0.0]


@pytest.mark.parametrize("kind", ["attention", "rgcn"])
def test_several_threads_add_up_in_the_same_order(kind: str) -> None:
    """On a graph large enough for torch to share its rows out over threads."""
    generator = np.random.default_rng(0)
    facts = generator.integers(0, [400, 5, 400], (3000, 3))
    data = Graph.from_arrays({"train": facts[200:], "valid": facts[:200]}, 400, 5)
    model = replace(ONE_VS_ALL, dim=32, text=replace(SMALL.text, kind="none"), gnn=replace(SMALL.gnn, kind=kind))
    config = replace(TRAIN, epochs=1, batch_size=256)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        runs = [fit(data, None, model, config) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])
