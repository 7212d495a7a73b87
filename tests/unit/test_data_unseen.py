"""Splits by entity: against a slow draw, and what must hold of any graph divided so."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kgray.artifact import Artifact, Store
from kgray.config import from_dict
from kgray.data.config import SPLITS, STORED, DataConfig, SplitConfig
from kgray.data.dictionary import mix
from kgray.data.ingest import ingest, ingest_recipe
from kgray.data.inputs import Sizes
from kgray.data.partition import GraphConfig
from kgray.data.tasks import in_process
from kgray.data.unseen import split_by_entity
from kgray.errors import ConfigError, DataError
from kgray.evaluation.ranking import filter_splits
from kgray.graph.graph import Graph

MASK = 2**64 - 1
ONE = 0x9E3779B97F4A7C15
Rows = set[tuple[str, str, str]]


def slow_mix(x: int) -> int:
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & MASK
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def slow_hash(text: str) -> int:
    total = 0
    for byte in reversed(text.encode()):
        total = (total * ONE + byte + 1) & MASK
    return slow_mix((total + len(text.encode()) * ONE) & MASK)


def share(value: int, seed: int) -> float:
    return (slow_mix((value + slow_mix((seed + ONE) & MASK)) & MASK) >> 11) / 2**53


def slow_split(row: tuple[str, str, str], config: SplitConfig) -> str:
    groups = []
    for entity in (row[0], row[2]):
        drawn = share(slow_hash(entity), config.seed)
        groups.append("test" if drawn < config.test else "valid" if drawn < config.test + config.valid else "train")
    group = "test" if "test" in groups else "valid" if "valid" in groups else "train"
    if group == "train":
        return group
    h, r, t = map(slow_hash, row)
    pair = slow_mix((max(h, t) + slow_mix(min(h, t))) & MASK)
    triple = slow_mix((h + slow_mix((r + slow_mix((t + ONE) & MASK)) & MASK)) & MASK)
    known = share(pair if config.keep_pairs else triple, config.seed) < config.support
    return "support" if known else group


def source(folder: Path, seed: int = 0) -> tuple[dict[str, Any], Rows]:
    """Given splits over 60 entities, a third of the facts in both directions, some in two files."""
    rng = random.Random(seed)
    rows = set()
    for _ in range(500):
        row = (f"e{rng.randrange(60)}", rng.choice(["r", "s"]), f"e{rng.randrange(60)}")
        rows |= {row, (row[2], row[1], row[0])} if rng.random() < 0.3 else {row}
    listed = sorted(rows)
    rng.shuffle(listed)
    files = {"train": listed[:400], "valid": listed[380:450], "test": listed[450:]}
    for split, part in files.items():
        (folder / f"{split}.tsv").write_text("".join("\t".join(row) + "\n" for row in part))
    return {"triples": {split: str(folder / f"{split}.tsv") for split in files}}, rows


def build(folder: Path, data: dict[str, Any], sizes: Sizes | None = None) -> Artifact:
    config, layout = from_dict(DataConfig, data), GraphConfig(partitions=3)
    store = Store(str(folder))
    recipe = ingest_recipe(store, config, layout)
    # Tasks run here, so no Ray is needed.
    cut = sizes or Sizes(small_bytes=0)
    return store.build(recipe, lambda draft: in_process(ingest, draft, config, layout, cut)).artifact


def named(graph: Graph, split: str) -> Rows:
    e, r = graph.entity_ids.to_pylist(), graph.relation_ids.to_pylist()
    return {(e[h], r[x], e[t]) for h, x, t in graph.triples[split].tolist()}


SPLIT = {"by": "entities", "valid": 0.1, "test": 0.2, "seed": 3}


@pytest.mark.parametrize("keep_pairs", [True, False])
@pytest.mark.parametrize("support", [0.0, 0.4])
def test_equals_the_oracle_and_holds_out(tmp_path: Path, keep_pairs: bool, support: float) -> None:
    data, rows = source(tmp_path)
    split = SPLIT | {"keep_pairs": keep_pairs, "support": support}
    artifact = build(tmp_path / "store", data | {"split": split})
    graph = Graph.load(artifact)
    config = from_dict(SplitConfig, split)
    found = {name: named(graph, name) for name in STORED}
    for name in STORED:
        assert found[name] == {row for row in rows if slow_split(row, config) == name}
        assert artifact.counts[f"triples_{name}"] == len(found[name]) == len(graph.triples[name])
    drawn = {f"e{n}": share(slow_hash(f"e{n}"), 3) for n in range(60)}
    of_test = {e for e, value in drawn.items() if value < 0.2}
    held = {e for e, value in drawn.items() if value < 0.3}
    assert not any({h, t} & held for h, _, t in found["train"])
    assert not any({h, t} & of_test for h, _, t in found["valid"])
    assert all({h, t} & of_test for h, _, t in found["test"])
    assert found["valid"] and found["test"] and bool(found["support"]) == (support > 0)
    trained = graph.trained_entities()
    assert trained is not None and not set(graph.entity_ids.take(trained).to_pylist()) & held
    pairs = [{frozenset((h, t)) for h, _, t in found[name]} for name in ("support", "valid", "test")]
    if keep_pairs:
        assert not pairs[0] & (pairs[1] | pairs[2])


def test_the_audit_reports_support(tmp_path: Path) -> None:
    data, _ = source(tmp_path)
    artifact = build(tmp_path / "store", data | {"split": SPLIT})
    told, graph = artifact.read_json("audit.json"), Graph.load(artifact)
    trained = {e for h, _, t in named(graph, "train") for e in (h, t)}
    supported = {e for h, _, t in named(graph, "support") for e in (h, t)}
    asked = {s: {e for h, _, t in named(graph, s) for e in (h, t)} for s in ("valid", "test")}
    assert told["support"] == {
        "triples": len(graph.triples["support"]),
        "only_support_entities": len(supported - trained - asked["valid"] - asked["test"]),
        "unseen_entities": {
            s: {"total": len(asked[s] - trained), "without_support": len(asked[s] - trained - supported)}
            for s in ("valid", "test")
        },
    }
    assert told["triples"] == {s: len(graph.triples[s]) for s in SPLITS}
    assert told["entities"]["without_triples"] == 0
    assert "moved_to_train" not in told


def test_the_same_however_it_is_cut_and_another_by_seed(tmp_path: Path) -> None:
    data, _ = source(tmp_path)
    tiny = Sizes(chunk_bytes=700, task_bytes=900, bucket_bytes=1200, small_bytes=0)
    graphs = [
        Graph.load(build(tmp_path / name, data | {"split": SPLIT | {"seed": seed}}, sizes))
        for name, seed, sizes in (("a", 3, None), ("b", 3, tiny), ("c", 4, None))
    ]
    for split in STORED:
        assert named(graphs[0], split) == named(graphs[1], split) != named(graphs[2], split)


def test_one_pool_gives_what_its_files_give(tmp_path: Path) -> None:
    data, _ = source(tmp_path)
    one = {"triples": list(data["triples"].values())}
    graphs = [Graph.load(build(tmp_path / n, d | {"split": SPLIT})) for n, d in (("a", data), ("b", one))]
    assert all(named(graphs[0], split) == named(graphs[1], split) for split in STORED)


def test_other_graphs_have_no_support_and_keep_their_version(tmp_path: Path) -> None:
    data, _ = source(tmp_path)
    artifact = build(tmp_path / "store", data)
    graph = Graph.load(artifact)
    assert "triples_support" not in artifact.counts and not artifact.files("triples/support")
    assert "support" not in artifact.read_json("audit.json")
    assert len(graph.triples["support"]) == 0 and graph.context is graph.triples["train"]
    assert graph.trained_entities() is None
    assert artifact.config["split"] is None
    drawn = from_dict(DataConfig, {"triples": list(data["triples"].values()), "split": {"seed": 5}})
    recipe = ingest_recipe(Store(str(tmp_path / "store")), drawn, GraphConfig())
    assert recipe.config["split"] == {"valid": 0.05, "test": 0.05, "seed": 5}


def test_messages_at_inference_are_those_of_train_and_support(tmp_path: Path) -> None:
    data, _ = source(tmp_path)
    graph = Graph.load(build(tmp_path / "store", data | {"split": SPLIT}))
    index, size = graph.inference_index(), graph.num_relations
    edges = set()
    for entity in range(graph.num_entities):
        for at in range(index.offsets[entity], index.offsets[entity + 1]):
            other, relation = int(index.sources[at]), int(index.relations[at])
            edges.add((other, relation, entity) if relation < size else (entity, relation - size, other))
    known = {tuple(row) for split in ("train", "support") for row in graph.triples[split].tolist()}
    asked = {tuple(row) for split in ("valid", "test") for row in graph.triples[split].tolist()}
    assert edges == known and not edges & asked
    assert graph.message_index().num_triples == len(graph.triples["train"])
    train = graph.triples["train"]
    trained = graph.trained_entities()
    assert trained is not None and set(trained.tolist()) == set(train[:, [0, 2]].ravel().tolist())
    filters = graph.known(filter_splits("test"))
    every = np.concatenate([graph.triples[split] for split in STORED])
    assert filters.contains(*every.T).all()
    assert not graph.known(filter_splits("valid")).contains(*graph.triples["test"].T).any()


def test_unknown_entities_are_named_by_their_split(tmp_path: Path) -> None:
    data, _ = source(tmp_path)
    (tmp_path / "entities.tsv").write_text("id\tname\n" + "".join(f"e{n}\tx\n" for n in range(5)))
    with pytest.raises(DataError, match="has no row in the entity table"):
        build(tmp_path / "store", data | {"entities": str(tmp_path / "entities.tsv"), "split": SPLIT})


def test_shares_are_near_what_is_asked() -> None:
    hashes = mix(np.arange(20000, dtype=np.uint64))
    relations = mix(np.arange(5, dtype=np.uint64))
    rng = np.random.default_rng(0)
    heads, tails = rng.integers(0, 20000, (2, 50000))
    config = SplitConfig(by="entities", valid=0.05, test=0.1, support=0.3)
    splits = split_by_entity(hashes, heads, relations[rng.integers(0, 5, 50000)], tails, config)
    counts = np.bincount(splits, minlength=4) / 50000
    np.testing.assert_allclose(counts[0], 0.85**2, atol=0.01)
    np.testing.assert_allclose(counts[3] / counts[1:].sum(), 0.3, atol=0.02)


@pytest.mark.parametrize(
    ("values", "key"),
    [({"by": "triple"}, "by"), ({"support": 1.0}, "support"), ({"support": -0.1}, "support")],
)
def test_configuration_mistakes(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(SplitConfig, values)
    assert caught.value.key == key


def test_nothing_left_to_train_on_is_told(tmp_path: Path) -> None:
    (tmp_path / "all.tsv").write_text("a\tr\tb\nc\tr\td\n")
    with pytest.raises(DataError, match="no training triple is left"):
        data = {"triples": str(tmp_path / "all.tsv"), "split": {"by": "entities", "test": 0.99, "valid": 0.0}}
        build(tmp_path / "store", data)
