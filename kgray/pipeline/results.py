"""What a job says in the end: a table for people, numbers for the line of JSON. Floor 6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kgray.artifact import Artifact
from kgray.lineage.tracking import numeric
from kgray.pipeline.deployment import exchanges
from kgray.pipeline.plan import Work

_TARGET = {
    "ingest": "ingest",
    "pretrain": "pretrain",
    "embed": "embed",
    "train": "train",
    "evaluate": "evaluate",
    "explain": "ensemble",
    "predict": "predict",
    "deploy": "deploy",
    "pipeline": "ensemble",  # its version is the one that answers carry
}
_COLUMNS = ("mrr", "hits@1", "hits@3", "hits@10")


def result(job: str, work: Work) -> dict[str, Any]:
    """Fields of the line of JSON. The artifact is the one the job is for (of pipeline: the model); metrics
    are the numbers of the report where the job measures, else the artifact's counts."""
    artifact = work.artifacts[_TARGET[job]]
    measured = work.artifacts["evaluate"] if job == "pipeline" else artifact
    statuses = {outcome.step: outcome.status for outcome in work.outcomes}
    return {
        "status": "done" if "done" in statuses.values() else "up to date",
        "artifact": artifact.uri,
        "version": artifact.version,
        "metrics": metrics_of(measured),
        "steps": {
            o.step: {"status": o.status, "artifact": f"{o.artifact.kind}/{o.artifact.version}"}
            for o in work.outcomes
        },
    }


def summary(job: str, work: Work) -> str:
    """What people read: the measured variants side by side, then the exchanges over HTTP."""
    parts = []
    if job in ("evaluate", "pipeline"):
        parts.append(table(work))
    if job in ("deploy", "pipeline") and "deploy" in work.artifacts:
        parts.append(exchanges(work.artifacts["deploy"]))
    return "\n\n".join(part for part in parts if part)


def metrics_of(artifact: Artifact) -> dict[str, float]:
    """All numbers an artifact counts or measures, by dotted name."""
    return numeric(artifact.counts)


def table(work: Work) -> str:
    """Model, members, ablations and baselines side by side, a row each: filtered realistic ranks, both directions of
    the entity task and the relation task; then what is known of the model's confidence."""
    rows: dict[str, dict[str, float]] = {}
    for step, artifact in work.artifacts.items():
        job, _, variant = step.partition(" ")
        if job == "evaluate":
            rows[variant or "model"] = metrics_of(artifact)
    if "model" not in rows:
        return ""
    model = rows.pop("model")
    rows = {"model": model} | _beside("member", model) | rows | _beside("baseline", model)
    blocks = []
    for side in ("both", "relation"):
        protocol = f"{work.settings.evaluate.split}.{side}.realistic.filtered.full"
        measured = {name: row for name, row in rows.items() if f"{protocol}.mrr" in row}
        if measured:
            lines = [f"{protocol:<40}" + "".join(f"{column:>10}" for column in _COLUMNS)]
            for name, row in measured.items():
                lines.append(f"  {name:<38}" + "".join(_cell(row, f"{protocol}.{c}") for c in _COLUMNS))
            blocks.append("\n".join(lines))
    blocks.append(_links(rows, work.settings.evaluate.split))
    blocks.append(_confidence(model, work.settings.evaluate.split))
    return "\n\n".join(block for block in blocks if block)


def _links(rows: Mapping[str, Mapping[str, float]], split: str) -> str:
    """Links against pairs without one, a row each; empty where that was not asked for."""
    measured = {name: row for name, row in rows.items() if f"{split}.auc.uniform" in row}
    if not measured:
        return ""
    columns = ("auc.uniform", "ap.uniform", "auc.hard", "ap.hard")
    lines = [f"{split + ', links':<40}" + "".join(f"{column:>12}" for column in columns)]
    for name, row in measured.items():
        lines.append(f"  {name:<38}" + "".join(f"  {_cell(row, f'{split}.{c}')}" for c in columns))
    return "\n".join(lines)


def _beside(kind: str, metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The metrics under ``<kind>.<name>.`` by kind and name, without that beginning."""
    found: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        if key.startswith(f"{kind}."):
            name, _, metric = key.removeprefix(f"{kind}.").partition(".")
            found.setdefault(f"{kind} {name}", {})[metric] = value
    return found


def _confidence(metrics: Mapping[str, float], split: str) -> str:
    """A line a task on probabilities and answer sets; empty where the model has none."""
    lines = []
    for side in ("both", "relation"):
        key = f"{split}.{side}.calibration"
        if f"{key}.ece" in metrics:
            names = ("ece", "brier", "coverage", "set_size_median")
            lines.append(f"{key:<40}" + "".join(f"  {name} {metrics[f'{key}.{name}']:.4g}" for name in names))
    return "\n".join(lines)


def _cell(metrics: Mapping[str, float], key: str) -> str:
    return f"{metrics[key]:>10.4f}" if key in metrics else f"{'-':>10}"
