"""Whether probabilities are frequencies where validation does not know all answers, seen without the test split.

    python tests/benchmarks/calibration.py configs/wn18rr.yaml [ensemble.folds=10 ...] [--seeds 0,1,2]

Half of the validation triples, drawn by the seed, play validation: gate, second look and calibration are fitted on them
and know nothing of the others, which play test and are filtered by everything, as test is. Graph and members are those
of the configuration, made if they are not there. Prints the expected calibration error, Brier score and coverage with
and without what makes good for unknown answers, a line of JSON a seed; exits 1 where that makes the error larger on
average.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from kgray.artifact import Artifact  # noqa: E402
from kgray.config import load_config  # noqa: E402
from kgray.evaluation import ensemble_fit  # noqa: E402
from kgray.evaluation.calibration import Calibration  # noqa: E402
from kgray.evaluation.config import EnsembleConfig  # noqa: E402
from kgray.evaluation.counts import SIDES  # noqa: E402
from kgray.evaluation.ranking import filter_splits  # noqa: E402
from kgray.evaluation.reliability import Reliability, metrics_of  # noqa: E402
from kgray.graph.filter_index import FilterIndex  # noqa: E402
from kgray.graph.graph import Graph  # noqa: E402
from kgray.model.bundle import Bundle  # noqa: E402
from kgray.model.candidates import Candidates, collect  # noqa: E402
from kgray.model.ensemble import EnsembleScorer, score  # noqa: E402
from kgray.model.gate import TrainingFacts  # noqa: E402
from kgray.model.gate_fit import choose_gate, fused  # noqa: E402
from kgray.pipeline.plan import Work, needed  # noqa: E402
from kgray.pipeline.settings import Settings  # noqa: E402
from kgray.pipeline.steps import members_of, steps_of  # noqa: E402

_BATCH = 64
_GIVEN = {"tail": (0, 1), "head": (1, 2)}


def main() -> int:
    """0 when the correction helps, 1 when not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="dotted keys over the file's")
    parser.add_argument("--seeds", default="0,1")
    options = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    settings = load_config(Settings, options.config, options.overrides)
    with Work(settings, "calibration") as work:
        steps, members = steps_of(settings), members_of(settings)
        for step in needed(steps, ["ingest", *members.values()]):
            work.run(step)
        graph = work.artifacts["ingest"]
        bundles = {name: Bundle.load(work.artifacts[step]) for name, step in members.items()}
    able = {name: bundle for name, bundle in bundles.items() if {"tail", "head"} <= set(bundle.tasks)}
    gains = []
    for seed in map(int, options.seeds.split(",")):
        found = halves(settings.ensemble, graph, able, seed)
        gains.append(found["without"]["ece"] - found["with"]["ece"])
        print(json.dumps({"config": Path(options.config).name, "seed": seed, **found}))
    return 0 if np.mean(gains) >= 0 else 1


def halves(config: EnsembleConfig, graph: Artifact, members: Mapping[str, Bundle], seed: int) -> dict[str, Any]:
    """Fit on one half of validation, measure on the other."""
    loaded = Graph.load(graph)
    valid = loaded.triples["valid"]
    first = np.random.default_rng(seed).permutation(len(valid)) < len(valid) // 2
    asked, later = valid[first], valid[~first]
    half = replace(loaded, triples={**loaded.triples, "valid": asked})
    facts = TrainingFacts.of(loaded.triples["train"], loaded.num_entities, loaded.num_relations)
    data = candidates(config, half, members, facts)
    choice = choose_gate(
        data,
        folds=config.folds,
        shrinkage=config.shrinkage,
        seed=config.seed,
        directions=2 * loaded.num_relations,
    )
    scores, reranker = fused(data.scores, choice.weights), None
    if config.second_look is not None:
        look = ensemble_fit._look_again(config, config.second_look, graph, half, data, scores, choice)
        scores, reranker = look.scores, look.reranker
    blind = replace(half, triples={**half.triples, "valid": asked[:0]})  # as if nothing were hidden from validation
    with_it, without = {}, {}
    for side, task in enumerate(_GIVEN):
        rows = np.flatnonzero((data.queries.task == side).numpy())
        with_it[task] = ensemble_fit._calibrate(data, scores, rows, task, config, half)
        without[task] = ensemble_fit._calibrate(data, scores, rows, task, config, blind)
    scorer = EnsembleScorer({n: b.scorer for n, b in members.items()}, {"entity": choice.gate}, facts, reranker)
    known = loaded.known(filter_splits("valid"))
    calibrations = {"with": Calibration(config.alpha, with_it), "without": Calibration(config.alpha, without)}
    measured = measure(scorer, later, known, calibrations)
    names = ("ece", "brier", "coverage", "set_size_median")
    return {
        name: {metric: round(told[f"later.both.calibration.{metric}"], 4) for metric in names}
        | {f"{task}_ece": round(told[f"later.{task}.calibration.ece"], 4) for task in _GIVEN}
        for name, told in ((name, metrics_of(parts, "later")) for name, parts in measured.items())
    }


def candidates(config: EnsembleConfig, half: Graph, members: Mapping[str, Bundle], facts: TrainingFacts) -> Candidates:
    """Of the entity queries of the half's validation triples, which know each other and nothing of the other half."""
    known, found = half.known(filter_splits("valid")), []
    for triples in torch.split(torch.from_numpy(half.triples["valid"]), _BATCH):
        for task, (one, two) in _GIVEN.items():
            with torch.no_grad():
                rows = {n: score(b.scorer, task, triples[:, one], triples[:, two]) for n, b in members.items()}
            how = {"best": config.candidates, "sampled": config.sampled, "seed": config.seed}
            found.append(collect(task, triples, rows, known, facts, **how))
    return Candidates.concatenate(found)


def measure(
    scorer: EnsembleScorer, triples: Any, known: FilterIndex, calibrations: Mapping[str, Calibration]
) -> dict[str, dict[str, Reliability]]:
    """How each calibration does on these triples, by task."""
    found = {name: {task: Reliability() for task in _GIVEN} for name in calibrations}
    for part in torch.split(torch.from_numpy(triples), _BATCH):
        for task, (one, two) in _GIVEN.items():
            gold = part[:, 2 - 2 * SIDES.index(task)]
            with torch.no_grad():
                scores = score(scorer, task, part[:, one], part[:, two])
            lookup = known.tails if task == "tail" else known.heads
            which, answers = (torch.from_numpy(a) for a in lookup(part[:, one], part[:, two]))
            out = torch.zeros(scores.shape, dtype=torch.bool)
            out[which, answers] = True
            out[torch.arange(len(part)), gold] = False
            for name, calibration in calibrations.items():
                found[name][task].observe(calibration, task, scores, gold, part[:, 1].numpy(), out)
    return found


if __name__ == "__main__":
    sys.exit(main())
