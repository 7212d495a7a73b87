"""Partitions, deduplication, tables and the audit's two passes, each against loops and sets."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kgray.config import from_dict
from kgray.data.audit import audit_held_out, audit_part, find_rules, seen_in_train
from kgray.data.bad_rows import BadRows
from kgray.data.config import DataConfig
from kgray.data.files import Chunk, describe_file
from kgray.data.partition import GraphConfig, partition_of, partition_ranges
from kgray.data.tables import (
    STRING,
    duplicate_names,
    name_buckets,
    output_columns,
    read_table,
    relation_table,
)
from kgray.data.triples import Triples, concat, deduplicate
from kgray.errors import ConfigError


@given(st.integers(1, 300), st.integers(1, 40))
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
def test_deduplicate(seed: int) -> None:
    triples = random_triples(seed)
    kept, dropped = deduplicate(triples)
    wanted: dict[tuple[int, ...], tuple[int, ...]] = {}
    for row in sorted(listed(triples), key=lambda row: row[4:]):
        wanted.setdefault(row[:4], row)
    assert listed(kept) == sorted(wanted.values(), key=lambda row: row[4:])
    assert int(dropped.sum()) == len(triples) - len(kept)
    assert len(deduplicate(concat([]))[0]) == 0


@pytest.mark.parametrize("partitions", [1, 2, 5, 12])
@pytest.mark.parametrize("seed", range(3))
def test_audit_adds_up_over_partitions(seed: int, partitions: int) -> None:
    """What the parts count together is what one pass over sets counts."""
    entities, relations = 12, 3
    triples = random_triples(seed)
    spans = partition_ranges(entities, partitions)
    parts, kept, seen = [], [], []
    for start, end in spans:
        inside = ((triples.head >= start) & (triples.head < end)) | ((triples.tail >= start) & (triples.tail < end))
        given = triples[inside]
        one, dropped = deduplicate(given)
        parts.append(audit_part(one, dropped, given, (start, end), relations))
        kept.append(one)
        seen.append(seen_in_train(one, (start, end)))
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
    part = audit_part(triples, np.zeros(n, bool), triples, (0, 30), 3)
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
    told, rows = read_table([chunk], data, 1)
    assert output_columns([told])[1:] == ["external_id", "name", "description", "type", "zeta", "alpha"]
    relations = relation_table([rows], [told], {"r1"}, BadRows(1), [str(path)])
    assert relations.codes == {"r1": 0, "r2": 1}
    assert relations.table.column("name").to_pylist() == ["r1", "N"]
    assert relations.table.column_names == ["id", "external_id", "name", "description", "zeta", "alpha"]
    assert relations.without_text == ["r1"]


def test_relations_without_a_table_are_in_byte_order() -> None:
    relations = relation_table(None, [], ["é", "z", "a"], BadRows(1), [])
    assert list(relations.codes) == ["a", "z", "é"]


def test_shared_names() -> None:
    table = pa.table({"name": pa.array(["x", "y", "x", "", " ", "x", "z"], STRING)})
    count, *parts = name_buckets(table, 4)
    assert count == 5
    counted = [duplicate_names([part]) for part in parts]
    assert (sum(n for n, _ in counted), sum(n for _, n in counted)) == (1, 3)
