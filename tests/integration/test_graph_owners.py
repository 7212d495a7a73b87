"""A partitioned graph on a real Ray: owners killed with -9 answer again, and a training over them ends with the bits of
one on the resident graph.

    python3 -m pytest tests/integration/test_graph_owners.py
    python3 -m pytest -m slow tests/integration/test_graph_owners.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from stored_graphs import stored_graph
from test_train_kills import REPO, checkpoints, command, finish, model_files, until, write_config

from kgray.artifact import Artifact, Store
from kgray.errors import ArtifactError, GraphStoreError, TrainingError
from kgray.graph.actors import Owners, owners
from kgray.graph.config import StoreConfig
from kgray.graph.graph import Graph
from kgray.graph.partitioned import PartitionedStore
from kgray.graph.resident import ResidentStore
from kgray.graph.sampler import NeighbourSampler, step_generator
from kgray.graph.shard_build import build_shards
from kgray.graph.store import GraphStore

N, R = 400, 5


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Artifact]:
    generator = np.random.default_rng(0)
    triples = generator.integers(0, [N, R, N], (4000, 3))
    triples[:1000, 2] = 3
    store = Store(tmp_path_factory.mktemp("store"))
    return store, stored_graph(store, {"train": np.unique(triples, axis=0)}, (N, R), [100, 100, 250])


def samples(store: GraphStore, steps: range) -> Iterator[list[list[int]]]:
    sampler = NeighbourSampler(store.messages, [4, 3])
    for step in steps:
        generator = step_generator(0, 0, step, 0)
        seeds = np.unique(generator.integers(0, N, 50))
        rows = store.triples[np.arange(step, step + 20)]
        blocks = sampler.sample(seeds, generator, exclude=np.arange(step, step + 20))
        known = store.known.tails(rows[:, 0], rows[:, 1])
        yield [rows.ravel().tolist(), *(part.tolist() for b in blocks for part in (b.nodes, b.source, b.relation)),
               *(part.tolist() for part in known)]  # fmt: skip


def processes(root: int | None = None) -> list[psutil.Process]:
    """The owners' processes under a driver, this one by default."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith("ray::Owner"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_killed_owners_answer_again_and_nobody_is_left(ray_cluster: object, graph: tuple[Store, Artifact]) -> None:
    store, artifact = graph
    expected = list(samples(ResidentStore.of(Graph.load(artifact)), range(60)))
    shards = build_shards(store, artifact)
    with owners(shards, StoreConfig(store="partitioned", cache_mib=0, patience_s=100)) as held:
        reached = held.connect(0)
        found = []
        for step, one in enumerate(samples(reached, range(60))):
            found.append(one)
            if step in (10, 30):
                for process in processes()[: 1 + step // 30]:
                    process.send_signal(signal.SIGKILL)
        assert found == expected
        table = reached.traffic.table()
        assert table["hop 0"]["requests"] <= 60 * 3 and table["triples"]["received"] > 0, "an empty one is never asked"
        family = processes()
        assert len(family) == 4
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


def test_what_stays_out_of_reach_is_told_and_a_replica_stands_in(
    ray_cluster: object, graph: tuple[Store, Artifact]
) -> None:
    import ray

    store, artifact = graph
    shards = build_shards(store, artifact)
    expected = list(samples(ResidentStore.of(Graph.load(artifact)), range(3)))
    with owners(shards, StoreConfig(store="partitioned", replicas=2, patience_s=3)) as held:
        reached = held.connect(1)
        ray.kill(held.actors[3][1])  # this one never comes back
        assert list(samples(reached, range(3))) == expected
        ray.kill(held.actors[3][0])
        with pytest.raises(GraphStoreError, match=r"partition 3 .* did not answer for 3 s, asked .*graph\.replicas"):
            list(samples(_connected(held), range(3)))
    far_too_many = StoreConfig(replicas=1_000_000_000)
    with pytest.raises(TrainingError, match=r"of memory for 1000000000 replica"), owners(shards, far_too_many):
        pass


def _connected(held: Owners) -> PartitionedStore:
    return held.connect(0)


def test_an_owner_whose_files_are_damaged_says_which(ray_cluster: object, graph: tuple[Store, Artifact]) -> None:
    store, artifact = graph
    shards = build_shards(store, artifact)
    file = Path(shards.uri) / "part-00002" / "facts.npy"
    good = file.read_bytes()
    try:
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        config = StoreConfig(store="partitioned")
        with pytest.raises(ArtifactError, match=r"part-00002/facts\.npy has changed"), owners(shards, config):
            pass
    finally:
        file.write_bytes(good)
    _, alive = psutil.wait_procs(processes(), timeout=60)
    assert not alive, "killed, if not at once"


PARTITIONED = ["graph.store=partitioned", "graph.partitions=4", "graph.cache_mib=0"]
GNN = ["model.gnn.kind=attention", "model.gnn.fanouts=[4]", "model.objective.kind=sampled_softmax"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_training_whose_owner_is_killed_ends_with_the_bits_of_a_resident_one(
    tmp_path: Path, umls: Path, workers: int
) -> None:
    calm = write_config(tmp_path / "calm", umls, epochs=5, workers=workers)
    resident = finish(calm, *PARTITIONED[1:], *GNN)
    rough = write_config(tmp_path / "rough", umls, epochs=5, workers=workers)
    log = (tmp_path / "rough.log").open("w")
    driver = subprocess.Popen([*command(rough), *PARTITIONED, *GNN], cwd=REPO, stdout=log, stderr=log, text=True)
    killed = 0
    try:
        seen: set[str] = set()
        while driver.poll() is None:
            if checkpoints(rough) - seen and (family := processes(driver.pid)):
                seen |= checkpoints(rough)
                family[killed % len(family)].kill()
                killed += 1
            time.sleep(0.2)
        assert driver.returncode == 0, (tmp_path / "rough.log").read_text()[-3000:]
        assert killed >= 2
    finally:
        driver.kill()
        log.close()
    assert model_files(rough, str(resident["version"])) == model_files(calm, str(resident["version"]))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_owner_outlives_a_driver_that_is_killed(tmp_path: Path, umls: Path) -> None:
    config = write_config(tmp_path / "run", umls, epochs=50)
    log = (tmp_path / "run.log").open("w")
    driver = subprocess.Popen([*command(config), *PARTITIONED, *GNN], cwd=REPO, stdout=log, stderr=log, text=True)
    try:
        until(lambda: checkpoints(config), 300, "the first checkpoint")
        family = psutil.Process(driver.pid).children(recursive=True)
        assert len(processes(driver.pid)) == 4
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(timeout=30)
        _, alive = psutil.wait_procs(family, timeout=90)
        assert not alive
    finally:
        driver.kill()
        log.close()
