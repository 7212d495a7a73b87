"""Small graph artifacts, written by hand in the format of kgray/data/ingest.py, for tests of the embed
job."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from kgray.artifact import Artifact, Draft, Recipe, Store

UMLS = Path(__file__).resolve().parents[2] / "configs" / "data" / "umls"


def graph_artifact(
    store: Store,
    rows: Sequence[Mapping[str, str]],
    relations: Sequence[tuple[str, str]] = (("is_a", ""),),
    parts: int = 2,
    row_group: int = 1000,
    triples: Mapping[str, Sequence[tuple[int, int, int]]] | None = None,
) -> Artifact:
    """A graph, without triples where none are given (by split, as ids). ``rows``: external_id, and name, description or
    any other column (missing: empty); ``relations``: (external_id, description)."""
    columns = sorted({"external_id", "name", "description", "type"}.union(*rows))
    bounds = [len(rows) * at // parts for at in range(parts + 1)]
    spans = list(itertools.pairwise(bounds))

    def make(draft: Draft) -> dict[str, Any]:
        for part, (start, end) in enumerate(spans):
            chosen = [{"name": row["external_id"], **row} for row in rows[start:end]]
            data = {name: pa.array([row.get(name, "") for row in chosen], pa.string()) for name in columns}
            table = pa.table({"id": pa.array(range(start, end), pa.int64()), **data})
            draft.write_table(f"entities/part-{part:05d}.parquet", table, row_group_size=row_group)
        draft.write_table(
            "relations.parquet",
            pa.table(
                {
                    "id": pa.array(range(len(relations)), pa.int64()),
                    "external_id": pa.array([name for name, _ in relations], pa.string()),
                    "name": pa.array([name for name, _ in relations], pa.string()),
                    "description": pa.array([text for _, text in relations], pa.string()),
                }
            ),
        )
        for split, facts in (triples or {}).items():
            ids = zip(*facts, strict=True) if facts else ((), (), ())
            named = zip(("head", "relation", "tail"), ids, strict=True)
            table = pa.table({name: pa.array(list(column), pa.int64()) for name, column in named})
            draft.write_table(f"triples/{split}/part-00000.parquet", table)
        draft.write_json("partitions.json", {"entities": [list(span) for span in spans]})
        return {"entities": len(rows), "relations": len(relations), "partitions": parts}

    content = {"rows": [dict(row) for row in rows], "relations": list(relations), "parts": parts}
    if triples is not None:
        content["triples"] = {split: [list(fact) for fact in facts] for split, facts in triples.items()}
    recipe = Recipe("graph", 1, (), content)
    return store.build(recipe, make).artifact


def table_rows(path: Path) -> list[dict[str, str]]:
    """The rows of an entity or relation table with a header."""
    with path.open(encoding="utf-8", newline="") as lines:
        return [
            {
                "external_id": row["id"],
                "name": row["name"] or row["id"],
                "description": row["description"] or "",
            }
            for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        ]


def umls(store: Store, parts: int = 4) -> Artifact:
    """The quickstart's graph, without its triples."""
    relations = [(row["external_id"], row["description"]) for row in table_rows(UMLS / "relations.tsv")]
    return graph_artifact(store, table_rows(UMLS / "entities.tsv"), relations, parts)
