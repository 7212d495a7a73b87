"""The report: metrics.json for programs, report.html for people, and tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kgray.artifact import Artifact, Draft
from kgray.errors import ArtifactNotFoundError
from kgray.evaluation.baselines import BASELINES
from kgray.evaluation.config import EvaluateConfig
from kgray.evaluation.counts import KINDS
from kgray.evaluation.ranking import filter_splits
from kgray.evaluation.reliability import metrics_of
from kgray.evaluation.shards import RANK_EDGES, Measured
from kgray.evaluation.timings import columns, timings
from kgray.graph.graph import SUPPORT

METRICS = ("mrr", "hits@1", "hits@3", "hits@10", "mr", "amri", "ties", "count")
CALIBRATED = ("ece", "brier", "coverage", "set_size_mean", "set_size_median", "set_empty")
LINKS = ("auc.uniform", "ap.uniform", "auc.hard", "ap.hard")
_TERMINAL = ("mrr", "hits@1", "hits@3", "hits@10")
_MOST_ROWS = 2000


def report_of(
    config: EvaluateConfig,
    model: Artifact,
    graph: Artifact,
    measured: Measured,
    ablations: Mapping[str, Artifact],
    seconds: float,
) -> dict[str, Any]:
    """All that is known, as plain JSON: what metrics.json holds.

    ``metrics``: every metric of every side for all three kinds of rank, by full name. ``slices``: realistic
    metrics by side, dimension, value. ``counts``: the exact sums (:meth:`Counts.from_json`), for merging.
    """
    counts = measured.model
    info = model.read_json("config.json") if "config.json" in model.files() else {}
    versions = {member["name"]: member["version"] for member in info.get("members", ())}
    links = {name: scores.metrics(config.split) for name, scores in measured.links.items()}
    relations = graph.read_table("relations.parquet", columns=["external_id"])["external_id"].to_pylist()
    return {
        "format": 3,
        "split": config.split,
        "keys": {side: counts.key(side) for side in counts.sides()},
        "filtered_by": [s for s in filter_splits(config.split) if s != SUPPORT or f"triples_{s}" in graph.counts],
        "model": model.source.to_dict(),
        "graph": graph.source.to_dict(),
        "dataset": graph.counts,
        "seconds": round(seconds, 3),
        "metrics": counts.metrics(KINDS) | metrics_of(measured.reliability, config.split) | links.get("model", {}),
        "slices": counts.slices(relations),
        "baselines": {
            name: {
                "meaning": BASELINES[name].meaning,
                "metrics": baseline.metrics() | links.get(f"baseline.{name}", {}),
            }
            for name, baseline in measured.baselines.items()
        },
        "members": {
            name: {"version": versions.get(name, ""), "metrics": member.metrics() | links.get(f"member.{name}", {})}
            for name, member in measured.members.items()
        },
        "gate": info.get("gate", {}).get("chosen", {}),
        "reliability": {task: one.bins() for task, one in measured.reliability.items()},
        "alpha": info.get("alpha"),
        "link_negatives": config.link_negatives,
        "ablations": {
            name: {"version": report.version, "metrics": report.read_json("metrics.json")["metrics"]}
            for name, report in ablations.items()
        },
        "histogram": {side: counts.tolist() for side, counts in measured.histogram.items()},
        "histogram_edges": list(RANK_EDGES),
        "history": _history(model),
        "timings": timings(model, versions),
        "counts": counts.to_json(),
    }


def _history(model: Artifact) -> list[dict[str, float]]:
    """Metrics over the epochs; of an ensemble those of the first member that was trained over epochs."""
    for uri in (model.uri, *(source.uri for source in model.inputs if source.kind == "model")):
        try:
            artifact = Artifact.peek(uri)
        except ArtifactNotFoundError:
            continue  # the storage has moved; the report does without a curve
        found: list[dict[str, float]] = artifact.read_json("history.json") if "history.json" in artifact.files() else []
        if found:
            return found
    return []


def write_report(draft: Draft, report: Mapping[str, Any]) -> None:
    """Write metrics.json, plots/*.svg and report.html."""
    # matplotlib and jinja2 only where a report is written: the training loop imports this package too.
    from kgray.evaluation.plots import all_plots

    draft.write_json("metrics.json", report)
    plots = all_plots(report)
    for name, svg in plots.items():
        draft.write_bytes(f"plots/{name}.svg", svg.encode())
    draft.write_bytes("report.html", render_html(report, plots).encode())


def render_html(report: Mapping[str, Any], plots: Mapping[str, str]) -> str:
    """One self-contained page; everything that came from data is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kgray.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["metric"] = format_metric
    sides = list(report["keys"])
    return environment.get_template("report.html.j2").render(
        report=report,
        plots=plots,
        sides=sides,
        kinds=KINDS,
        metrics=METRICS,
        calibrated=CALIBRATED,
        links=LINKS,
        main="both" if "both" in sides else sides[0],
        rows=_comparison(report),
        phases=columns(report["timings"]),
        most=_MOST_ROWS,
    )


def format_metric(value: float | None, name: str = "mrr") -> str:
    """A metric as people read it; an en dash where there is none."""
    if value is None:
        return "\N{EN DASH}"
    if name in ("count", "set_size_median"):
        return f"{value:,.0f}"
    return f"{value:,.1f}" if name in ("mr", "set_size_mean") else f"{value:.4f}"


def render_ablations(variants: Mapping[str, Mapping[str, float]], split: str = "test") -> str:
    """Several models side by side as a text table, the best of each column marked with an asterisk.

    ``variants``: flat metrics by name ("full", "text_only", ...), as
    :func:`kgray.evaluation.evaluate.evaluate` returns them or as a report's ``metrics``. One block a side,
    filtered realistic ranks; sides nobody has are left out.
    """
    width = max((len(name) for name in variants), default=0)
    blocks = []
    for side in ("both", "tail", "head", "relation"):
        prefix = f"{split}.{side}.realistic.filtered.full"
        if not any(f"{prefix}.mrr" in metrics for metrics in variants.values()):
            continue
        columns = {m: [metrics.get(f"{prefix}.{m}") for metrics in variants.values()] for m in _TERMINAL}
        lines = [prefix, " " * (width + 2) + "".join(f"{name:>10}" for name in _TERMINAL)]
        for place, name in enumerate(variants):
            cells = "".join(_cell(column, place) for column in columns.values())
            lines.append(f"  {name:<{width}}{cells}".rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _cell(column: Sequence[float | None], place: int) -> str:
    value = column[place]
    if value is None:
        return f"{'-':>9} "
    best = max(v for v in column if v is not None)
    return f"{value:>9.4f}{'*' if value == best and len(column) > 1 else ' '}"


def _comparison(report: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, float]]]:
    """(name, kind of row, metrics) of the model, its members and ablations, and the baselines."""
    rows: list[tuple[str, str, Mapping[str, float]]] = [("model", "model", report["metrics"])]
    rows += [(name, "member", entry["metrics"]) for name, entry in report["members"].items()]
    rows += [(name, "ablation", entry["metrics"]) for name, entry in report["ablations"].items()]
    rows += [(name, "baseline", entry["metrics"]) for name, entry in report["baselines"].items()]
    return rows
