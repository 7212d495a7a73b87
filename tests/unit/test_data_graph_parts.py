"""Partitions, deduplication, tables and the audit's two passes, each against loops and sets."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgray.artifact import Draft
from kgray.config import from_dict
from kgray.data.audit import audit_held_out, audit_part, find_rules, may_meet, overlaps
from kgray.data.bad_rows import BadRows
from kgray.data.cells import first_of_each, triple_codes
from kgray.data.config import DataConfig
from kgray.data.files import Chunk, describe_file
from kgray.data.partition import GraphConfig, Layout, partition_of, partition_ranges
from kgray.data.scratch import Scratch
from kgray.data.tables import (
    STRING,
    duplicate_names,
    name_buckets,
    output_columns,
    read_table,
    relation_table,
)
from kgray.data.triples import Triples, concat, grouped
from kgray.errors import ConfigError


@given(st.integers(1, 300), st.integers(1, 40))
@settings(deadline=None)
def test_ranges_are_near_equal_and_cover(entities: int, partitions: int) -> None:
    ranges = partition_ranges(entities, partitions)
    sizes = [end - start for start, end in ranges]
    assert (len(ranges), sum(sizes), max(sizes) - min(sizes) <= 1) == (partitions, entities, True)
    for entity, partition in enumerate(partition_of(np.arange(entities), ranges)):
        assert ranges[partition][0] <= entity < ranges[partition][1]


@pytest.mark.parametrize("number", [0, -1, 70000])
def test_partitions_are_checked(number: int) -> None:
    with pytest.raises(ConfigError, match="'partitions'"):
        GraphConfig(partitions=number)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"partitioner": "metis"}, "partitioner"),
        ({"slack": -0.1}, "slack"),
        ({"triple_slack": -1.0}, "triple_slack"),
        ({"passes": 0}, "passes"),
    ],
)
def test_partitioners_are_checked(settings: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(GraphConfig, settings)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"split": {"valid": 1.0}}, "split.valid"),
        ({"split": {"valid": 0.6, "test": 0.4}}, "split.test"),
        ({"split": {"seed": -1}}, "split.seed"),
        ({"max_bad_rows": -1}, "max_bad_rows"),
        ({"columns": {"head": "tail"}}, "columns.head"),
        ({"columns": {"id": ""}}, "columns.id"),
        ({"entities": []}, "entities"),
        ({"triples": {"train": "a"}, "columns": {"split": "split"}}, "columns.split"),
        ({"triples": {"train": "a", "dev": "b"}}, "triples.dev"),
        ({"on_bad_row": "ignore"}, "on_bad_row"),
        ({"format": "xml"}, "format"),
    ],
)
def test_configuration_is_checked(settings: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(DataConfig, {"triples": "a.tsv", **settings})
    assert caught.value.key == key


def random_triples(seed: int, entities: int = 12, relations: int = 3, rows: int = 120) -> Triples:
    rng = random.Random(seed)
    split = [rng.choice([0, 0, 0, 1, 2]) for _ in range(rows)]
    columns = [[rng.randrange(n) for _ in range(rows)] for n in (entities, relations, entities)]
    place = list(range(rows))
    rng.shuffle(place)
    return Triples(
        np.asarray(columns[0]),
        np.asarray(columns[1], np.int32),
        np.asarray(columns[2]),
        np.asarray(split, np.int8),
        np.asarray([n % 2 for n in place], np.int32),
        np.asarray(place),
    )


def listed(triples: Triples) -> list[tuple[int, ...]]:
    names = ("split", "head", "relation", "tail", "source", "line")
    return [tuple(map(int, row)) for row in zip(*(getattr(triples, n) for n in names), strict=True)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("entities", [12, 2**40])
def test_the_first_of_each_is_kept(seed: int, entities: int) -> None:
    """Where a number of 64 bits cannot hold a triple, too."""
    triples = random_triples(seed)
    key = triple_codes(triples.head, triples.relation, triples.tail, 2**20, entities) * 4 + triples.split
    keep, distinct = first_of_each(key)
    wanted: dict[tuple[int, ...], int] = {}
    for n, row in enumerate(listed(triples)):
        wanted.setdefault(row[:4], n)
    assert np.flatnonzero(keep).tolist() == sorted(wanted.values())
    assert len(distinct) == len(wanted) and (np.diff(distinct) > 0).all()
    assert first_of_each(np.empty(0, np.int64))[0].tolist() == []


@given(st.lists(st.integers(0, 40)), st.lists(st.integers(0, 40)))
@settings(deadline=None)
def test_what_meets_may_meet(left: list[int], right: list[int]) -> None:
    found = may_meet(np.asarray(left, np.int64), np.asarray(right, np.int64))
    for keys, others, mask in ((left, right, found[0]), (right, left, found[1])):
        assert all(may or key not in others for key, may in zip(keys, mask, strict=True))


def test_few_others_may_meet() -> None:
    keys = np.random.default_rng(0).permutation(200_000)
    left, right = may_meet(keys[:100_000], keys[99_000:])
    assert 1000 <= left.sum() < 20_000 and 1000 <= right.sum() < 5000


@given(st.lists(st.integers(0, 9)))
@settings(deadline=None)
def test_groups_keep_their_order(numbers: list[int]) -> None:
    order, bounds = grouped(np.asarray(numbers, dtype=np.uint16), 10)
    for group in range(10):
        members = order[bounds[group] : bounds[group + 1]].tolist()
        assert members == [n for n, one in enumerate(numbers) if one == group]


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 500), st.integers(1, 50))
@settings(deadline=None)
def test_cells_lie_in_partitions(entities: int, partitions: int, triples: int, cell_triples: int) -> None:
    ranges = partition_ranges(entities, min(partitions, entities))
    layout = Layout.of(ranges, triples, cell_triples)
    assert [start for start, _ in layout.cells] == [0, *(end for _, end in layout.cells[:-1])]
    assert layout.cells[-1][1] == layout.num_entities == entities
    for cell, (start, end) in enumerate(layout.cells):
        low, high = ranges[layout.owners[cell]]
        assert low <= start < end <= high
        assert cell in layout.cells_of(layout.owners[cell])
        assert (layout.cell_of(np.arange(start, end)) == cell).all()


@pytest.mark.parametrize("partitions", [1, 2, 5, 12])
@pytest.mark.parametrize("seed", range(3))
def test_audit_adds_up_over_partitions(seed: int, partitions: int) -> None:
    """What the parts count together is what one pass over sets counts."""
    entities, relations = 12, 3
    triples = random_triples(seed)
    spans = partition_ranges(entities, partitions)
    parts, kept, seen = [], [], []
    codes = triple_codes(triples.head, triples.relation, triples.tail, relations, entities) * 4 + triples.split
    for start, end in spans:
        in_head, in_tail = ((side >= start) & (side < end) for side in (triples.head, triples.tail))
        keep, distinct = first_of_each(codes[in_head])
        own = triples[in_head][keep]
        foreign = triples[in_tail & ~in_head]
        foreign = foreign[first_of_each(codes[in_tail & ~in_head])[0]]
        dropped = triples.split[in_head][~keep]
        part = audit_part(own, foreign, dropped, overlaps(distinct), (start, end), relations)
        parts.append(part)
        kept.append(concat([own, foreign]))
        seen.append(part.seen)
    facts = [{row[1:4] for row in listed(triples) if row[0] == s} for s in range(3)]
    assert sum(part.kept for part in parts).tolist() == [len(one) for one in facts]
    assert sum(part.overlap for part in parts).tolist() == [
        len(facts[a] & facts[b]) for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    inverse = {
        (r, s): sum(h != t and (t, s, h) in facts[0] for h, x, t in facts[0] if x == r)
        for r in range(relations)
        for s in range(relations)
    }
    total: dict[tuple[int, int], int] = dict.fromkeys(inverse, 0)
    for part in parts:
        for code, n in zip(*part.reversed_pairs, strict=True):
            total[int(code) // relations, int(code) % relations] += int(n)
    assert total == inverse
    rules = find_rules(parts, relations)
    pairs = {(rule.body, rule.head) for rule in rules}
    held = [
        audit_held_out(one, span, np.concatenate(seen), rules, relations) for span, one in zip(spans, kept, strict=True)
    ]
    for s in (1, 2):
        answered = sum(
            h != t and any((t, x, h) in facts[0] and (x, r) in pairs for x in range(relations)) for h, r, t in facts[s]
        )
        assert sum(int(one.answered[s]) for one in held) == answered
        reverse = sum(h != t and any((t, x, h) in facts[0] for x in range(relations)) for h, _, t in facts[s])
        assert sum(int(one.reverse_in_train[s]) for one in held) == reverse


def test_rules_find_symmetric_and_inverse() -> None:
    rows = [(a, 0, a + 10) for a in range(5)] + [(a + 10, 0, a) for a in range(4)]  # 4 of 5 symmetric
    rows += [(a, 1, a + 20) for a in range(4)] + [(a + 20, 2, a) for a in range(4)]  # 1 and 2 are inverses
    rows += [(7, 0, 7)]  # a loop says nothing
    columns = np.asarray(rows)
    n = len(rows)
    triples = Triples(
        columns[:, 0], columns[:, 1].astype(np.int32), columns[:, 2], np.zeros(n, np.int8), np.zeros(n, np.int32),
        np.arange(n),
    )  # fmt: skip
    nobody = triples[:0]
    part = audit_part(triples, nobody, nobody.split, np.zeros(3, np.int64), (0, 30), 3)
    found = {(r.body, r.head): (r.support, round(r.confidence, 3)) for r in find_rules([part], 3)}
    assert found == {(0, 0): (8, 0.889), (1, 2): (4, 1.0), (2, 1): (4, 1.0)}


def test_tables_keep_extras_in_file_order(tmp_path: Path) -> None:
    path = tmp_path / "e.tsv"
    path.write_text("zeta\tid\tname\talpha\nz\tr2\tN\ta\nz\tr1\t \tb\n")
    data = from_dict(DataConfig, {"triples": "unused.tsv"})
    chunk = Chunk(
        describe_file(0, str(path), "relations", "auto", "k"),
        header=("zeta", "id", "name", "alpha"),
        header_line=True,
    )
    scratch = Scratch(Draft(str(tmp_path / "draft")))
    told = read_table(scratch, "relations/0", [chunk], data, 1)
    rows = scratch.read_all("relations/0")
    assert output_columns([told])[1:] == ["external_id", "name", "description", "type", "zeta", "alpha"]
    relations = relation_table([rows], [told], {"r1"}, BadRows(1), [str(path)])
    assert relations.codes == {"r1": 0, "r2": 1}
    assert relations.table.column("name").to_pylist() == ["r1", "N"]
    assert relations.table.column_names == ["id", "external_id", "name", "description", "zeta", "alpha"]
    assert relations.without_text == ["r1"]


def test_relations_without_a_table_are_in_byte_order() -> None:
    relations = relation_table(None, [], ["é", "z", "a"], BadRows(1), [])
    assert list(relations.codes) == ["a", "z", "é"]


def test_shared_names(tmp_path: Path) -> None:
    scratch = Scratch(Draft(str(tmp_path)))
    for n, names in enumerate((["x", "y", "x", ""], [" ", "x", "z"])):
        scratch.write(f"entities/{n}", pa.table({"name": pa.array(names, STRING)}))
        name_buckets(scratch, n, 2)
    counted = [duplicate_names(scratch, bucket, 2) for bucket in range(2)]
    assert (sum(n for n, _ in counted), sum(n for _, n in counted)) == (1, 3)


def test_scratch_gives_back_each_batch(tmp_path: Path) -> None:
    scratch = Scratch(Draft(str(tmp_path)))
    table = pa.table({"id": pa.array(["a", "b", "", "d"], STRING), "flag": pa.array([True, False, True, True])})
    scratch.write("some/1", table, [0, 1, 1, 4])
    assert [scratch.read("some/1", n).num_rows for n in range(scratch.batches("some/1"))] == [1, 0, 3]
    assert scratch.read("some/1", 2).column("id").to_pylist() == ["b", "", "d"]
    assert scratch.column("some/1", "flag", 2).tolist() == [False, True, True]
    assert scratch.read_all("some/1").equals(table)
    scratch.write("some/1", table.slice(0, 0))
    assert scratch.read("some/1").num_rows == 0
    scratch.drop("some")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
