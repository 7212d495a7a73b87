"""The evaluate job: a model and a graph become a ``report`` artifact, ranked in shards as Ray tasks.

The driver sees file metadata and merged counts, never triples or ranks. The filter, the strata and the fitted
baselines are made once and lie in Ray's object store, where the workers of a node share them.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kgray.artifact import Artifact, Draft, Recipe, Store
from kgray.errors import ArtifactError
from kgray.evaluation.config import EvaluateConfig
from kgray.machine import local_cores
from kgray.runtime import cluster_cpus, ray_session, remote_errors

if TYPE_CHECKING:
    from kgray.evaluation.shards import Measured, Piece

log = logging.getLogger(__name__)

FORMAT = 3  # 2: members of an ensemble and calibration are measured; 3: where the time of training went
_SHARDS_A_WORKER = 4  # so that a slow worker holds up the end by a quarter of its share, not by all of it
_LOG_SECONDS = 10.0


def evaluate_recipe(
    store: Store,
    config: EvaluateConfig,
    model: Artifact,
    graph: Artifact,
    ablations: Mapping[str, Artifact] | None = None,
) -> Recipe:
    """The report's recipe. ``ablations``: reports of variants to be shown beside this model, by name."""
    return Recipe(
        kind="report",
        format=FORMAT,
        inputs=(model.source, graph.source, *(report.source for report in (ablations or {}).values())),
        config={
            "split": config.split,
            "tasks": list(config.tasks),
            "baselines": config.baselines,
            "ranks": config.ranks,
            "ablations": list(ablations or {}),
            **({"link_negatives": config.link_negatives} if config.link_negatives else {}),
            # Members' metrics depend on whether rows were held whole.
            **({"ranged": config.score_memory_mb} if config.ranged else {}),
        },
    )


def evaluate(
    draft: Draft,
    config: EvaluateConfig,
    model: Artifact,
    graph: Artifact,
    ablations: Mapping[str, Artifact] | None = None,
) -> dict[str, float]:
    """Rank a split and write metrics.json, ranks.parquet, report.html and its plots.

    Returns the manifest's counts: ``test.both.realistic.filtered.full.mrr`` and so on of the model, the same
    under ``baseline.<name>.`` of each baseline and ``member.<name>.`` of each member of an ensemble, and of a
    calibrated model ``test.both.calibration.ece`` and so on; ``test.auc.uniform`` and so on of each where links are
    held against pairs without one. Starts or joins Ray where the process is not
    connected yet.

    Raises DataError when the split is empty, NonFiniteError naming the first query with such a score, and
    ArtifactError when model and graph do not belong together.
    """
    # These import torch (seconds), which evaluate_recipe, asked even when all is up to date, does without.
    from kgray.evaluation.reliability import metrics_of
    from kgray.evaluation.report import report_of, write_report
    from kgray.evaluation.shards import plan

    for name, artifact in (ablations or {}).items():
        if artifact.kind != "report":
            raise ArtifactError(f"ablation {name}: {artifact.uri} is a {artifact.kind}, not a report")
    with ray_session() as session:
        workers = config.workers or (local_cores() if session.embedded else cluster_cpus())
        parts = plan(graph, config.split, workers * _SHARDS_A_WORKER)
        started = time.monotonic()
        measured = _measure_all(draft, config, model, graph, parts, workers)
        seconds = time.monotonic() - started
    write_report(draft, report_of(config, model, graph, measured, ablations or {}, seconds))
    counts = measured.model.metrics() | metrics_of(measured.reliability, config.split)
    for kind, found in (("baseline", measured.baselines), ("member", measured.members)):
        for name, one in found.items():
            counts |= {f"{kind}.{name}.{key}": value for key, value in one.metrics().items()}
    for name, links in measured.links.items():
        counts |= {f"{name}.{key}".removeprefix("model."): v for key, v in links.metrics(config.split).items()}
    return counts


def _measure_all(
    draft: Draft,
    config: EvaluateConfig,
    model: Artifact,
    graph: Artifact,
    parts: list[list[Piece]],
    workers: int,
) -> Measured:
    """All shards, at most ``workers`` at a time, merged as they come."""
    import ray

    from kgray.evaluation.shards import measure, prepare

    remote_prepare = ray.remote(prepare)
    remote_measure = ray.remote(measure)
    prepared = remote_prepare.remote(graph, config)
    rows = [sum(piece.stop - piece.start for piece in part) for part in parts]
    waiting = list(enumerate(parts))
    running: dict[Any, int] = {}
    total: Measured | None = None
    finished, started, said = 0, time.monotonic(), 0.0
    with remote_errors(), _cancelled(running):
        while waiting or running:
            while waiting and len(running) < workers:
                number, part = waiting.pop(0)
                task = remote_measure.remote(draft, config, model, graph, prepared, part, number)
                running[task] = number
            done, _ = ray.wait(list(running), num_returns=1)
            for task in done:
                result: Measured = ray.get(task)
                total = result if total is None else total + result
                finished += rows[running.pop(task)]
            now = time.monotonic()
            if now - said > _LOG_SECONDS or not (waiting or running):
                said, rate = now, finished / max(now - started, 1e-9)
                log.info(
                    "evaluate: %d of %d %s triples, %.0f a second, %.0f s left",
                    *(finished, sum(rows), config.split, rate, (sum(rows) - finished) / rate),
                )
    if total is None:
        raise ValueError("no shards to evaluate")
    return total


@contextlib.contextmanager
def _cancelled(running: Mapping[Any, int]) -> Iterator[None]:
    """Tasks still ``running`` when something fails are not waited for."""
    import ray

    try:
        yield
    except Exception:
        for task in running:
            ray.cancel(task, force=False)
        raise
