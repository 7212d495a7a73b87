"""One ensemble from its members, without Ray: gathering candidates shard by shard, then gate and calibration.

Only training and validation triples are read here; what stands in the test split changes nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kgray.artifact import Artifact
from kgray.evaluation.calibration import Calibration, TaskCalibration, fit_task
from kgray.evaluation.config import EnsembleConfig, SecondLookConfig
from kgray.evaluation.counts import SIDES
from kgray.evaluation.ranking import filter_splits
from kgray.evaluation.reliability import Reliability, metrics_of
from kgray.evaluation.shards import Piece, read_triples
from kgray.graph.filter_index import FilterIndex
from kgray.graph.graph import Graph
from kgray.model.bundle import CALIBRATION, Bundle, write_common
from kgray.model.candidates import Candidates, collect, thin
from kgray.model.ensemble import check_graph, describe, score, write_gates
from kgray.model.features import CandidateFeatures
from kgray.model.gate import Gate, TrainingFacts, part_of
from kgray.model.gate_fit import Choice, choose_gate, fused, inverse_temperature, scales_of
from kgray.model.reranking import Reranker
from kgray.model.reranking_fit import SecondLook, fit_second_look

log = logging.getLogger(__name__)

PARTS: Mapping[str, tuple[str, ...]] = {"entity": ("tail", "head"), "relation": ("relation",)}
_PARTS = ("head", "relation", "tail")
METRICS = {
    "entity": "valid.both.realistic.filtered.crossfit.mrr",
    "relation": "valid.relation.realistic.filtered.crossfit.mrr",
}
"""Each query ranked by a gate that never saw its fold; rivals outside every member's best are counted by a sample."""


@dataclass(frozen=True)
class Shared:
    """What all shards need; Ray shares its arrays on a node. known: training and validation facts."""

    graph_version: str
    known: Mapping[str, npt.NDArray[Any]]
    facts: TrainingFacts


def prepare(graph: Artifact) -> Shared:
    """Of a graph artifact."""
    loaded = Graph.load(graph)
    facts = TrainingFacts.of(loaded.triples["train"], loaded.num_entities, loaded.num_relations)
    return Shared(graph.version, loaded.known(filter_splits("valid")).to_arrays(), facts)


def gather(
    config: EnsembleConfig,
    graph: Artifact,
    members: Mapping[str, Artifact],
    shared: Shared,
    pieces: Sequence[Piece],
    share: float,
) -> dict[str, list[Candidates]]:
    """Candidates of the queries of some validation triples, by part. share: of the triples, the rest is thinned out.

    Raises ArtifactError for a member of another graph, NonFiniteError for a score that cannot be ranked.
    """
    bundles = _open(members, graph)
    known = FilterIndex.from_arrays(shared.known)
    widest = max(shared.facts.num_entities, shared.facts.num_relations) * len(bundles)
    step = max(1, (config.score_memory_mb << 18) // max(widest, 1))  # four bytes a score
    found: dict[str, list[Candidates]] = {part: [] for part in PARTS}
    for block in read_triples(graph, pieces):
        kept = thin(block, share, config.seed)
        for start in range(0, len(kept), step):
            triples = torch.from_numpy(kept[start : start + step])
            head, relation, tail = triples.unbind(1)
            for part, tasks in PARTS.items():
                able = members_of(part, bundles)
                given = [(head, relation), (relation, tail)] if part == "entity" else [(head, tail)]
                for task, (first, second) in zip(tasks if able else (), given, strict=False):
                    with torch.no_grad():
                        rows = {name: score(bundles[name], task, first, second) for name in able}
                        found[part].append(
                            collect(
                                *(task, triples, rows, known, shared.facts),
                                best=config.candidates,
                                sampled=config.sampled,
                                seed=config.seed,
                            )
                        )
    # A shard's batches leave as one piece: padding differs, and Ray need not carry hundreds of small tensors.
    return {part: [Candidates.concatenate(pieces)] if pieces else [] for part, pieces in found.items()}


def members_of(part: str, bundles: Mapping[str, Bundle]) -> list[str]:
    """Members that can do every task of a part."""
    return [name for name, bundle in bundles.items() if set(PARTS[part]) <= set(bundle.tasks)]


@dataclass
class _Fitted:
    """What has been fitted so far, of all parts."""

    gates: dict[str, Gate] = field(default_factory=dict)
    reranker: Reranker | None = None
    told: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, TaskCalibration] = field(default_factory=dict)


def write_ensemble(
    folder: Path,
    config: EnsembleConfig,
    graph: Artifact,
    members: Mapping[str, Artifact],
    shared: Shared,
    gathered: Sequence[Mapping[str, Sequence[Candidates]]],
) -> dict[str, Any]:
    """Fit gates, second look and calibration to what :func:`gather` found, write the artifact's files; returns its
    counts.

    Where there are no validation triples nothing can be fitted: the first member answers alone, uncalibrated.
    """
    loaded, bundles = Graph.load(graph), _open(members, graph)
    found = _Fitted()
    for part in PARTS:
        able = tuple(members_of(part, bundles))
        parts = [candidates for one in gathered for candidates in one[part]]
        if able and parts:
            _fit_part(found, part, config, graph, loaded, Candidates.concatenate(parts))
        elif able:
            found.gates[part] = Gate.single(able, able[0], torch.ones(len(SIDES), len(able)))
            found.told[part] = {"reason": f"{part} answers: {able[0]} alone, as there are no validation triples"}
            log.warning("ensemble: %s", found.told[part]["reason"])
    if not found.gates:
        raise ValueError("no member answers any task")
    info = {
        "members": describe(members, {name: bundle.tasks for name, bundle in bundles.items()}),
        "gate": {
            "members": {part: list(gate.members) for part, gate in found.gates.items()},
            "chosen": found.told,
            "second_look": None if found.reranker is None else found.reranker.write(folder),
        },
        "metrics": found.metrics,
        "alpha": config.alpha,
    }
    write_common(folder, "ensemble", loaded, info)
    write_gates(folder, found.gates, shared.facts)
    if found.tasks:
        text = json.dumps(Calibration(config.alpha, found.tasks).to_json(), allow_nan=False)
        (folder / CALIBRATION).write_text(text + "\n")
    sizes = {"entities": loaded.num_entities, "relations": loaded.num_relations, "members": len(members)}
    return sizes | found.metrics


def _fit_part(
    into: _Fitted, part: str, config: EnsembleConfig, graph: Artifact, loaded: Graph, data: Candidates
) -> None:
    """Gate, second look and calibration of entity or of relation queries."""
    choice = choose_gate(
        data,
        folds=config.folds,
        shrinkage=config.shrinkage,
        seed=config.seed,
        directions=2 * loaded.num_relations,
    )
    into.gates[part], into.told[part] = choice.gate, choice.to_json()
    scores, mrr = fused(data.scores, choice.weights), choice.mrr
    if part == "entity" and config.second_look is not None:
        second = _look_again(config, config.second_look, graph, loaded, data, scores, choice)
        into.told["second_look"], into.reranker = second.to_json(), second.reranker
        scores, mrr = second.scores, second.mrr
    fitted, measured = calibrate(data, choice, scores, config, loaded)
    into.tasks |= fitted
    into.metrics |= {METRICS[part]: mrr} | metrics_of(measured, "valid")


def _look_again(
    config: EnsembleConfig,
    look: SecondLookConfig,
    graph: Artifact,
    loaded: Graph,
    data: Candidates,
    scores: torch.Tensor,
    choice: Choice,
) -> SecondLook:
    columns = ["external_id", "name", "description"]
    table = graph.read_table("entities", columns=columns)
    ids, names, texts = (table[column].to_pylist() for column in columns)
    # A name that is only the id is none: ids that look alike say nothing.
    spoken = ["" if name == key else name or "" for name, key in zip(names, ids, strict=True)]
    features = CandidateFeatures.of(loaded, spoken, [text or "" for text in texts])
    return fit_second_look(
        *(data, scores, scales_of(data), choice.fold, features),
        count=look.candidates or config.candidates,
        hidden=look.hidden,
        directions=2 * loaded.num_relations,
        seed=config.seed,
    )


def calibrate(
    data: Candidates, choice: Choice, scores: torch.Tensor, config: EnsembleConfig, graph: Graph
) -> tuple[dict[str, TaskCalibration], dict[str, Reliability]]:
    """Calibration of each task of a part, on ``scores`` (Q, C) by what never saw the query; and how it does, fold by
    fold, on queries it never saw either."""
    fitted, measured = {}, {}
    for side in sorted(set(data.queries.task.tolist())):
        task = SIDES[side]
        mine = (data.queries.task == side).numpy()
        fitted[task] = _calibrate(data, scores, np.flatnonzero(mine), task, config, graph)
        measured[task] = Reliability()
        for number in range(int(choice.fold.max()) + 1):
            held, rest = mine & (choice.fold == number), mine & (choice.fold != number)
            if held.any() and rest.any():
                found = _calibrate(data, scores, np.flatnonzero(rest), task, config, graph)
                _measure(measured[task], found, data, scores, np.flatnonzero(held))
    return fitted, measured


def _groups(data: Candidates, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The relation of each query; relation queries are one group."""
    relations = data.triples[rows, 1].numpy()
    return np.zeros_like(relations) if part_of(SIDES[int(data.queries.task[rows[0]])]) == "relation" else relations


def _calibrate(
    data: Candidates,
    scores: torch.Tensor,
    rows: npt.NDArray[np.int64],
    task: str,
    config: EnsembleConfig,
    graph: Graph,
) -> TaskCalibration:
    own, weight = scores[rows], data.log_weight[rows]
    asked = data.triples[rows][:, [place for place, part in enumerate(_PARTS) if part != task]]
    return fit_task(
        *(own, weight, _groups(data, rows), graph.num_relations if task != "relation" else 1),
        questions=np.unique(asked.numpy(), axis=0, return_inverse=True)[1].reshape(-1),
        # A hidden fact of an undirected graph answers from either end; the pairs of one side are half of them.
        unknown=len(graph.triples["valid"]) / len(rows) * (2 if graph.undirected and task != "relation" else 1),
        alpha=config.alpha,
        group=config.group,
        # Scores that say nothing keep the scale they have; their probabilities are then what isotonic makes of them.
        inverse_temperature=inverse_temperature(own, weight) or 1.0,
    )


def _measure(
    into: Reliability,
    found: TaskCalibration,
    data: Candidates,
    scores: torch.Tensor,
    rows: npt.NDArray[np.int64],
) -> None:
    weight = data.log_weight[rows]
    tempered = scores[rows].double() * found.inverse_temperature
    log_p = tempered - torch.logsumexp(tempered + weight, dim=1, keepdim=True)
    kept = log_p.masked_fill(weight != 0, -torch.inf)
    best = kept.amax(1)
    credit = (kept[:, 0] >= best) / (kept >= best[:, None]).sum(1)
    threshold = found.thresholds[_groups(data, rows)]
    inside = log_p >= torch.from_numpy(threshold)[:, None]
    sizes = (inside * weight.exp()).sum(1).round().long().numpy()
    into.add(found.first(best.exp().numpy()), credit.numpy(), kept[:, 0].numpy() >= threshold, sizes)


def _open(members: Mapping[str, Artifact], graph: Artifact) -> dict[str, Bundle]:
    bundles = {name: Bundle.load(artifact) for name, artifact in members.items()}
    for name, bundle in bundles.items():
        check_graph(name, bundle, graph.version)
    return bundles
