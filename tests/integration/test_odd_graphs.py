"""Graphs unlike the benchmarks, through the jobs with the default configuration: a small one with planted rules, with
one relation, undirected, with texts missing or in another language.

python3 -m pytest tests/integration/test_odd_graphs.py -m "slow or not slow"
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ingest_oracle import SPLITS, read_graph

from kgray.artifact import Store
from kgray.config import from_dict
from kgray.data.config import DataConfig
from kgray.data.ingest import ingest, ingest_recipe
from kgray.data.inputs import Sizes
from kgray.data.partition import GraphConfig
from kgray.graph.graph import Graph
from kgray.pipeline import command, explain_command

pytestmark = pytest.mark.usefixtures("ray_cluster")
MRR = "test.both.realistic.filtered.full.mrr"
Row = tuple[str, str, str]


def write(folder: Path, rows: dict[str, list[Row]], more: str = "text: null\n") -> str:
    """A configuration that says nothing but where the triples lie."""
    folder.mkdir(exist_ok=True)
    for split, part in rows.items():
        (folder / f"{split}.tsv").write_text("".join("\t".join(row) + "\n" for row in part), encoding="utf-8")
    lines = [f"    {split}: {split}.tsv" for split in rows]
    config = "\n".join(["storage:", "  root: storage", "lineage:", "  enabled: false", "graph:", "  partitions: 2"])
    config += "\n" + more + "data:\n  triples:\n" + "\n".join(lines) + "\n"
    if (folder / "entities.tsv").exists():
        config += "  entities: entities.tsv\n"
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    return str(folder / "config.yaml")


def run(capfd: pytest.CaptureFixture[str], job: str, *arguments: str) -> dict[str, Any]:
    capfd.readouterr()
    status = explain_command.main(arguments) if job == "explain" else command.main(job, arguments)
    out, err = capfd.readouterr()
    assert status == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("sizes", [None, Sizes(chunk_bytes=300, task_bytes=400, bucket_bytes=300, small_bytes=0)])
def test_an_undirected_edge_is_one_fact_in_one_split_and_known_both_ways(tmp_path: Path, sizes: Sizes | None) -> None:
    rng = random.Random(0)
    edges = {frozenset(rng.sample(range(60), 2)) for _ in range(300)}
    lines = []
    for edge in edges:
        a, b = rng.sample(sorted(edge), 2)
        lines += [f"p{a}\tfriend\tp{b}"] * rng.choice([1, 2]) + [f"p{b}\tfriend\tp{a}"] * rng.choice([0, 1])
    rng.shuffle(lines)
    (tmp_path / "friends.tsv").write_text("\n".join(lines) + "\n")
    data = from_dict(
        DataConfig,
        {"triples": str(tmp_path / "friends.tsv"), "undirected": True, "split": {"valid": 0.2, "test": 0.2}},
    )
    store, how = Store(tmp_path), GraphConfig(partitions=3)
    artifact = store.build(ingest_recipe(store, data, how), lambda draft: ingest(draft, data, how, sizes)).artifact
    found = read_graph(Path(artifact.local_path("")))["triples"]
    pairs = [frozenset((int(row[0][1:]), int(row[2][1:]))) for split in SPLITS for row in found[split]]
    assert len(pairs) == len(set(pairs)) and set(pairs) == edges
    graph = Graph.load(artifact)
    assert graph.undirected and all(len(graph.triples[split]) for split in SPLITS)
    whole = np.concatenate([graph.triples[split] for split in SPLITS])
    # Nothing tells which end stands first: not the order of ids, which follows the same hash.
    assert 0.35 < np.mean(whole[:, 0] < whole[:, 2]) < 0.65
    for rows in (whole, whole[:, ::-1]):
        assert graph.known(SPLITS).contains(*rows.T).all()


def planted() -> dict[str, list[Row]]:
    """100 people: a family tree, whose inverse and whose two steps are relations of their own, marriages said both
    ways, and a relation of noise. What the rules give is held out."""
    rng = random.Random(0)
    parent = {n: (n - 1) // 3 for n in range(1, 100)}
    people = rng.sample(range(100), 100)
    couples = list(zip(people[::2], people[1::2], strict=True))
    rows: list[tuple[int, str, int]] = [(n, "child_of", p) for n, p in parent.items()]
    rows += [(a, "married_to", b) for a, b in couples]
    rows += [(rng.randrange(100), "likes", rng.randrange(100)) for _ in range(60)]
    follows = [(p, "parent_of", n) for n, p in parent.items()]
    follows += [(n, "grandchild_of", parent[p]) for n, p in parent.items() if p in parent]
    follows += [(b, "married_to", a) for a, b in couples]
    rng.shuffle(follows)
    train, valid, test = rows + follows[60:], follows[:30], follows[30:60]
    return {
        split: [(f"x{h}", r, f"x{t}") for h, r, t in part]
        for split, part in (("train", train), ("valid", valid), ("test", test))
    }


PLANTED = {
    "parent_of": "parent_of(X, Y) <- child_of(Y, X)",
    "grandchild_of": "grandchild_of(X, Y) <- child_of(X, Z), child_of(Z, Y)",
    "married_to": "married_to(X, Y) <- married_to(Y, X)",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_planted_rules_are_found_used_and_named(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = planted()
    config = write(tmp_path / "planted", rows)
    metrics = run(capfd, "evaluate", config)["metrics"]
    assert metrics[MRR] > 0.7
    for relation, rule in PLANTED.items():
        head, _, tail = next(row for row in rows["test"] if row[1] == relation)
        told = run(capfd, "explain", config, "--head", head, "--relation", relation, "--tail", tail, "--json")
        for one in told["explanations"]:
            named = {fired["rule"].split(" [")[0]: fired["groundings"] for fired in one["rules"]}
            assert rule in named, named
            facts = {tuple(fact) for grounding in named[rule] for fact in grounding}
            assert facts and facts <= set(rows["train"])


def one_relation() -> dict[str, list[Row]]:
    """A ring of chords, and a hub that all follow; the relation of the hub is in no held-out split."""
    rng = random.Random(1)
    ring = [(f"x{n}", "next", f"x{(n + step) % 150}") for n in range(150) for step in (1, 2)]
    rng.shuffle(ring)
    return {"train": ring[60:], "valid": ring[:30], "test": ring[30:60]}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["one relation", "a relation in training only", "a relation in test only"])
def test_few_relations(capfd: pytest.CaptureFixture[str], tmp_path: Path, kind: str) -> None:
    rows = one_relation()
    if kind != "one relation":
        rows["train"] += [(f"x{n}", "follows", "x0") for n in range(1, 150)]
    if kind == "a relation in test only":
        rows["test"] += [("x1", "unheard_of", "x9")]
    metrics = run(capfd, "evaluate", write(tmp_path / "few", rows), "evaluate.link_negatives=2")["metrics"]
    assert metrics[MRR] > 0.2  # chance is 0.04
    assert metrics["test.auc.uniform"] > 0.7 and "baseline.adamic_adar.test.auc.hard" in metrics


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_texts_that_lack_or_are_in_another_language(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Half of the entities without any text, the other half in Chinese and Greek; relations without."""
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [f"x{n}\t{('城市', 'πόλη')[n % 4 // 2] + str(n) if n % 2 else ''}\t" for n in range(150)]
    (folder / "entities.tsv").write_text("\n".join(["id\tname\tdescription", *lines]) + "\n", encoding="utf-8")
    config = write(folder, one_relation(), more="text:\n  encoder: sentence-transformers/all-MiniLM-L6-v2\n")
    assert run(capfd, "evaluate", config, "members.relations={}")["metrics"][MRR] > 0.2
