"""Ingest on a real Ray: against the slow oracle, and the same bytes however the work is cut."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_oracle import (
    SPLITS,
    deduplicated,
    drawn_split,
    expected_audit,
    found_audit,
    id_order,
    read_graph,
    read_rows,
)

from kgray.artifact import Draft, Store
from kgray.config import from_dict
from kgray.data.config import DataConfig
from kgray.data.ingest import ingest, ingest_recipe
from kgray.data.inputs import Sizes
from kgray.data.partition import GraphConfig

pytestmark = pytest.mark.usefixtures("ray_cluster")
TINY = Sizes(chunk_bytes=700, task_bytes=900, bucket_bytes=1200, small_bytes=0)


def run(folder: Path, data: dict[str, Any], partitions: int = 3, sizes: Sizes | None = None) -> dict[str, int]:
    folder.mkdir()
    config = from_dict(DataConfig, data)
    return ingest(Draft(str(folder)), config, GraphConfig(partitions=partitions), sizes)


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def random_graph(folder: Path, seed: int) -> dict[str, Any]:
    """Files with duplicates, overlaps, loops, symmetric and inverse relations, unseen entities, odd ids."""
    rng = random.Random(seed)
    ids = [f"{n:05d}" for n in range(40)] + ["é t", "/m/x", "-", "NA", '"q"', "日本", "a" * 300]
    rows = []
    for _ in range(160):
        head, tail = rng.choice(ids), rng.choice(ids)
        relation = rng.choice(["likes", "part_of", "knows"])
        rows.append((head, relation, tail))
        if relation == "knows" and rng.random() < 0.8:
            rows.append((tail, "knows", head))
        if relation == "part_of" and rng.random() < 0.7:
            rows.append((tail, "has_part", head))
    rng.shuffle(rows)
    files = {"train": rows[:200], "valid": rows[180:220], "test": [*rows[220:], rows[0], rows[0]]}
    files["test"].append(("lonely", "rare", "00001"))
    for split, part in files.items():
        text = "".join("\t".join(row) + "\n" for row in part)
        (folder / f"{split}.tsv").write_text(text, encoding="utf-8")
    used = sorted({e for part in files.values() for h, _, t in part for e in (h, t)} | {"island"})
    rng.shuffle(used)
    lines = [f"{e}\t{'name ' + e if n % 3 else ''}\t{'text ' + e if n % 4 else ''}\tx{n}" for n, e in enumerate(used)]
    (folder / "entities.tsv").write_text("\n".join(["id\tname\tdescription\talias", *lines]) + "\n", encoding="utf-8")
    return {
        "triples": {split: str(folder / f"{split}.tsv") for split in files},
        "entities": str(folder / "entities.tsv"),
    }


def given_rows(data: dict[str, Any]) -> dict[str, list[Any]]:
    return {split: read_rows(Path(data["triples"][split]), n) for n, split in enumerate(SPLITS)}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("sizes", [None, TINY], ids=["whole", "cut"])
def test_equals_the_oracle(tmp_path: Path, seed: int, sizes: Sizes | None) -> None:
    data = random_graph(tmp_path, seed)
    counts = run(tmp_path / "graph", data, sizes=sizes)
    graph = read_graph(tmp_path / "graph")
    given = given_rows(data)
    table = [line.split("\t") for line in Path(data["entities"]).read_text().split("\n")[1:-1]]
    assert [row["external_id"] for row in graph["entities"]] == id_order({row[0] for row in table})
    by_id = {row["external_id"]: row for row in graph["entities"]}
    for identity, name, description, alias in table:
        row = by_id[identity]
        assert (row["name"], row["description"]) == (name or identity, description)
        assert (row["type"], row["alias"]) == ("", alias)
    for split in SPLITS:
        assert graph["triples"][split] == deduplicated(given[split])
        assert counts[f"triples_{split}"] == len(graph["triples"][split])
    assert found_audit(tmp_path / "graph") == expected_audit(given, {row[0] for row in table})
    audit = json.loads((tmp_path / "graph" / "audit.json").read_text())
    assert audit["entities"]["missing_name"] == sum(not row[1] for row in table)
    assert audit["entities"]["missing_description"] == sum(not row[2] for row in table)
    assert audit["entities"]["missing_text"] == sum(not row[1] and not row[2] for row in table)


def test_same_bytes_however_it_is_cut(tmp_path: Path) -> None:
    data = random_graph(tmp_path, 3)
    run(tmp_path / "a", data)
    run(tmp_path / "b", data, sizes=TINY)
    run(tmp_path / "c", data, sizes=Sizes(chunk_bytes=300, task_bytes=300, bucket_bytes=500, small_bytes=0))
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b") == fingerprint(tmp_path / "c")


def test_partitions_are_near_equal_and_hold_their_heads(tmp_path: Path) -> None:
    data = random_graph(tmp_path, 4)
    counts = run(tmp_path / "graph", data, partitions=5)
    spans = json.loads((tmp_path / "graph" / "partitions.json").read_text())["entities"]
    assert counts["partitions"] == len(spans) == 5
    assert [start for start, _ in spans[1:]] == [end for _, end in spans[:-1]]
    assert (spans[0][0], spans[-1][1]) == (0, counts["entities"])
    assert max(e - s for s, e in spans) - min(e - s for s, e in spans) <= 1
    for n, (start, end) in enumerate(spans):
        ids = pq.read_table(tmp_path / "graph" / f"entities/part-{n:05d}.parquet").column("id").to_pylist()
        assert ids == list(range(start, end))
        for split in SPLITS:
            table = pq.read_table(tmp_path / "graph" / f"triples/{split}/part-{n:05d}.parquet")
            assert all(start <= head < end for head in table.column("head").to_pylist())
            assert table.schema.types == [pa.int64(), pa.int32(), pa.int64(), pa.int32(), pa.int64()]


def test_drawn_split(tmp_path: Path) -> None:
    data = random_graph(tmp_path, 5)
    rows = deduplicated([row for split in SPLITS for row in given_rows(data)[split]])
    triples = [row[:3] for row in rows]
    source = tmp_path / "all.tsv"
    source.write_text("".join("\t".join(row) + "\n" for row in triples), encoding="utf-8")
    split = {"valid": 0.2, "test": 0.1, "seed": 7}
    run(tmp_path / "graph", {"triples": str(source), "split": split}, sizes=TINY)
    drawn = {row: drawn_split(row, **split) for row in triples}
    train = {row for row in triples if drawn[row] == "train"}
    entities = {e for h, _, t in train for e in (h, t)}
    relations = {r for _, r, _ in train}
    wanted = {
        row: split if {row[0], row[2]} <= entities and row[1] in relations else "train" for row, split in drawn.items()
    }
    graph = read_graph(tmp_path / "graph")
    found = {row[:3]: split for split in SPLITS for row in graph["triples"][split]}
    assert found == wanted
    audit = json.loads((tmp_path / "graph" / "audit.json").read_text())
    assert audit["moved_to_train"] == sum(wanted[row] != drawn[row] for row in triples)
    assert audit["unseen"]["test"] == {"entities": 0, "triples": 0, "relations": []}
    # The order of rows changes nothing.
    source.write_text("".join("\t".join(row) + "\n" for row in reversed(triples)), encoding="utf-8")
    run(tmp_path / "again", {"triples": str(source), "split": split})
    again = read_graph(tmp_path / "again")
    assert {row[:3]: split for split in SPLITS for row in again["triples"][split]} == wanted


def written_as(folder: Path, kind: str, rows: list[tuple[str, str, str]]) -> Path:
    path = folder / f"all.{kind}"
    head = ["head", "relation", "tail"]
    if kind == "parquet":
        pq.write_table(
            pa.table(dict(zip(head, map(list, zip(*rows, strict=True)), strict=True))), path, row_group_size=9
        )
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"x": 1} | dict(zip(head, row, strict=True))) + "\n" for row in rows))
    elif kind == "csv":
        path.write_text("".join(",".join('"' + c.replace('"', '""') + '"' for c in row) + "\r\n" for row in rows))
    elif kind == "nt":
        path.write_text("".join(f"<{h}> <{r}> <{t}> .\n" for h, r, t in rows))
    else:
        path.write_text("\ufeff" + "".join("\t".join(row) + "\r\n" for row in rows), encoding="utf-8")
    return path


def test_every_format_gives_the_same_graph(tmp_path: Path) -> None:
    rng = random.Random(6)
    rows = [(f"{rng.randrange(30):04d}", f"r{rng.randrange(3)}", f"{rng.randrange(30):04d}") for _ in range(200)]
    prints = {}
    for kind in ("tsv", "csv", "jsonl", "parquet", "nt"):
        path = written_as(tmp_path, kind, rows)
        run(tmp_path / f"graph-{kind}", {"triples": str(path)}, sizes=TINY)
        prints[kind] = fingerprint(tmp_path / f"graph-{kind}")
        prints[kind].pop("sources.json")
    packed = tmp_path / "all.tsv.gz"
    packed.write_bytes(gzip.compress((tmp_path / "all.tsv").read_bytes()))
    run(tmp_path / "graph-gz", {"triples": str(packed)})
    prints["gz"] = fingerprint(tmp_path / "graph-gz")
    prints["gz"].pop("sources.json")
    assert all(one == prints["tsv"] for one in prints.values())


def test_globs_lists_and_a_split_column(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / f"part{n}.tsv").write_text("".join(f"a{i}\tr\tb{n}\ttrain\n" for i in range(3)))
    (tmp_path / "held.tsv").write_text("a0\tr\ta1\ttest\n\na1\tr\ta2\tvalid\n")
    paths = [str(tmp_path / "held.tsv"), str(tmp_path / "part*.tsv")]
    counts = run(tmp_path / "graph", {"triples": paths, "columns": {"split": "split"}})
    assert [counts[f"triples_{s}"] for s in SPLITS] == [9, 1, 1]
    graph = read_graph(tmp_path / "graph")
    assert graph["triples"]["valid"] == [("a1", "r", "a2", 0, 3)]
    sources = json.loads((tmp_path / "graph" / "sources.json").read_text())
    assert [Path(one["path"]).name for one in sources] == ["held.tsv", "part0.tsv", "part1.tsv", "part2.tsv"]
    first = (tmp_path / "held.tsv").read_bytes()
    assert (sources[0]["sha256"], sources[0]["bytes"]) == (hashlib.sha256(first).hexdigest(), len(first))


def test_tables_of_other_formats(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("a\tr\tb\nb\ts\ta\n")
    (tmp_path / "e.jsonl").write_text(
        '{"key": "a", "name": "A", "kind": "letter", "rank": 1}\n{"key": "b", "more": {"x": [1]}}\n'
    )
    (tmp_path / "r.csv").write_text('id,name,description,id_number\nr,"is, ""really""\nlike",d,007\ns,,,\n')
    data = {
        "triples": {"train": str(tmp_path / "t.tsv")},
        "entities": str(tmp_path / "e.jsonl"),
        "relations": str(tmp_path / "r.csv"),
    }
    run(tmp_path / "one", data | {"columns": {"id": "id"}, "entities": None}, partitions=1)
    relations = read_graph(tmp_path / "one")["relations"]
    assert relations[0] == {
        "id": 0, "external_id": "r", "name": 'is, "really"\nlike', "description": "d", "id_number": "007",
    }  # fmt: skip
    assert relations[1]["name"] == "s"
    run(tmp_path / "two", data | {"columns": {"id": "key", "type": "kind"}, "relations": None}, partitions=1)
    entities = {row["external_id"]: row for row in read_graph(tmp_path / "two")["entities"]}
    assert entities["a"] | {"id": 0} == {
        "id": 0, "external_id": "a", "name": "A", "description": "", "type": "letter", "rank": "1", "more": "",
    }  # fmt: skip
    assert (entities["b"]["name"], entities["b"]["more"]) == ("b", '{"x": [1]}')


def test_version_follows_bytes_and_options(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    source = tmp_path / "t.tsv"
    source.write_text("a\tr\tb\n")

    def version(**options: Any) -> str:
        partitions = options.pop("partitions", 1)
        config = from_dict(DataConfig, {"triples": str(options.pop("path", source)), **options})
        return ingest_recipe(store, config, GraphConfig(partitions=partitions)).version

    first = version()
    assert version() == first
    moved = tmp_path / "other" / "u.tsv"
    moved.parent.mkdir()
    moved.write_text("a\tr\tb\n")
    assert version(path=moved) == first
    assert version(partitions=2) != first
    assert version(split={"seed": 1}) != first
    source.write_text("a\tr\tc\n")
    assert version() != first


def test_umls_through_the_store(tmp_path: Path, umls: Path) -> None:
    config = from_dict(
        DataConfig,
        {
            "triples": {split: str(umls / f"{split}.tsv") for split in SPLITS},
            "entities": str(umls / "entities.tsv"),
            "relations": str(umls / "relations.tsv"),
        },
    )
    graph = GraphConfig(partitions=2)
    store = Store(tmp_path / "store")
    recipe = ingest_recipe(store, config, graph)
    built = store.build(recipe, lambda draft: ingest(draft, config, graph))
    counts = built.artifact.manifest["counts"]
    assert [counts[f"triples_{s}"] for s in SPLITS] == [5216, 652, 661]
    assert (counts["entities"], counts["relations"], counts["quarantined"]) == (135, 46, 0)
    assert built.artifact.read_table("entities").num_rows == 135
    assert store.build(recipe, lambda draft: pytest.fail("built twice")).up_to_date


@pytest.mark.slow
def test_real_graphs(tmp_path: Path, data_root: Path) -> None:
    wanted = {
        "wn18rr": (40943, 11, [86835, 3034, 3134]),
        "fb15k-237": (14541, 237, [272115, 17535, 20466]),
    }
    for name, (entities, relations, triples) in wanted.items():
        folder = data_root / name
        data = {
            "triples": {split: str(folder / f"{split}.tsv.gz") for split in SPLITS},
            "entities": str(folder / "entities.tsv.gz"),
            "relations": str(folder / "relations.tsv.gz"),
        }
        counts = run(tmp_path / name, data)
        assert (counts["entities"], counts["relations"]) == (entities, relations)
        assert [counts[f"triples_{s}"] for s in SPLITS] == triples
        audit = json.loads((tmp_path / name / "audit.json").read_text())
        if name == "wn18rr":  # published with the data: shared names, test triples with an unseen entity
            assert audit["entities"]["entities_with_duplicate_name"] == 12873
            assert audit["unseen"]["test"]["triples"] == 210
            ids = pq.read_table(tmp_path / name / "entities").column("external_id").to_pylist()
            assert all(len(one) == 8 for one in ids)
        else:
            assert audit["entities"]["missing_description"] == 875
