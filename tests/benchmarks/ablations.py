"""What each choice of the fused model is worth: one training a variant, all else equal, ranked on validation triples.

    python tests/benchmarks/ablations.py configs/wn18rr.yaml [train.epochs=4 ...] [--seeds 0,1] [--only fusion,gnn]
        [--out ablations-wn18rr.jsonl]

The graph and the vectors are those of the configuration, made if they are not there; training runs in this process.
A variant is the configuration with a few keys changed, and in some groups trained in another way: with a model taught
by pseudo-labels of the one before, with the snapshots of a training together, or the text encoder alone, whose figures
stand beside each other only. Each result is a line of JSON added to ``--out``; what stands there is not trained again,
so a run that broke goes on. Prints the table in Markdown. Ensembles, rules and the second look are left out: they have
ablations of their own in the report.
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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from kgray.config import load_config, to_dict  # noqa: E402
from kgray.errors import ConfigError  # noqa: E402
from kgray.evaluation.ranking import rank_triples  # noqa: E402
from kgray.graph.graph import Graph  # noqa: E402
from kgray.pipeline.plan import Work, needed  # noqa: E402
from kgray.pipeline.settings import Settings  # noqa: E402
from kgray.pipeline.steps import steps_of  # noqa: E402
from kgray.text.embed import place_of  # noqa: E402
from kgray.text.tokens import read_texts  # noqa: E402
from kgray.text.vectors import Vectors, load_vectors  # noqa: E402
from kgray.training.config import PseudoConfig  # noqa: E402
from kgray.training.loop import METRIC, Fit, Trainer, fit  # noqa: E402
from kgray.training.pretrain import pretrain_config  # noqa: E402
from kgray.training.pseudo import pseudo_labels  # noqa: E402
from kgray.training.worker import Worker  # noqa: E402

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
    "pseudo-labels": {"5% of the triples": [], "20% of the triples": ["members.pseudo.share=0.2"]},
    "snapshots": {"the last of 2 cycles": [], "both cycles' ends, mean score": ["members.snapshots=1"]},
    "text encoder": {
        "as it is": [],
        "word dropout 0.1": ["text.tuning.word_dropout=0.1"],
        "names of answers masked": ["text.tuning.mask_mentions=true"],
        "no margin": ["text.tuning.margin=0"],
    },
}
AS_IT_IS = "as it is"


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
                key = {"group": group, "variant": name, "seed": seed, "config": Path(options.config).name}
                key |= {"overrides": overrides}
                if not any({k: row[k] for k in key} == key for row in read(out)):
                    row = key | train(options.config, group, overrides)
                    with out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    print(table([row for row in read(out) if row["group"] in groups]))
    return 0


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def train(config: str, group: str, overrides: list[str]) -> dict[str, Any]:
    """Validation figures of one variant, and what it took."""
    settings = load_config(Settings, config, overrides)
    with Work(settings, "ablations") as work:
        steps = steps_of(settings)
        wanted = ("ingest",) if group == "text encoder" else ("ingest", "embed")
        for step in needed(steps, [step.name for step in steps if step.name in wanted]):
            work.run(step)
    clock = time.perf_counter()
    done, epochs = TRAININGS.get(group, plain)(settings, work)
    last = max((row for row in done.history if row["epoch"] + 1 == done.best_epoch), key=len)
    return {
        "mrr": done.best,
        "epoch": done.best_epoch,
        "epochs": epochs,
        "metrics": {k: v for k, v in last.items() if k.startswith("valid.both")},
        "parameters": sum(p.numel() for p in done.model.parameters()),
        "seconds": round(time.perf_counter() - clock, 1),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "machine": platform.processor() or platform.machine(),
        "model": to_dict(settings.model),
    }


def inputs(settings: Settings, work: Work) -> tuple[Graph, Vectors | None]:
    reads_text = settings.model.text.kind != "none"
    return Graph.load(work.artifacts["ingest"]), load_vectors(work.artifacts["embed"]) if reads_text else None


def plain(settings: Settings, work: Work) -> tuple[Fit, int]:
    return fit(*inputs(settings, work), settings.model, settings.train), settings.train.epochs


def lesson(settings: Settings, work: Work) -> tuple[Fit, int]:
    """A model taught by pseudo-labels of one that was trained the same way."""
    graph, vectors = inputs(settings, work)
    teacher = fit(graph, vectors, settings.model, settings.train)
    with torch.no_grad():
        labels = pseudo_labels(teacher.scorer, graph, settings.members.pseudo or PseudoConfig())
    return fit(graph.with_pseudo(labels), vectors, settings.model, settings.train), settings.train.epochs


def cycles(settings: Settings, work: Work) -> tuple[Fit, int]:
    """Two cycles of the learning rate; the last one's end, or with members.snapshots the mean of both ends' scores."""
    graph, vectors = inputs(settings, work)
    done = fit(graph, vectors, settings.model, settings.train, snapshots=1)
    if settings.members.snapshots:
        ends = [done]
        for weights in done.snapshots:
            again = Trainer(graph, vectors, settings.model, settings.train, Worker(settings.train.device))
            ends.append(again.finish_with(weights))
        mean = Mean([end.scorer for end in ends])
        with torch.no_grad():
            counts = rank_triples(mean, again.valid, again.known, split="valid", tasks=("tail", "head"))
        done = replace(done, best=counts.metrics()[METRIC])
    return done, settings.train.epochs


def encoder(settings: Settings, work: Work) -> tuple[Fit, int]:
    """The text encoder, ranked by its cosines alone."""
    text = settings.text
    if text is None or text.tuning is None:
        raise ConfigError("text.tuning", None, "a section: there is no training of the encoder to change")
    graph = work.artifacts["ingest"]
    texts = read_texts(graph, text, place_of(work.store, text).path)
    how = pretrain_config(text.tuning, settings.train)
    return fit(Graph.load(graph), texts, text.tuning, how), how.epochs


TRAININGS: dict[str, Callable[[Settings, Work], tuple[Fit, int]]] = {
    "pseudo-labels": lesson,
    "snapshots": cycles,
    "text encoder": encoder,
}


class Mean:
    """The mean of several models' scores; implements what ranking asks of a scorer."""

    def __init__(self, scorers: list[Any]) -> None:
        self.scorers = scorers
        self.num_entities, self.num_relations = scorers[0].num_entities, scorers[0].num_relations

    def score_tails(self, heads: torch.Tensor, relations: torch.Tensor) -> torch.Tensor:
        return torch.stack([one.score_tails(heads, relations).float() for one in self.scorers]).mean(0)

    def score_heads(self, relations: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        return torch.stack([one.score_heads(relations, tails).float() for one in self.scorers]).mean(0)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean validation MRR by variant, its spread over seeds, and the difference to the configuration."""
    means: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        means.setdefault((row["group"], row["variant"]), []).append(row["mrr"])
    whole = means.get(("the configuration", AS_IT_IS), [float("nan")])
    lines = ["| | | validation MRR | difference |", "|---|---|---|---|"]
    said = ""
    for (group, variant), found in means.items():
        mean, base = statistics.mean(found), statistics.mean(means.get((group, AS_IT_IS), whole))
        spread = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
        lines.append(f"| {group if group != said else ''} | {variant} | {mean:.4f}{spread} | {mean - base:+.4f} |")
        said = group
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
