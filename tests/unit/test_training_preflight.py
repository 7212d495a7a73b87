"""What a training needs, before it begins: counted, told, refused; and the probe leaves no trace.

python3 -m pytest tests/unit/test_training_preflight.py
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from model_graphs import ENTITIES, ONE_VS_ALL, RELATIONS, SMALL, TRAIN, WIDTH, graph, vectors

from kgray.errors import TrainingError
from kgray.graph.config import StoreConfig
from kgray.model.config import TextTowerConfig
from kgray.model.paths_config import PathsConfig
from kgray.model.relations_config import RelationsConfig
from kgray.model.towers import Table
from kgray.runtime import Room
from kgray.training import probe
from kgray.training.estimate import Estimate, Need, Sizes, estimate, parameters
from kgray.training.loop import Trainer, fit
from kgray.training.preflight import Disk, check, problems, size, table
from kgray.training.probe import seconds_a_step
from kgray.training.worker import Worker

GIB = 1 << 30
SIZES = Sizes(ENTITIES, RELATIONS, {"train": 96, "valid": 12, "test": 12}, WIDTH, 1000)
NEEDS = Estimate((Need("weights", 2 * GIB, ("model.dim",)), Need("a step", GIB, ("train.batch_size",))), GIB, GIB)
MODELS = [
    (SMALL, True),
    (replace(ONE_VS_ALL, decoder="conve", dim=32), True),
    (replace(SMALL, text=TextTowerConfig(kind="none"), gnn=replace(SMALL.gnn, kind="none")), False),
    (replace(SMALL, late_structure=False, gnn=replace(SMALL.gnn, kind="rgcn")), True),
    (PathsConfig(layers=2, dim=8), False),
]


@pytest.mark.parametrize(("model", "reads"), MODELS)
def test_weights_are_counted_without_making_them(model: Any, reads: bool) -> None:
    trainer = Trainer(graph(), vectors() if reads else None, model, TRAIN, Worker("cpu"))
    tables = {id(m.weight): m.weight.numel() for m in trainer.model.modules() if isinstance(m, Table)}
    whole = sum(p.numel() for p in trainer.model.parameters())
    assert parameters(SIZES, model) == (sum(tables.values()), whole - sum(tables.values()))


@pytest.mark.parametrize("grown", ["batch_size", "dim", "entities", "train"])
@pytest.mark.parametrize("model", [SMALL, ONE_VS_ALL, PathsConfig(), RelationsConfig(text=False)])
def test_more_of_anything_needs_more(model: Any, grown: str) -> None:
    sizes = Sizes(100_000, 20, {"train": 1_000_000, "valid": 1000}, 384)
    before = estimate(sizes, model, TRAIN)
    train = replace(TRAIN, batch_size=4096) if grown == "batch_size" else TRAIN
    if grown == "dim":
        model = replace(model, dim=4 * model.dim)
    if grown == "entities":
        sizes = replace(sizes, entities=400_000)
    if grown == "train":
        sizes = replace(sizes, triples={"train": 4_000_000, "valid": 1000})
    after = estimate(sizes, model, train)
    if isinstance(model, PathsConfig) and grown == "entities":
        return  # as many edges among more entities: fewer are reached
    # A larger batch may hide behind a validation that takes more.
    assert after.total >= before.total if grown == "batch_size" else after.total > before.total
    if grown in ("dim", "entities") and isinstance(model, type(SMALL)):
        assert after.checkpoint > before.checkpoint and after.artifact > before.artifact


def test_what_does_not_fit_is_refused_with_numbers_and_keys(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kgray")
    roomy, tight = Room("10.0.0.1", 4, 8 * GIB), Room("10.0.0.2", 16, 2 * GIB)
    disk = Disk("checkpoints and artifact", "/store", 4 * GIB, 5 * GIB)
    assert not problems(NEEDS, TRAIN, 1.0, [roomy, tight], [disk])
    check(NEEDS, TRAIN, 1.0, [roomy], [disk])
    assert "3.0 GiB" in caplog.text and "8.0 GiB" in caplog.text and "5.0 GiB free at /store" in caplog.text
    with pytest.raises(TrainingError, match=r"1 worker of 3\.0 GiB .*2\.0 GiB at 10\.0\.0\.2.*model\.dim or train\.b"):
        check(NEEDS, TRAIN, 1.0, [tight], [disk])
    three = replace(TRAIN, workers=3)
    with pytest.raises(TrainingError, match=r"3 workers of 3\.0 GiB .*lower train\.workers or model\.dim"):
        check(NEEDS, three, 1.0, [roomy, tight], [disk])
    assert not problems(NEEDS, replace(three, least_workers=2), 1.0, [roomy, tight], [disk]), "two are enough"
    assert problems(NEEDS, replace(TRAIN, workers=2), 4.0, [roomy], [disk]), "its CPUs hold one"
    with pytest.raises(TrainingError, match=r"need 4\.0 GiB at /store, where 1\.0 GiB are free.*storage\.root"):
        check(NEEDS, TRAIN, 1.0, [roomy], [replace(disk, free=GIB)])
    check(NEEDS, TRAIN, 1.0, [roomy], [replace(disk, free=None, place="s3://bucket")])
    check(NEEDS, replace(TRAIN, preflight="force"), 1.0, [tight], [disk])
    assert "train.preflight=force" in caplog.records[-1].getMessage()
    assert "unknown free at s3://" in caplog.text
    assert "weights" in table(NEEDS, 1, [roomy], [disk]) and size(1536 << 20) == "1.5 GiB" and size(2048) == "2 KiB"


def test_a_graph_that_is_not_the_workers_own_is_counted_once_a_node() -> None:
    """A hundred million triples: what every worker would hold, what a node maps for all, what owners hold elsewhere."""
    sizes = Sizes(10_000_000, 100, {"train": 100_000_000, "valid": 1000})
    model = replace(SMALL, text=TextTowerConfig(kind="none"))
    alone = estimate(sizes, model, TRAIN)
    mapped = estimate(sizes, model, TRAIN, store=StoreConfig())
    apart = estimate(sizes, model, TRAIN, store=StoreConfig(store="partitioned", cache_mib=512))
    assert mapped.total < alone.total - 15 * GIB and apart.total == mapped.total + (512 << 20)
    assert mapped.shared > 9 * GIB and apart.shared < GIB and alone.shared == alone.closing == 0
    assert apart.closing > 20 * GIB, "who writes the model still loads all facts"
    paths = [estimate(sizes, PathsConfig(), TRAIN, store=store) for store in (None, StoreConfig(store="partitioned"))]
    assert paths[0] == paths[1], "the whole graph, whatever the store"

    train = replace(TRAIN, workers=8, cpus_per_worker=1.0)
    room = Room("10.0.0.1", 8, mapped.shared + 8 * mapped.total + 1)
    assert not problems(mapped, train, 1.0, [room], [])
    assert problems(mapped, train, 1.0, [replace(room, memory=room.memory - mapped.shared)], [])
    small = [Room(f"10.0.0.{n}", 2, apart.shared + 2 * apart.total + 1) for n in range(4)]
    (told,) = problems(replace(apart, closing=small[0].memory + 1), train, 1.0, small, [])
    assert "loads all facts at the end" in told and "a node with more memory" in told
    told = table(mapped, 8, [room], [])
    assert "graph, once a node" in told and "at the end, with all facts" in told


@pytest.mark.parametrize(
    ("model", "reads"), [*MODELS, (RelationsConfig(text=False, dim=8, hidden=8, bodies=20), False)]
)
def test_after_a_probe_training_has_the_same_bits(
    model: Any, reads: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kgray")
    read = vectors() if reads else None
    config = replace(TRAIN, epochs=2)
    without = fit(graph(), read, model, replace(config, preflight="off"))
    assert "ms a step" not in caplog.text
    monkeypatch.setattr(probe, "_WORTH", 1)
    probed = fit(graph(), read, model, config)
    assert "ms a step" in caplog.text and "for train.epochs=2" in caplog.text
    assert probed.history == without.history
    for name, value in without.model.state_dict().items():
        assert torch.equal(value, probed.model.state_dict()[name]), name


def test_a_short_training_is_not_probed_and_a_broken_loss_is_left_to_training() -> None:
    worker = Worker("cpu")
    fit(graph(), vectors(), SMALL, TRAIN, worker)
    text = vectors()
    text.parts[0][:] = float("inf")
    assert seconds_a_step(Trainer(graph(), text, SMALL, TRAIN, worker)) is None
