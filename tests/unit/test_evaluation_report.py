"""The configuration, the page and the tables of the report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from kgray.config import load_config
from kgray.errors import ConfigError
from kgray.evaluation.config import EvaluateConfig
from kgray.evaluation.counts import KINDS, Counts
from kgray.evaluation.plots import all_plots
from kgray.evaluation.report import format_metric, render_ablations, render_html
from kgray.evaluation.shards import RANK_EDGES
from kgray.evaluation.timings import columns
from kgray.phases import total

NASTY = '<script>alert("x")</script>&'


def counts_of(relations: int, *, sides: tuple[str, ...] = ("tail", "head", "relation"), strata: bool = True) -> Counts:
    draw = np.random.default_rng(0)
    counts = Counts("test", True, relations, np.arange(relations, dtype=np.int8) % 4 if strata else None)
    which = draw.integers(0, relations, 300)
    for side in sides:
        best = draw.integers(1, 40, 300)
        unseen = draw.random(300) < 0.1
        counts.add(side, which, unseen, best, best + draw.integers(0, 2, 300), np.full(300, 50))
    return counts


def report_with(counts: Counts, names: list[str], **other: Any) -> dict[str, Any]:
    histogram = np.zeros(len(RANK_EDGES), dtype=np.int64)
    histogram[:9] = 10
    origin = {"kind": "model", "version": "0123456789abcdef", "uri": "/somewhere"}
    return {
        "split": "test",
        "keys": {side: counts.key(side) for side in counts.sides()},
        "filtered_by": ["train", "valid", "test"],
        "model": origin,
        "graph": origin,
        "dataset": {"entities": 50, "relations": len(names), "note": "text"},
        "seconds": 1.5,
        "metrics": counts.metrics(KINDS),
        "slices": counts.slices(names),
        "baselines": {"marginals": {"meaning": "a & b", "metrics": counts_of(3, sides=("relation",)).metrics()}},
        "members": {"fused": {"version": "ef01", "metrics": counts.metrics()}},
        "gate": {},
        "reliability": {},
        "alpha": None,
        "ablations": {"text_only": {"version": "abcd", "metrics": counts.metrics()}},
        "histogram": {side: histogram.tolist() for side in counts.tables},
        "timings": {},
        "history": [{"epoch": 0.0, "train.loss": 2.0, "valid.both.realistic.filtered.full.mrr": 0.2}],
        **other,
    }


def test_links_have_a_table_where_they_were_held_against_pairs_without_one() -> None:
    counts = counts_of(3)
    report = report_with(counts, ["a", "b", "c"])
    assert "Links against" not in render_html(report, {})
    figures = {"test.auc.uniform": 0.9123, "test.ap.uniform": 0.8, "test.auc.hard": 0.7123, "test.ap.hard": 0.6}
    page = render_html({**report, "metrics": report["metrics"] | figures, "link_negatives": 5}, {})
    table = page.split("Links against")[1].split("</table>")[0]
    assert "auc hard" in table and "0.9123" in table and "0.7123" in table and "fused" not in table


def test_the_time_of_training_has_a_table_and_a_bar_a_model() -> None:
    row = {"part": "epoch 1", "ranks": 1, "wall": [4.0] * 3, "ahead": {"sampling": [0.5] * 3}, "calls": {"forward": 2}}
    row |= {"seconds": {"forward": [3.0] * 3, "other": [1.0] * 3}, "counts": {"edges": 1200}}
    two = {**row, "ranks": 2, "wall": [4.0, 5.0, 6.0], "seconds": {"exchange": [0.0, 2.0, 4.0], "forward": [3.0] * 3}}
    found = {"fused": total([row, row]), "paths": total([two])}
    assert columns(found) == ["forward", "exchange", "other"]
    report = report_with(counts_of(3), ["a", "b", "c"])
    assert "Where the time" not in render_html(report, all_plots(report))
    report["timings"] = found
    plots = all_plots(report)
    page = render_html(report, plots)
    table = page.split("Where the time of training went")[1].split("<h2>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in re.findall(r"<tr.*?</tr>", table)]
    assert ["fused", "8.0", "6.0", "0.0", "2.0", "1.0"] in rows and ["paths", "5.0", "3.0", "2.0", "0.0", "0.5"] in rows
    assert any(cells[1:4] == ["4.0&ndash;6.0", "3.0&ndash;3.0", "0.0&ndash;4.0"] for cells in rows if len(cells) > 3)
    assert "2,400 edges" in table
    assert all(f">{name}<" in plots["timings"] for name in ("forward", "exchange", "other", "fused (8 s)"))


def test_the_page_is_self_contained_escaped_and_shows_every_slice() -> None:
    names = [NASTY, "is_a", "part_of"]
    report = report_with(counts_of(3), names)
    plots = all_plots(report)
    assert set(plots) == {"comparison", "ranks", "cardinality", "relations", "training"}
    page = render_html(report, plots)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]+"|<!--.*?-->|<metadata>.*?</metadata>', "", page, flags=re.S)
    assert not re.search(r'(?:src|href)="(?!#)', without_namespaces)
    for text in (
        "is_a",
        "part_of",
        "1-N",
        "unseen",
        "pessimistic",
        "marginals",
        "text only",
        "train, valid, test",
    ):
        assert text in page, text
    mrr = report["metrics"]["test.both.realistic.filtered.full.mrr"]
    assert format_metric(mrr) in page
    ids = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_plots_are_whole_xml_follow_the_page_and_are_the_same_each_time() -> None:
    report = report_with(counts_of(60), [f"r{i}" for i in range(60)])
    plots = all_plots(report)
    assert plots == all_plots(report)
    for svg in plots.values():
        ElementTree.fromstring(svg)
        assert "var(--" in svg
    assert len(re.findall(r">r\d+ \(\d+\)<", plots["relations"])) == 40  # the most frequent ones


def test_the_page_does_without_what_is_not_there() -> None:
    counts = counts_of(2, sides=("relation",), strata=False)
    report = report_with(counts, ["a", "b"], baselines={}, ablations={}, history=[])
    plots = all_plots(report)
    assert set(plots) == {"comparison", "ranks", "relations"}
    page = render_html(report, plots)
    assert "MRR, relation" in page
    assert "Training" not in page


def test_ablations_side_by_side() -> None:
    key = "test.both.realistic.filtered.full."
    text = render_ablations(
        {
            "full": {key + "mrr": 0.5, key + "hits@1": 0.4, key + "hits@3": 0.5, key + "hits@10": 0.6},
            "text_only": {
                key + "mrr": 0.45,
                key + "hits@1": 0.41,
                key + "hits@3": 0.45,
                key + "hits@10": 0.5,
            },
            "graph_only": {},
        }
    )
    lines = text.splitlines()
    assert lines[0] == "test.both.realistic.filtered.full"
    assert lines[1].split() == ["mrr", "hits@1", "hits@3", "hits@10"]
    assert lines[2].split() == ["full", "0.5000*", "0.4000", "0.5000*", "0.6000*"]
    assert lines[3].split() == ["text_only", "0.4500", "0.4100*", "0.4500", "0.5000"]
    assert lines[4].split() == ["graph_only", "-", "-", "-", "-"]
    assert render_ablations({}) == ""


def test_numbers_as_people_read_them() -> None:
    assert format_metric(0.51234) == "0.5123"
    assert format_metric(12345.0, "count") == "12,345"
    assert format_metric(1234.56, "mr") == "1,234.6"
    assert format_metric(None) == "\N{EN DASH}"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("tasks=[]", "tasks"),
        ("tasks=[tail, tail]", "tasks"),
        ("tasks=[tials]", "tasks"),
        ("split=train", "split"),
        ("workers=0", "workers"),
        ("batch_size=-1", "batch_size"),
        ("score_memory_mb=0", "score_memory_mb"),
        ("batchsize=3", "batch_size"),
    ],
)
def test_what_the_configuration_refuses(tmp_path: Path, override: str, key: str) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text("split: valid\ntasks: [tail, relation]\n")
    config = load_config(EvaluateConfig, str(path))
    assert (config.split, config.tasks) == ("valid", ("tail", "relation"))
    with pytest.raises(ConfigError, match=key):
        load_config(EvaluateConfig, str(path), [override])
