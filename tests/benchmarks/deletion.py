"""Whether the facts that rules name as reasons carry their scores: deleted, the score must fall more than without as
many random facts beside head or tail.

    python tests/benchmarks/deletion.py wn18rr [rules.hops=2 ...] [--split valid] [--triples 300] [--seed 0]

Mines train.tsv (plain or .gz) of a folder under $KGRAY_DATA or ../shared/data, by RulesConfig with the overrides given;
then tests triples of the split that some rule predicts. Prints one line of JSON, and exits 1 when score or reciprocal
rank falls less than twice as much without the explained facts as without the random ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

ROOT = Path(__file__).resolve().parents[2]
for place in (ROOT, Path(__file__).parent):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

from rules import read  # noqa: E402

from kgray.evaluation.ranking import filter_splits  # noqa: E402
from kgray.graph.graph import Graph  # noqa: E402
from kgray.reasoning.config import RulesConfig  # noqa: E402
from kgray.reasoning.deletion import deletion_test  # noqa: E402
from kgray.reasoning.facts import Facts  # noqa: E402
from kgray.reasoning.mining import mine_rules  # noqa: E402


def main() -> int:
    """0 when the explained facts matter twice as much as random ones, 1 when not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("overrides", nargs="*", help="options of RulesConfig, rules.NAME=VALUE")
    parser.add_argument("--split", choices=("valid", "test"), default="valid")
    parser.add_argument("--triples", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = [text.removeprefix("rules.").partition("=") for text in options.overrides]
    config = RulesConfig(**{key: json.loads(value) for key, _, value in given})
    folder = Path(os.environ.get("KGRAY_DATA") or ROOT.parent / "shared" / "data") / options.data
    triples, entities, relations = read(folder)
    rules = mine_rules(Facts.build(triples["train"], entities, relations), config)
    known = Graph.from_arrays(triples, entities, relations).known(filter_splits(options.split))
    clock = time.perf_counter()
    found = deletion_test(
        *(rules, triples["train"], triples[options.split], known),
        split=options.split,
        count=options.triples,
        top=config.top,
        seed=options.seed,
    )
    result = {
        "data": options.data,
        "split": options.split,
        "seed": options.seed,
        "processor": platform.processor() or platform.machine(),
        "seconds": time.perf_counter() - clock,
        **asdict(found),
    }
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}))
    kept = found.score_explained >= 2 * found.score_random
    return 0 if kept and found.reciprocal_rank_explained >= 2 * found.reciprocal_rank_random else 1


if __name__ == "__main__":
    sys.exit(main())
