"""The report's plots as SVG that follow the page's light or dark colours (and stand alone in their own).

Every colour is written as ``var(--name, #fallback)``: inside report.html the page decides, elsewhere the
fallback counts. Text stays text, so that a page can be searched and a screen reader has something to read.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from kgray.evaluation.shards import RANK_EDGES
from kgray.evaluation.timings import columns

INK, MUTED, GRID = "#1f2328", "#6a7078", "#d7dade"
TAIL, HEAD, RELATION, MODEL, OTHER, VARIANT = "#2a78d6", "#eb6834", "#1baf7a", "#2a78d7", "#9aa1a9", "#4a3aa7"
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    TAIL: "tail",
    HEAD: "head",
    RELATION: "relation",
    MODEL: "model",
    OTHER: "other",
    VARIANT: "variant",
}
_SIDE_COLOURS = {"tail": TAIL, "head": HEAD, "relation": RELATION}
_PHASE_COLOURS = {
    "sampling": "#8c5a2b",
    "fetching": "#c08a3e",
    "encoding": "#4a3aa7",
    "forward": "#2a78d6",
    "backward": "#1f9fb0",
    "exchange": "#eb6834",
    "optimiser": "#1baf7a",
    "waiting": "#d64550",
    "evaluation": "#b06fc4",
    "checkpointing": "#7a8f2f",
}
"""Mid tones, readable on light and dark; what stands in no phase is grey."""
_MOST_RELATIONS = 40
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def all_plots(report: Mapping[str, Any]) -> dict[str, str]:
    """``{name: svg}`` of every plot there is data for in a :func:`kgray.evaluation.report.report_of`."""
    drawn = {}
    with rc_context(_STYLE):
        for name, draw in {
            "comparison": _comparison,
            "ranks": _ranks,
            "cardinality": _cardinality,
            "relations": _relations,
            "training": _training,
            "reliability": _reliability,
            "timings": _timings,
        }.items():
            figure = draw(report)
            if figure is not None:
                drawn[name] = _svg(figure, name)
    return drawn


def _svg(figure: Figure, name: str) -> str:
    out = io.StringIO()
    # The salt keeps the ids of several plots on one page apart, and the same plot the same bytes.
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    return svg


def _comparison(report: Mapping[str, Any]) -> Figure:
    """MRR of the model, its members and ablations, and the baselines, a panel a task."""
    rows = [("model", report["metrics"], MODEL)]
    variants = [*report["members"].items(), *report["ablations"].items()]
    rows += [(name, entry["metrics"], VARIANT) for name, entry in variants]
    rows += [(name, entry["metrics"], OTHER) for name, entry in report["baselines"].items()]
    sides = [side for side in ("both", "tail", "head", "relation") if side in report["slices"]]
    figure = Figure(figsize=(2.2 * len(sides) + 1.4, 0.34 * len(rows) + 0.7))
    panels = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    for panel, side in zip(panels, sides, strict=True):
        values = [metrics.get(report["keys"][side] + ".mrr") for _, metrics, _ in rows]
        panel.barh(range(len(rows)), [v or 0 for v in values], color=[colour for *_, colour in rows], height=0.62)
        for place, value in enumerate(values):
            panel.text((value or 0) + 0.015, place, "n/a" if value is None else f"{value:.3f}", va="center")
        panel.set_xlim(0, 1.18)
        panel.set_xticks([0, 0.5, 1])
        panel.set_title(side)
        panel.grid(axis="x")
    panels[0].set_yticks(range(len(rows)), [name.replace("_", " ") for name, *_ in rows])
    panels[0].invert_yaxis()
    return figure


def _ranks(report: Mapping[str, Any]) -> Figure:
    """Share of queries by rank, a group of bars a bin."""
    histogram = report["histogram"]
    last = 1 + max(max((i for i, n in enumerate(counts) if n), default=0) for counts in histogram.values())
    figure = Figure(figsize=(7.4, 2.6))
    axes = figure.subplots()
    labels = [_bin_label(i) for i in range(last)]
    series = {side: [n / max(sum(counts), 1) for n in counts[:last]] for side, counts in histogram.items()}
    _grouped(axes, labels, series)
    axes.set_xlabel("realistic rank of the true answer")
    axes.set_ylabel("share of queries")
    return figure


def _bin_label(index: int) -> str:
    low = RANK_EDGES[index]
    if index + 1 == len(RANK_EDGES):
        return f"{_brief(low)}+"
    high = RANK_EDGES[index + 1] - 1
    return _brief(low) if high == low else f"{_brief(low)}-{_brief(high if low < 1000 else high + 1)}"


def _brief(number: int) -> str:
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number // size}{unit}"
    return str(number)


def _cardinality(report: Mapping[str, Any]) -> Figure | None:
    """MRR by cardinality class of the relation, a bar a side."""
    by_side = {s: report["slices"][s].get("cardinality", {}) for s in _SIDE_COLOURS if s in report["slices"]}
    classes = list(dict.fromkeys(name for found in by_side.values() for name in found))
    if not classes:
        return None
    some = next(iter(by_side.values()))
    figure = Figure(figsize=(6.0, 2.6))
    axes = figure.subplots()
    labels = [f"{name}\n{some[name]['count']:,.0f} triples" for name in classes]
    _grouped(axes, labels, {s: [found[name]["mrr"] for name in classes] for s, found in by_side.items()})
    axes.set_ylim(0, 1)
    axes.set_ylabel("MRR")
    return figure


def _relations(report: Mapping[str, Any]) -> Figure:
    """MRR by relation, the most frequent first; dots rather than bars, so that sides can be told apart."""
    by_side = {s: report["slices"][s]["relation"] for s in _SIDE_COLOURS if s in report["slices"]}
    some = next(iter(by_side.values()))
    names = sorted(some, key=lambda name: (-some[name]["count"], name))[:_MOST_RELATIONS]
    figure = Figure(figsize=(6.6, 0.22 * len(names) + 0.8))
    axes = figure.subplots()
    for side, found in by_side.items():
        values = [found[name]["mrr"] for name in names]
        axes.scatter(values, range(len(names)), s=26, color=_SIDE_COLOURS[side], label=side, zorder=3)
    axes.set_yticks(range(len(names)), [f"{_short(name)} ({some[name]['count']:,.0f})" for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("MRR (in brackets: triples)")
    axes.grid(axis="both")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


def _training(report: Mapping[str, Any]) -> Figure | None:
    """Training losses and validation MRR over the epochs, as the model artifact tells them."""
    history: Sequence[Mapping[str, float]] = report["history"]
    losses = [(row["epoch"], row["train.loss"]) for row in history if "train.loss" in row]
    key = "valid.both.realistic.filtered.full.mrr"
    validated = [(row["epoch"], row[key]) for row in history if key in row]
    panels = [(title, points) for title, points in (("training loss", losses), (key, validated)) if points]
    if not panels:
        return None
    figure = Figure(figsize=(7.4, 2.4))
    for axes, (title, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.plot(*zip(*points, strict=True), color=MODEL, linewidth=1.8, marker="o", markersize=2.5)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(axis="y")
    best = max(validated, key=lambda point: point[1], default=None)
    if best is not None:
        figure.axes[-1].annotate(
            f"best {best[1]:.3f}", best, xytext=(0, -14), textcoords="offset points", ha="center", color=INK
        )
    return figure


def _reliability(report: Mapping[str, Any]) -> Figure | None:
    """How often the first answer was right against the probability it was given, a panel a task."""
    found = {task: bins for task, bins in report["reliability"].items() if bins}
    if not found:
        return None
    figure = Figure(figsize=(2.6 * len(found) + 0.4, 2.7))
    for axes, (task, bins) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        axes.plot([0, 1], [0, 1], color=OTHER, linewidth=1)
        stated, right = ([b[key] for b in bins] for key in ("probability", "right"))
        axes.plot(stated, right, color=_SIDE_COLOURS[task], linewidth=1.4, marker="o", markersize=4)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.set_aspect("equal")
        axes.set_title(task)
        axes.set_xlabel("probability of the first answer")
        axes.grid(axis="both")
    figure.axes[0].set_ylabel("share that is right")
    return figure


def _timings(report: Mapping[str, Any]) -> Figure | None:
    """A bar a model, stacked by phase, as shares of its time."""
    found = report["timings"]
    phases = columns(found)
    if not phases:
        return None
    figure = Figure(figsize=(7.4, 0.42 * len(found) + 1.1))
    axes = figure.subplots()
    left = [0.0] * len(found)
    for phase in phases:
        shares = [row["seconds"].get(phase, (0, 0, 0))[1] / (row["wall"][1] or 1.0) for row in found.values()]
        colour = _PHASE_COLOURS.get(phase, OTHER)
        axes.barh(range(len(found)), shares, left=left, height=0.62, color=colour, label=phase)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    names = [f"{name.replace('_', ' ')} ({row['wall'][1]:,.0f} s)" for name, row in found.items()]
    axes.set_yticks(range(len(found)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the time")
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=5)
    return figure


def _grouped(axes: Any, labels: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    width = 0.8 / len(series)
    for index, (side, values) in enumerate(series.items()):
        places = [i + (index - (len(series) - 1) / 2) * width for i in range(len(labels))]
        axes.bar(places, values, width=width * 0.9, color=_SIDE_COLOURS[side], label=side)
    axes.set_xticks(range(len(labels)), labels)
    axes.tick_params(axis="y", labelcolor=MUTED)
    axes.grid(axis="y")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(series))


def _short(name: str, most: int = 44) -> str:
    # The end of a long relation path says more than its beginning.
    return name if len(name) <= most else "..." + name[-most + 3 :]
