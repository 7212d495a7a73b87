"""The predict job: files of queries and a model become a ``predictions`` artifact, answered in shards by Ray actors.

answers.parquet/part-00000.parquet ...   the answers (columns: see answering.py), in the order of the queries
quarantine.jsonl   rows that could not be answered, where predict.on_bad_row=skip sets them aside

First every row is read, understood and written away as dense ids; what is wrong with any of them is told before
anything is scored. Then shards are answered. Both leave notes under ``runs/`` when they are done, so that a run that
broke goes on where it was. The driver sees file metadata, notes and counts, never queries or answers.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from kgray.artifact import Artifact, Draft, Recipe, Store
from kgray.artifact.filesystem import copy_file, list_files, read_bytes, resolve
from kgray.config import to_dict
from kgray.data.bad_rows import judge, kept_details, merge
from kgray.data.inputs import Plan, Sizes, hashed
from kgray.data.output import part_name, quarantine
from kgray.data.tasks import run_all
from kgray.errors import ArtifactError, ConfigError, DataError
from kgray.machine import local_cores
from kgray.prediction.config import PredictConfig
from kgray.prediction.holders import held
from kgray.prediction.output import ANSWERS
from kgray.prediction.pool import Pool
from kgray.prediction.queries import TASKS, QueriesRead, note_name, plan_queries, query_files, read_queries
from kgray.prediction.shards import PredictTask, Shard, ShardDone, finished
from kgray.runtime import cluster_cpus, ray_session

log = logging.getLogger(__name__)

KIND = "predictions"
FORMAT = 1
_DECIDES = (
    *("top_k", "filter_known", "unknown", "columns", "header", "on_bad_row", "max_bad_rows"),
    "shard_rows",  # a part of the answers each
)
_SAY_EVERY_S = 5.0
_COPIES_AT_ONCE = 8


def predict_recipe(store: Store, config: PredictConfig, model: Artifact) -> Recipe:
    """What decides predictions: the model, the bytes of the files and how they are read, what is asked of each query.

    Raises DataError: missing files, names that do not tell a format; ConfigError where no queries are given.
    """
    files = query_files(config)
    told = to_dict(config)
    how = {key: told[key] for key in _DECIDES} | {"files": [[file.format, file.compression] for file in files]}
    return Recipe(KIND, FORMAT, (model.source, *hashed(store, files)), how)


def scratch_name(version: str) -> str:
    """Where a run towards these predictions leaves what it has done."""
    return f"predict-{version}"


def predict(
    draft: Draft, store: Store, config: PredictConfig, model: Artifact, sizes: Sizes | None = None
) -> dict[str, int]:
    """Write the files of a ``predictions`` artifact; returns its counts. Starts or joins Ray where needed.

    Raises DataError naming file and line: rows that cannot be answered beyond the policy, files that cannot be read;
    NonFiniteError for a score that is no number; ClusterError where workers keep dying of one shard.
    """
    if model.kind != "model":
        raise ArtifactError(f"{model.uri} is a {model.kind}, not a model")
    recipe = predict_recipe(store, config, model)
    out = Draft(store.scratch(scratch_name(recipe.version)))
    with ray_session() as session:
        workers = _workers(config, session.embedded)
        read = _read(out, config, model, plan_queries(config, sizes or Sizes()))
        paths = [file.path for file in query_files(config)]
        bad = merge([one.bad for one in read], kept_details(config))
        try:
            judge(bad, config, paths, "predict")
        except DataError:
            store.drop_scratch(scratch_name(recipe.version))  # other rows will be other predictions
            raise
        shards = _shards(read)
        if not shards:
            raise DataError(f"{', '.join(paths[:3])}: no row can be answered ({bad.count} bad rows); expected queries")
        with held(model, config.score_memory_mb << 18, config.holders) as holders:
            task = PredictTask(config, model, tuple(paths), recipe.version, out, holders)
            done = _answer(task, shards, workers)
    _publish(draft, out, [done[shard].file for shard in shards])
    draft.write_bytes("quarantine.jsonl", quarantine(bad.rows, paths))
    tasks = {f"asked_{name}": sum(one.tasks[n] for one in read) for n, name in enumerate(TASKS)}
    return {
        "queries": sum(one.queries for one in done.values()),
        "answers": sum(one.answers for one in done.values()),
        **tasks,
        "scored": sum(one.asked for one in done.values()),
        "quarantined": bad.count,
        "shards": len(shards),
    }


def _workers(config: PredictConfig, embedded: bool) -> int:
    """Processes that answer. Holders have a CPU each too, and workers wait for all of them."""
    free = cluster_cpus() - config.holders
    if free < 1:
        raise ConfigError("predict.holders", config.holders, f"less than the {cluster_cpus()} CPUs of the cluster")
    workers = config.workers or (local_cores() if embedded else cluster_cpus())
    return min(workers, free) if config.holders else workers


def _read(out: Draft, config: PredictConfig, model: Artifact, plan: Plan) -> list[QueriesRead]:
    """Every group of chunks as shards of ids, those that are there already not read again."""
    filesystem, path = resolve(out.uri)
    there = list_files(filesystem, path)
    found: dict[int, QueriesRead] = {}
    for group in range(len(plan.groups)):
        if note_name(group) in there and (one := _note(filesystem, out.path_of(note_name(group)))) is not None:
            found[group] = one
    missing = [group for group in range(len(plan.groups)) if group not in found]
    if not missing:
        return [found[group] for group in range(len(plan.groups))]
    (about,) = run_all("open the model", describe_model, [(model,)])
    if config.top_k > about["entities"]:
        told = "predict: top_k=%d is more than the %d entities: a query gets them all"
        log.warning(told, config.top_k, about["entities"])
    arguments = [(out, config, model, about["tasks"], group, plan.groups[group]) for group in missing]
    found |= dict(zip(missing, run_all("read queries", read_queries, arguments), strict=True))
    return [found[group] for group in range(len(plan.groups))]


def _note(filesystem: Any, path: str) -> QueriesRead | None:
    try:
        return QueriesRead.from_json(json.loads(read_bytes(filesystem, path)))
    except (ValueError, KeyError, TypeError):
        return None  # the run died while it wrote the note


def describe_model(model: Artifact) -> dict[str, Any]:
    """What reading needs of a model: its number of entities, and the tasks it can do."""
    from kgray.model.bundle import Bundle

    bundle = Bundle.load(model)
    return {"entities": bundle.num_entities, "tasks": tuple(bundle.tasks)}


def _shards(read: Sequence[QueriesRead]) -> list[Shard]:
    shards, first = [], 0
    for group, one in enumerate(read):
        for number, rows in enumerate(one.shards):
            shards.append(Shard(group, number, first, rows))
            first += rows
    return shards


def _answer(task: PredictTask, shards: Sequence[Shard], workers: int) -> dict[Shard, ShardDone]:
    """All shards answered; says how far it is."""
    from kgray.prediction.answering import Predictions  # torch, which a look at the recipe does without

    done = _answered_before(task.out, shards)
    total = sum(shard.rows for shard in shards)
    before = finished_rows = sum(one.queries for one in done.values())
    if done:
        log.info("predict: %d of %d queries were answered by an interrupted run", before, total)
    missing = [shard for shard in shards if shard not in done]
    begun = said = time.monotonic()
    with Pool[Shard, ShardDone](partial(Predictions, task), min(workers, max(len(missing), 1))) as pool:
        for shard, one in pool.run(missing):
            done[shard] = one
            finished_rows += one.queries
            now = time.monotonic()
            if now - said >= _SAY_EVERY_S or finished_rows == total:
                said, rate = now, (finished_rows - before) / max(now - begun, 1e-9)
                left = (total - finished_rows) / rate
                log.info("predict: %d of %d queries, %.0f a second, %.0f s left", finished_rows, total, rate, left)
    return done


def _answered_before(out: Draft, shards: Sequence[Shard]) -> dict[Shard, ShardDone]:
    filesystem, path = resolve(out.uri)
    return finished(out, shards, list_files(filesystem, path))


def _publish(draft: Draft, out: Draft, files: Sequence[str]) -> None:
    """The answers of all shards as parts of the artifact; the scratch folder keeps its own until that is published."""

    def place(number: int, file: str) -> None:
        copy_file(draft.fs, out.path_of(file), draft.path_of(f"{ANSWERS}/{part_name(number)}"))

    with ThreadPoolExecutor(_COPIES_AT_ONCE) as threads:
        list(threads.map(place, range(len(files)), files))

