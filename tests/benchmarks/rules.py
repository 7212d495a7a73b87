"""Seconds to mine and apply the rules of a data set on one core, and how well they rank.

    python tests/benchmarks/rules.py fb15k-237 [rules.hops=2 ...] [--split valid] [--triples 2000] [--target 300]

Mines train.tsv (plain or .gz) of a folder under $KGRAY_DATA or ../shared/data, by RulesConfig with the overrides given;
then ranks heads and tails of the split (all of it, or as many triples drawn at random). Prints one line of JSON, and
exits 1 when mining took more than the target, in seconds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from kgray.evaluation.ranking import filter_splits, rank_triples  # noqa: E402
from kgray.graph.graph import SPLITS, Graph  # noqa: E402
from kgray.reasoning.config import RulesConfig  # noqa: E402
from kgray.reasoning.facts import Facts  # noqa: E402
from kgray.reasoning.mining import mine_rules  # noqa: E402
from kgray.reasoning.scorer import RuleScorer  # noqa: E402


def read(folder: Path) -> tuple[dict[str, np.ndarray], int, int]:
    """Triples by split with ids in the order of names, and how many entities and relations there are."""
    rows = {}
    for split in SPLITS:
        path = next((p for p in (folder / f"{split}.tsv", folder / f"{split}.tsv.gz") if p.is_file()), None)
        if path is None:
            raise SystemExit(f"no {split}.tsv or {split}.tsv.gz in {folder}: set KGRAY_DATA")
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows[split] = np.array([line.split("\t")[:3] for line in data.decode().splitlines()])
    every = np.concatenate(list(rows.values()))
    entities, relations = np.unique(every[:, [0, 2]]), np.unique(every[:, 1])
    columns = (entities, relations, entities)
    ids = {
        split: np.stack([np.searchsorted(names, part[:, i]) for i, names in enumerate(columns)], axis=1)
        for split, part in rows.items()
    }
    return ids, len(entities), len(relations)


def measure(name: str, config: RulesConfig, split: str, count: int | None) -> dict[str, Any]:
    folder = Path(os.environ.get("KGRAY_DATA") or ROOT.parent / "shared" / "data") / name
    triples, entities, relations = read(folder)
    clock, cpu = time.perf_counter(), time.process_time()
    facts = Facts.build(triples["train"], entities, relations)
    rules = mine_rules(facts, config)
    mined, mined_cpu = time.perf_counter() - clock, time.process_time() - cpu
    scorer = RuleScorer(rules, facts, config.top)
    asked = triples[split]
    if count is not None and count < len(asked):
        asked = asked[np.sort(np.random.default_rng(0).choice(len(asked), count, replace=False))]
    heads, wanted, _ = (torch.from_numpy(column) for column in asked[:512].T.copy())
    scorer.score_tails(heads[:1], wanted[:1])  # its indexes are made when first asked
    clock = time.perf_counter()
    scorer.score_tails(heads, wanted)
    batch = time.perf_counter() - clock
    known = Graph.from_arrays(triples, entities, relations).known(filter_splits(split))
    clock = time.perf_counter()
    counts = rank_triples(scorer, asked, known, split=split, tasks=("tail", "head"), batch_size=512)
    hops = np.bincount(rules.hops[rules.is_path], minlength=4)
    return {
        "data": name,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "mining_seconds": mined,
        "mining_cpu_seconds": mined_cpu,
        "rules": {**{f"{i}_hop": int(hops[i]) for i in (1, 2, 3)}, "constant": int((~rules.is_path).sum())},
        f"seconds_for_{len(heads)}_queries": batch,
        "ranking_seconds": time.perf_counter() - clock,
        "triples": len(asked),
        **{k: v for k, v in counts.metrics().items() if ".both." in k and k.rsplit(".")[-1][:2] in ("mr", "hi")},
    }


def main() -> int:
    """0 when mining was as quick as asked, 1 when not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("overrides", nargs="*", help="options of RulesConfig, rules.NAME=VALUE")
    parser.add_argument("--split", choices=("valid", "test"), default="valid")
    parser.add_argument("--triples", type=int)
    parser.add_argument("--target", type=float, default=300.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = {}
    for text in options.overrides:
        key, _, value = text.removeprefix("rules.").partition("=")
        given[key] = json.loads(value)
    result = measure(options.data, RulesConfig(**given), options.split, options.triples)
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}))
    return 0 if result["mining_seconds"] <= options.target else 1


if __name__ == "__main__":
    sys.exit(main())
