"""Resident or partitioned, a graph gives the same samples and the same answers in the same order.

python3 -m pytest tests/unit/test_graph_store.py
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from stored_graphs import CallTransport, partitioned, shards_of, stored_graph

from kgray.artifact import Artifact, Store
from kgray.errors import ArtifactError, ConfigError
from kgray.graph.config import StoreConfig
from kgray.graph.graph import Graph
from kgray.graph.members import Members
from kgray.graph.neighbours import narrow
from kgray.graph.resident import KIND, ResidentStore, node_root, open_resident
from kgray.graph.sampler import NeighbourSampler, step_generator
from kgray.graph.shard import Shard
from kgray.graph.store import GraphStore

N, R = 60, 4
CUTS = {"one partition": [], "four": [15, 30, 45], "empty ones": [0, 20, 20, 59, 60, 60]}


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KGRAY_CACHE", str(tmp_path / "cache"))


def some_triples(count: int = 300, seed: int = 0) -> np.ndarray:
    """With loops, a hub that half of the triples name, parallel edges, and entities 50 on that nobody names."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, [50, R, 50], (count, 3))
    rows[: count // 2, 2] = 7
    rows[:5, 0] = rows[:5, 2]
    return np.unique(rows, axis=0)


def bodies(store: Store, triples: np.ndarray, cuts: list[int], undirected: bool = False) -> dict[str, GraphStore]:
    """The oracle first: everything in memory."""
    artifact = stored_graph(store, {"train": triples}, (N, R), cuts, undirected)
    shards = shards_of(store, artifact)
    return {
        "memory": ResidentStore.of(Graph.load(artifact)),
        "mapped": open_resident(artifact),
        "partitioned": partitioned(shards),
        "with a cache": partitioned(shards, cache_bytes=400),
        "with all in it": partitioned(shards, cache_bytes=1 << 20),
    }


def blocks(store: GraphStore, fanouts: list[int], step: int) -> list[np.ndarray]:
    generator = step_generator(3, 1, step, 0)
    seeds = np.unique(generator.integers(0, N, 12))
    exclude = None if step == 0 else np.arange(step, len(store.triples), 3)
    found = NeighbourSampler(store.messages, fanouts).sample(seeds, generator, exclude)
    return [a for b in found for a in (b.nodes, np.array([b.num_targets]), b.source, b.target, b.relation)]


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("fanouts", [[3], [3, 2], [-1, 4], [20, -1, 2]])
def test_the_same_seeds_give_the_same_samples(tmp_path: Path, cuts: list[int], fanouts: list[int]) -> None:
    stores = bodies(Store(tmp_path), some_triples(), cuts)
    for step in range(4):
        expected = blocks(stores["memory"], fanouts, step)
        for name, store in stores.items():
            for ours, wanted in zip(blocks(store, fanouts, step), expected, strict=True):
                assert ours.dtype == wanted.dtype and np.array_equal(ours, wanted), (name, step)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("undirected", [False, True])
def test_the_same_answers_in_the_same_order(tmp_path: Path, cuts: list[int], undirected: bool) -> None:
    stores = bodies(Store(tmp_path), some_triples(), cuts, undirected)
    generator = np.random.default_rng(5)
    positions = generator.permutation(len(stores["memory"].triples))[:40]
    heads, relations, tails = stores["memory"].triples[positions].T
    heads, tails = (np.where(generator.random(40) < 0.2, generator.integers(0, N, 40), one) for one in (heads, tails))
    few, many = Members(generator.integers(0, N, 5)), Members(np.arange(N))
    questions: dict[str, Callable[[GraphStore], object]] = {
        "size": lambda s: np.array([s.num_entities, s.num_relations, len(s.triples), s.messages.num_triples]),
        "triples": lambda s: s.triples[positions],
        "degrees": lambda s: s.messages.degrees_of(np.arange(N)),
        "all degrees": lambda s: s.messages.degrees.astype(np.int64),
        "tails": lambda s: s.known.tails(heads, relations),
        "heads": lambda s: s.known.heads(relations, tails),
        "tails among few": lambda s: s.known.tails(heads, relations, few),
        "heads among all": lambda s: s.known.heads(relations, tails, many),
        "relations": lambda s: s.known.relations(heads, tails),
        "pairs": lambda s: s.same_pair(heads, tails),
        "no triples": lambda s: s.triples[positions[:0]],
        "no tails": lambda s: s.known.tails(heads[:0], relations[:0]),
    }
    for what, ask in questions.items():
        expected = ask(stores["memory"])
        for name, store in stores.items():
            got = ask(store)
            pairs = zip(got, expected, strict=True) if isinstance(expected, tuple) else [(got, expected)]
            for ours, wanted in pairs:
                assert np.asarray(ours).dtype == np.int64 and np.array_equal(ours, wanted), (what, name)
    with pytest.raises(ValueError, match=f"entity id {N} outside"):
        stores["partitioned"].known.tails([N], [0])


def test_pairs_are_those_a_look_at_every_triple_finds(tmp_path: Path) -> None:
    triples = some_triples()
    stores = bodies(Store(tmp_path), triples, CUTS["four"])
    rows = stores["memory"].triples[np.arange(len(triples))]
    asked = {frozenset((h, t)) for h, _, t in rows[:30].tolist()}
    slow = [i for i, (h, _, t) in enumerate(rows.tolist()) if frozenset((h, t)) in asked]
    for store in stores.values():
        assert store.same_pair(rows[:30, 0], rows[:30, 2]).tolist() == slow


def test_one_request_an_owner_and_hop_and_none_for_what_is_kept(tmp_path: Path) -> None:
    stores = bodies(Store(tmp_path), some_triples(), CUTS["four"])
    for name, most in {"partitioned": 4, "with all in it": 0}.items():
        desk = stores[name].desk  # type: ignore[attr-defined]
        transport: CallTransport = desk.transport
        transport.asked.clear()
        blocks(stores[name], [3, 2], 1)
        assert len(transport.asked) <= 2 * most, "two hops"
        assert all(request.method == "edges" for request in transport.asked)
    table = stores["partitioned"].traffic.table()  # type: ignore[attr-defined]
    assert 3 <= table["hop 0"]["requests"] <= table["hop 1"]["requests"] == 4 and table["hop 1"]["received"] > 0
    assert stores["with all in it"].traffic.table()["hop 1"]["kept"] > 0  # type: ignore[attr-defined]
    kept = stores["with a cache"].messages.kept  # type: ignore[attr-defined]
    degrees = stores["memory"].messages.degrees
    assert 0 < kept.nbytes <= 400 + 8 and 7 not in kept.nodes.tolist(), "the hub alone is larger than the room"
    assert degrees[kept.nodes].min() >= np.sort(np.delete(degrees, [*kept.nodes, 7]))[-1]


def _open(artifact: Artifact, answers: multiprocessing.Queue[int]) -> None:
    answers.put(int(open_resident(artifact).messages.offsets[-1]))


def test_workers_of_a_node_write_its_copy_once_and_map_it(tmp_path: Path) -> None:
    artifact = stored_graph(Store(tmp_path), {"train": some_triples(20_000)}, (N, R), [30])
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[int] = context.Queue()
    workers = [context.Process(target=_open, args=(artifact, answers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    edges = {answers.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    copies = list((node_root() / KIND).iterdir())
    assert edges == {2 * artifact.counts["triples_train"]} and len(copies) == 1
    assert not list((node_root() / ".tmp").iterdir()), "a draft or a lock was left behind"
    before = copies[0].stat().st_ino
    store = open_resident(artifact)
    assert copies[0].stat().st_ino == before
    owner = store.messages.sources
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    assert isinstance(owner, np.memmap) and not store.messages.sources.flags.writeable


def test_a_damaged_copy_is_written_anew_and_a_damaged_shard_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    artifact = stored_graph(store, {"train": some_triples()}, (N, R), [30])
    wanted = open_resident(artifact).messages.sources.copy()
    (copy,) = (node_root() / KIND).iterdir()
    for damage in (_flip, lambda file: os.truncate(file, 100), Path.unlink):
        damage(copy / "index.sources.npy")
        caplog.clear()
        assert np.array_equal(open_resident(artifact).messages.sources, wanted)
        assert "index.sources.npy" in caplog.text and "written anew" in caplog.text
    shards = shards_of(store, artifact)
    _flip(Path(shards.uri) / "part-00001" / "sources.npy")
    Shard.open(shards, 0)
    with pytest.raises(ArtifactError, match=r"part-00001/sources\.npy has changed"):
        Shard.open(shards, 1)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_files_that_do_not_follow_the_partitions_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    good = stored_graph(store, {"train": some_triples()}, (N, R), [30])
    bad = Artifact(good.uri, {**good.manifest, "version": "0" * 16})
    (Path(good.uri) / "triples/train/part-00000.parquet").rename(tmp_path / "kept")
    (Path(good.uri) / "triples/train/part-00001.parquet").rename(Path(good.uri) / "triples/train/part-00000.parquet")
    (tmp_path / "kept").rename(Path(good.uri) / "triples/train/part-00001.parquet")
    sizes = {name: (Path(good.uri) / name).stat().st_size for name in good.files()}
    bad.manifest["files"] = [{**entry, "bytes": sizes[entry["path"]]} for entry in good.manifest["files"]]
    with pytest.raises(ArtifactError, match=r"holds a head outside its partition, entities 0\.\.29"):
        shards_of(store, bad)


def test_numbers_and_members() -> None:
    assert [narrow(limit) for limit in (0, 1, 2**15, 2**15 + 1, 2**31, 2**31 + 1)] == [
        np.int16, np.int16, np.int16, np.int32, np.int32, np.int64,
    ]  # fmt: skip
    generator = np.random.default_rng(0)
    for limit, count in ((50, 10), (10**12, 1000), (40_000, 30_000), (5, 0)):
        members, asked = generator.integers(0, limit, count), generator.integers(0, limit, 5000)
        asked = np.concatenate([asked, members])
        assert np.array_equal(Members(members)(asked), np.isin(asked, members))
        if limit <= 2**15:
            assert np.array_equal(Members(members)(asked.astype(np.int16)), np.isin(asked, members))


def test_wrong_settings_are_told() -> None:
    for key, value in (("replicas", 0), ("prefetch", 0), ("cache_mib", -1), ("patience_s", 0.0)):
        with pytest.raises(ConfigError, match=key):
            StoreConfig(**{key: value})  # type: ignore[arg-type]
