"""Graphs that are drawn, partitioners, and what an out-of-core ingest must keep to: on a real Ray."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from ingest_oracle import SPLITS, read_graph

from kgray.artifact import Draft, Store
from kgray.config import from_dict
from kgray.data.config import DataConfig
from kgray.data.ingest import ingest, ingest_recipe
from kgray.data.inputs import Sizes
from kgray.data.partition import GraphConfig
from kgray.data.synthetic import SyntheticGraph
from kgray.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("ray_cluster")
TINY = Sizes(chunk_bytes=9000, task_bytes=9000, bucket_bytes=20000, small_bytes=0, cell_triples=500)
DRAWN: dict[str, Any] = {
    "triples": 4000,
    "synthetic": {"entities": 600, "relations": 12, "communities": 60, "seed": 3},
    "split": {"valid": 0.1, "test": 0.1},
}


def run(folder: Path, data: dict[str, Any], sizes: Sizes | None = None, **graph: Any) -> dict[str, int | float]:
    folder.mkdir()
    config = from_dict(DataConfig, data)
    return ingest(Draft(str(folder)), config, from_dict(GraphConfig, {"partitions": 4} | graph), sizes)


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def facts(folder: Path) -> dict[str, set[tuple[Any, ...]]]:
    return {split: set(rows) for split, rows in read_graph(folder)["triples"].items()}


def spans(folder: Path) -> list[tuple[int, int]]:
    return [tuple(span) for span in json.loads((folder / "partitions.json").read_text())["entities"]]


def told(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "audit.json").read_text())["partitions"])


def test_a_drawn_graph_is_the_one_its_files_give(tmp_path: Path) -> None:
    """Down to the bytes, but for where it says it comes from."""
    config = from_dict(DataConfig, DRAWN)
    drawn = SyntheticGraph.of(config)
    assert drawn is not None
    drawn.write_tsv(str(tmp_path / "t.tsv"), 0, drawn.triples)
    run(tmp_path / "drawn", DRAWN, TINY)
    run(tmp_path / "whole", DRAWN)
    run(tmp_path / "read", DRAWN | {"triples": str(tmp_path / "t.tsv")}, TINY)
    first = fingerprint(tmp_path / "drawn")
    assert first == fingerprint(tmp_path / "whole")
    files = fingerprint(tmp_path / "read")
    assert {name for name in files if files[name] != first[name]} == {"sources.json"}
    sources = json.loads((tmp_path / "drawn" / "sources.json").read_text())
    assert sources[0]["path"] == "synthetic" and sources[0]["synthetic"]["seed"] == 3


def test_the_version_of_a_drawn_graph_follows_its_settings(tmp_path: Path) -> None:
    def version(data: dict[str, Any] | None = None, **graph: Any) -> str:
        config = from_dict(DataConfig, DRAWN | (data or {}))
        return ingest_recipe(Store(tmp_path), config, from_dict(GraphConfig, graph)).version

    first = version()
    assert version() == first
    others = [
        version({"triples": 4001}),
        version({"synthetic": {"entities": 600, "seed": 4}}),
        version(partitioner="locality"),
        version(partitioner="relation"),
        version(partitioner="locality", passes=3),
    ]
    assert len({first, *others}) == 6
    # What decides nothing has no say: passes of a partitioner that makes none, a partitioner of one partition.
    assert version(passes=3) == first
    assert version(partitions=1, partitioner="locality") == version(partitions=1)


@pytest.mark.parametrize("partitioner", ["locality", "relation"])
def test_a_partitioner_decides_ids_and_nothing_else(tmp_path: Path, partitioner: str) -> None:
    by_hash, found = tmp_path / "hash", tmp_path / partitioner
    before = run(by_hash, DRAWN, TINY)
    counts = run(found, DRAWN, TINY, partitioner=partitioner)
    assert facts(found) == facts(by_hash)
    for key in ("entities", "relations", *(f"triples_{s}" for s in SPLITS)):
        assert counts[key] == before[key]
    ranges = spans(found)
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    sizes = [end - start for start, end in ranges]
    assert sum(sizes) == counts["entities"] and min(sizes) >= 1
    assert max(sizes) <= int(1.05 * sum(sizes) / 4)
    graph = read_graph(found)  # which asserts that ids are dense
    order = [row["external_id"] for row in read_graph(by_hash)["entities"]]
    for start, end in ranges:  # within a partition in the order of hashes, as all of them by hash
        names = [row["external_id"] for row in graph["entities"][start:end]]
        assert names == sorted(names, key=order.index)
    audits = [json.loads((folder / "audit.json").read_text()) for folder in (by_hash, found)]
    for audit in audits:
        del audit["partitions"]
        audit["degree"]["hubs"] = {hub["degree"]: None for hub in audit["degree"]["hubs"]}  # of one degree, by id
    assert audits[0] == audits[1]


@pytest.mark.parametrize("partitioner", ["hash", "locality", "relation"])
def test_figures_of_partitions_are_true(tmp_path: Path, partitioner: str) -> None:
    """Counted again from the files, in plain loops; the same bytes however the work is cut."""
    run(tmp_path / "graph", DRAWN, TINY, partitioner=partitioner)
    for name, sizes in (("whole", None), ("other", Sizes(9999, 30000, 30000, 9000, 0, 10**6))):
        run(tmp_path / name, DRAWN, sizes, partitioner=partitioner)
        assert fingerprint(tmp_path / name) == fingerprint(tmp_path / "graph")
    ranges, report = spans(tmp_path / "graph"), told(tmp_path / "graph")
    owner = {entity: p for p, (start, end) in enumerate(ranges) for entity in range(start, end)}
    cut, triples = 0, [0] * len(ranges)
    halo: list[set[int]] = [set() for _ in ranges]
    relations: list[set[int]] = [set() for _ in ranges]
    for p in range(len(ranges)):
        for split in SPLITS:
            for row in pq.read_table(tmp_path / "graph" / f"triples/{split}/part-{p:05d}.parquet").to_pylist():
                assert owner[row["head"]] == p
                triples[p] += 1
                relations[p].add(row["relation"])
                if owner[row["tail"]] != p:
                    cut += 1
                    halo[p].add(row["tail"])
    shares = [len(one) / (len(one) + end - start) for one, (start, end) in zip(halo, ranges, strict=True)]
    sizes_of = [end - start for start, end in ranges]
    assert report["partitioner"] == partitioner and report["number"] == 4 and report["triples"] == triples
    assert report["edge_cut"] == pytest.approx(cut / sum(triples), abs=1e-6)
    assert report["halo"]["mean"] == pytest.approx(sum(shares) / 4, abs=1e-6)
    assert report["halo"]["max"] == pytest.approx(max(shares), abs=1e-6)
    assert report["relations"] == pytest.approx(sum(map(len, relations)) / 4, abs=1e-3)
    for key, numbers in (("entities", sizes_of), ("triples", triples)):
        assert report["balance"][key] == pytest.approx(max(numbers) / (sum(numbers) / 4), abs=1e-6)


def test_each_partitioner_is_good_at_its_own(tmp_path: Path) -> None:
    report = {}
    for partitioner in ("hash", "locality", "relation"):
        run(tmp_path / partitioner, DRAWN | {"triples": 8000}, partitioner=partitioner)
        report[partitioner] = told(tmp_path / partitioner)
    assert report["hash"]["edge_cut"] == pytest.approx(0.75, abs=0.05)
    assert report["locality"]["edge_cut"] < 0.8 * report["hash"]["edge_cut"]
    assert report["locality"]["halo"]["mean"] < report["hash"]["halo"]["mean"]
    assert report["relation"]["relations"] <= report["hash"]["relations"]
    assert len(report["locality"]["passes"]) == 8 and "passes" not in report["hash"]


ODD: dict[str, list[tuple[str, str, str]]] = {
    "loops alone": [(f"e{n}", "r", f"e{n}") for n in range(8)],
    "a hub": [("hub", f"r{n % 2}", f"e{n}") for n in range(400)] + [(f"e{n}", "r0", "hub") for n in range(400)],
    "islands": [(f"a{n}", "r", f"b{n}") for n in range(10)],
    "all from one": [("one", "r", f"e{n}") for n in range(9)],
    "one triple": [("a", "r", "b")],
}


@pytest.mark.parametrize("partitioner", ["hash", "locality", "relation"])
@pytest.mark.parametrize("case", ODD)
def test_odd_graphs(tmp_path: Path, case: str, partitioner: str) -> None:
    """Loops, a hub, partitions without a triple, one partition, and one for each entity."""
    rows = [*ODD[case], *ODD[case][:3]]
    random.Random(0).shuffle(rows)
    (tmp_path / "t.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    entities = {e for h, _, t in rows for e in (h, t)}
    data = {"triples": {"train": str(tmp_path / "t.tsv")}}
    for partitions in sorted({1, 2, min(len(entities), 40)}):
        sizes = Sizes(chunk_bytes=3000, task_bytes=3000, bucket_bytes=3000, small_bytes=0, cell_triples=100)
        folder = tmp_path / f"graph{partitions}"
        counts = run(folder, data, sizes, partitions=partitions, partitioner=partitioner)
        assert counts["triples_train"] == len(set(rows)) and counts["entities"] == len(entities)
        assert {row[:3] for row in facts(folder)["train"]} == set(rows)
        assert len(spans(folder)) == partitions and all(end > start for start, end in spans(folder))
        assert counts["edge_cut"] == 0 if partitions == 1 else 0 <= counts["edge_cut"] <= 1
    with pytest.raises(ConfigError, match=rf"graph\.partitions.*at most one for each of the {len(entities)} entities"):
        run(tmp_path / "more", data, partitions=len(entities) + 1, partitioner=partitioner)


def test_partitioners_with_tables_held_out_entities_and_both_directions(tmp_path: Path) -> None:
    """All that changes what is written goes with every partitioner."""
    rng = random.Random(1)
    rows = [(f"e{rng.randrange(80)}", f"r{rng.randrange(3)}", f"e{rng.randrange(80)}") for _ in range(600)]
    (tmp_path / "t.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    used = sorted({e for h, _, t in rows for e in (h, t)} | {"island"})
    (tmp_path / "e.tsv").write_text("id\tname\n" + "".join(f"{e}\tname {e}\n" for e in used))
    data = {
        "triples": str(tmp_path / "t.tsv"),
        "entities": str(tmp_path / "e.tsv"),
        "undirected": True,
        "split": {"by": "entities", "valid": 0.1, "test": 0.1},
    }
    wanted = None
    for partitioner in ("hash", "locality", "relation"):
        folder = tmp_path / partitioner
        counts = run(folder, data, TINY, partitioner=partitioner)
        assert counts["triples_support"] > 0
        names = [row["name"] for row in read_graph(folder)["entities"]]
        assert sorted(names) == sorted(f"name {e}" for e in used)
        support = pq.read_table(folder / "triples" / "support").num_rows
        audit = json.loads((folder / "audit.json").read_text())
        found = {**facts(folder), "support": support, "audit": audit["support"]}
        wanted = wanted or found
        assert found == wanted


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """Neither of a run that ends well nor of one that fails in whichever stage."""
    run(tmp_path / "good", DRAWN, TINY, partitioner="locality")
    assert not (tmp_path / "good" / "scratch").exists()
    (tmp_path / "t.tsv").write_text("a\tr\tb\nbad\n")
    with pytest.raises(DataError):
        run(tmp_path / "bad row", {"triples": str(tmp_path / "t.tsv")}, TINY, partitions=1)
    (tmp_path / "t.tsv").write_text("a\tr\tb\na\tr\tc\n")
    (tmp_path / "e.tsv").write_text("id\na\nb\n")
    data = {"triples": str(tmp_path / "t.tsv"), "entities": str(tmp_path / "e.tsv")}
    with pytest.raises(DataError, match="'c' of this"):
        run(tmp_path / "unknown", data | {"split": {"valid": 0.0, "test": 0.0}}, TINY, partitions=2)
    with pytest.raises(ConfigError):
        run(tmp_path / "partitions", data | {"entities": None}, TINY, partitions=4)
    for name in ("bad row", "unknown", "partitions"):
        assert not [path for path in (tmp_path / name).rglob("*") if path.is_file()], name


def test_a_larger_graph_in_many_cells(tmp_path: Path) -> None:
    """More than one row group a partition, merged from several cells: equal to what one task makes at once."""
    data = DRAWN | {"triples": 200_000, "synthetic": {"entities": 3000, "relations": 40}}
    sizes = Sizes(10**6, 10**6, 10**6, 10**6, 0, 20_000)
    counts = run(tmp_path / "cut", data, sizes, partitions=2)
    run(tmp_path / "whole", data, Sizes(small_bytes=10**9), partitions=2)
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")
    parts = [pq.read_table(tmp_path / "cut" / f"triples/train/part-{p:05d}.parquet") for p in range(2)]
    assert max(len(part) for part in parts) > 1 << 16
    for part in parts:
        assert (np.diff(part.column("line").to_numpy()) > 0).all()
    assert sum(len(part) for part in parts) == counts["triples_train"]
