"""What each choice of the fused model is worth: one training a variant, all else equal, ranked on validation triples.

    python tests/benchmarks/ablations.py configs/wn18rr.yaml [train.epochs=4 ...] [--seeds 0,1] [--only fusion,gnn]
        [--out ablations-wn18rr.jsonl]

The graph and the vectors are those of the configuration, made if they are not there; training runs in this process.
A variant is the configuration with a few keys changed. Each result is a line of JSON added to ``--out``; what stands
there is not trained again, so a run that broke goes on. Prints the table in Markdown. Ensembles, rules and the second
look are left out: they have ablations of their own in the report.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from kgray.config import load_config, to_dict  # noqa: E402
from kgray.pipeline.plan import Work, needed  # noqa: E402
from kgray.pipeline.settings import Settings  # noqa: E402
from kgray.pipeline.steps import steps_of  # noqa: E402

VARIANTS: dict[str, dict[str, list[str]]] = {
    "the configuration": {"as it is": []},
    "views": {
        "no text": ["model.text.kind=none", "model.structure.drop=0"],
        "no structural vectors": ["model.structure.kind=none"],
        "no neighbours (ego-graph off)": ["model.gnn.kind=none"],
        "text alone": ["model.structure.kind=none", "model.gnn.kind=none"],
    },
    "fusion": {
        name: [f"model.fusion={name}", "model.late_structure=false"]
        for name in ("gated", "concat", "weighted", "cross_attention", "lstm")
    },
    "gnn": {name: [f"model.gnn.kind={name}"] for name in ("compgcn", "gat", "gcn", "gin", "rgcn", "sage")}
    | {"two hops": ["model.gnn.fanouts=[10, 5]", "model.gnn.inference_fanouts=[64, 16]"]},
    "decoder": {
        name: [f"model.decoder={name}"]
        for name in ("distmult", "transe", "rotate", "mlp", "transformer", "lstm", "conve")
    },
    "objective": {
        "no relation auxiliary": ["model.objective.relation_weight=0"],
        "relation auxiliary 1": ["model.objective.relation_weight=1"],
        **{name: [f"model.objective.loss={name}"] for name in ("bce", "self_adversarial", "margin")},
    },
    "regularisation": {
        "no dropout": ["model.dropout=0"],
        "weight decay 0": ["train.optimiser.weight_decay=0"],
        "N3 0.001": ["model.objective.n3=0.001"],
        "label smoothing 0.1": ["model.objective.label_smoothing=0.1"],
        "structural vectors withheld 0.3": ["model.structure.drop=0.3"],
        "adversarial 0.1": ["train.adversarial=0.1"],
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="dotted keys over the file's, for all variants alike")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", default=",".join(VARIANTS), help="groups, by comma: " + ", ".join(VARIANTS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    out = options.out or Path(f"ablations-{Path(options.config).stem}.jsonl")
    groups = options.only.split(",")
    if unknown := set(groups) - set(VARIANTS):
        parser.error(f"no such group: {', '.join(sorted(unknown))}")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for seed in seeds:  # one whole table a seed: a run that is stopped early has compared everything once
        for group in groups:
            for name, changes in VARIANTS[group].items():
                overrides = [*options.overrides, *changes, f"train.seed={seed}"]
                key = {"config": Path(options.config).name, "overrides": overrides}
                if not any({k: row[k] for k in key} == key for row in read(out)):
                    row = {"group": group, "variant": name, "seed": seed, **key, **train(options.config, overrides)}
                    with out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    print(table([row for row in read(out) if row["group"] in groups]))
    return 0


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def train(config: str, overrides: list[str]) -> dict[str, Any]:
    """Validation figures of one variant, and what it took."""
    from kgray.graph.graph import Graph
    from kgray.text.vectors import load_vectors
    from kgray.training.loop import fit

    settings = load_config(Settings, config, overrides)
    with Work(settings, "ablations") as work:
        steps = steps_of(settings)
        for step in needed(steps, [step.name for step in steps if step.name in ("ingest", "embed")]):
            work.run(step)
        graph = Graph.load(work.artifacts["ingest"])
        reads_text = settings.model.text.kind != "none"
        vectors = load_vectors(work.artifacts["embed"]) if reads_text else None
    clock = time.perf_counter()
    done = fit(graph, vectors, settings.model, settings.train)
    last = max((row for row in done.history if row["epoch"] + 1 == done.best_epoch), key=len)
    return {
        "mrr": done.best,
        "epoch": done.best_epoch,
        "epochs": settings.train.epochs,
        "metrics": {k: v for k, v in last.items() if k.startswith("valid.both")},
        "parameters": sum(p.numel() for p in done.model.parameters()),
        "seconds": round(time.perf_counter() - clock, 1),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "machine": platform.processor() or platform.machine(),
        "model": to_dict(settings.model),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean validation MRR by variant, its spread over seeds, and the difference to the configuration."""
    means: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        means.setdefault((row["group"], row["variant"]), []).append(row["mrr"])
    base = statistics.mean(means.get(("the configuration", "as it is"), [float("nan")]))
    lines = ["| | | validation MRR | difference |", "|---|---|---|---|"]
    said = ""
    for (group, variant), found in means.items():
        mean = statistics.mean(found)
        spread = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
        lines.append(f"| {group if group != said else ''} | {variant} | {mean:.4f}{spread} | {mean - base:+.4f} |")
        said = group
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
