"""A slow, obvious ingest of TSV files, to check the fast one against: dictionaries, sets and loops."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from kgray.data.audit import MIN_CONFIDENCE, MIN_SUPPORT

MASK = 2**64 - 1
SPLITS = ("train", "valid", "test")
Row = tuple[str, str, str, int, int]


def mix(x: int) -> int:
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & MASK
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def text_hash(text: str) -> int:
    data = text.encode()
    total = 0
    for byte in reversed(data):
        total = (total * 0x9E3779B97F4A7C15 + byte + 1) & MASK
    return mix((total + len(data) * 0x9E3779B97F4A7C15) & MASK)


def drawn_split(row: tuple[str, str, str], seed: int, valid: float, test: float) -> str:
    one = 0x9E3779B97F4A7C15
    head, relation, tail = map(text_hash, row)
    triple = mix((head + mix((relation + mix((tail + one) & MASK)) & MASK)) & MASK)
    share = (mix((triple + mix((seed + one) & MASK)) & MASK) >> 11) / 2**53
    return "test" if share < test else "valid" if share < valid + test else "train"


def id_order(ids: set[str]) -> list[str]:
    return sorted(ids, key=lambda one: (text_hash(one), one.encode()))


def read_rows(path: Path, source: int) -> list[Row]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [(*line.split("\t"), source, n) for n, line in enumerate(lines, 1) if line]  # type: ignore[misc]


def deduplicated(rows: list[Row]) -> list[Row]:
    seen: set[tuple[str, str, str]] = set()
    kept = []
    for row in rows:
        if row[:3] not in seen:
            seen.add(row[:3])
            kept.append(row)
    return kept


def expected_audit(given: dict[str, list[Row]], entities: set[str]) -> dict[str, Any]:
    """The figures of audit.json that rest on triples. ``given``: rows by split, duplicates among them."""
    rows = {split: deduplicated(given[split]) for split in SPLITS}
    sets = {split: {row[:3] for row in rows[split]} for split in SPLITS}
    train = sets["train"]
    inside = {split: {e for h, _, t in sets[split] for e in (h, t)} for split in SPLITS}
    forward = Counter(r for h, r, t in train if h != t)
    repeated: Counter[tuple[str, str]] = Counter()
    relations = {r for split in SPLITS for _, r, _ in sets[split]}
    for h, r, t in train:
        if h != t:
            for other in relations:
                repeated[r, other] += (t, other, h) in train
    rules = {
        pair: (n, round(n / forward[pair[0]], 6))
        for pair, n in repeated.items()
        if n >= MIN_SUPPORT and n / forward[pair[0]] >= MIN_CONFIDENCE
    }
    degree = Counter(e for h, _, t in train for e in (h, t))
    degrees = sorted(degree[e] for e in entities)
    return {
        "triples": {s: len(rows[s]) for s in SPLITS},
        "duplicates": {s: len(given[s]) - len(rows[s]) for s in SPLITS},
        "loops": {s: sum(h == t for h, _, t in sets[s]) for s in SPLITS},
        "overlap": {
            f"{a}_{b}": len(sets[a] & sets[b]) for a, b in (("train", "valid"), ("train", "test"), ("valid", "test"))
        },
        "unseen": {
            s: {
                "entities": len(inside[s] - inside["train"]),
                "triples": sum(not {h, t} <= inside["train"] for h, _, t in sets[s]),
                "relations": sorted({r for _, r, _ in sets[s]} - {r for _, r, _ in train}),
            }
            for s in ("valid", "test")
        },
        "without_triples": len(entities - set().union(*inside.values())),
        "rules": rules,
        "trivial_rule": {
            s: {
                "triples": len(sets[s]),
                "answered": sum(
                    h != t and any((t, r, h) in train and (r, head) in rules for r in relations)
                    for h, head, t in sets[s]
                ),
                "reverse_in_train": sum(h != t and any((t, r, h) in train for r in relations) for h, _, t in sets[s]),
            }
            for s in ("valid", "test")
        },
        "degree": {"min": degrees[0], "max": degrees[-1], "total": sum(degrees)},
    }


def found_audit(folder: Path) -> dict[str, Any]:
    """audit.json in the form of :func:`expected_audit`."""
    audit = json.loads((folder / "audit.json").read_text())
    rules = {(one["relation"], one["relation"]): one for one in audit["symmetric"]}
    rules |= {(one["relation"], one["inverse"]): one for one in audit["inverse"]}
    return {
        **{key: audit[key] for key in ("triples", "duplicates", "loops", "overlap", "unseen")},
        "without_triples": audit["entities"]["without_triples"],
        "rules": {pair: (one["support"], one["confidence"]) for pair, one in rules.items()},
        "trivial_rule": {
            s: {key: one[key] for key in ("triples", "answered", "reverse_in_train")}
            for s, one in audit["trivial_rule"].items()
        },
        "degree": {
            "min": audit["degree"]["min"],
            "max": audit["degree"]["max"],
            "total": round(audit["degree"]["mean"] * audit["entities"]["total"]),
        },
    }


def read_graph(folder: Path) -> dict[str, Any]:
    """A written graph with external ids: entities (rows in id order), relations, and rows by split, sorted by
    (source, line)."""
    parts = sorted((folder / "entities").glob("part-*.parquet"))
    entities = [row for part in parts for row in pq.read_table(part).to_pylist()]
    relations = pq.read_table(folder / "relations.parquet").to_pylist()
    assert [row["id"] for row in entities] == list(range(len(entities)))
    assert [row["id"] for row in relations] == list(range(len(relations)))
    triples: dict[str, list[Row]] = {}
    for split in SPLITS:
        rows = [
            row
            for part in sorted((folder / "triples" / split).glob("part-*.parquet"))
            for row in pq.read_table(part).to_pylist()
        ]
        names = [
            (
                entities[row["head"]]["external_id"],
                relations[row["relation"]]["external_id"],
                entities[row["tail"]]["external_id"],
                row["source"],
                row["line"],
            )
            for row in rows
        ]
        triples[split] = sorted(names, key=lambda row: row[3:])
    return {"entities": entities, "relations": relations, "triples": triples}
