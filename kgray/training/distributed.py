"""Training on Ray Train: workers that read artifacts, run the one loop, and resume from the last checkpoint.

The run's name is the version of the model it will become, so the same recipe goes on where it stopped, whoever was
killed, and another recipe can never pick up its checkpoints.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kgray.artifact import Artifact, Draft, Recipe, Store
from kgray.artifact.filesystem import is_local, resolve
from kgray.config import to_dict
from kgray.errors import GraphStoreError, TrainingError, UserError
from kgray.graph.config import StoreConfig
from kgray.machine import local_cores
from kgray.runtime import cluster_cpus, cluster_gpus, worker_progress
from kgray.text.config import TextConfig
from kgray.text.places import EncoderPlace, local_place
from kgray.training.config import TrainConfig
from kgray.training.families import TrainableConfig, family_of
from kgray.training.stores import Access, reaching
from kgray.training.variations import Cycles, Lesson, Snapshot, Variation, snapshot_file

if TYPE_CHECKING:
    from kgray.graph.graph import Graph
    from kgray.training.loop import Fit
    from kgray.training.worker import Worker

log = logging.getLogger(__name__)

FORMAT = 2  # 2: decoders of the fused model are stored with its states
OnMetrics = Callable[[int, Mapping[str, float]], None]
_RUNS = "train"
_NOT_IDENTITY = ("device", "cpus_per_worker", "max_failures", "checkpoint_steps")


@dataclass(frozen=True)
class Job:
    """What every worker is told; small, as it travels to each of them.

    vectors: the artifact the model reads, if any; text: what an encoder that learns itself reads, and where it lies.
    access: how it reaches the graph, set where the job is run.
    """

    draft: Draft
    graph: Artifact
    vectors: Artifact | None
    model: TrainableConfig
    train: TrainConfig
    info: Mapping[str, Any]
    text: tuple[TextConfig, EncoderPlace] | None = None
    variation: Variation | None = None
    access: Access | None = None


def train_recipe(
    store: Store,
    model: TrainableConfig,
    train: TrainConfig,
    graph: Artifact,
    vectors: Artifact | None,
    variation: Variation | None = None,
) -> Recipe:
    """What a ``model`` artifact depends on; the number of workers counts, as it sets the global batch."""
    inputs = [graph] if vectors is None else [graph, vectors]
    config = {family_of(model).section: to_dict(model), "train": identity(train)}
    if variation is not None:
        inputs += variation.sources
        config |= variation.told
    return Recipe("model", FORMAT, tuple(one.source for one in inputs), config)


def identity(train: TrainConfig) -> dict[str, Any]:
    """What of it decides the weights."""
    return {k: v for k, v in to_dict(train).items() if k not in _NOT_IDENTITY}


def train(
    draft: Draft,
    store: Store,
    model: TrainableConfig,
    train: TrainConfig,
    graph: Artifact,
    vectors: Artifact | None,
    variation: Variation | None = None,
    *,
    on_metrics: OnMetrics | None = None,
    reach: StoreConfig | None = None,
) -> dict[str, Any]:
    """Train on the connected Ray cluster and write the ``model`` artifact; returns its counts.

    on_metrics: called with (epoch, metrics) after every report, in Ray Train's controller: it must be picklable.
    reach: where the graph lies meanwhile; changes no result.

    Raises TrainingError for a loss that is not finite or a cluster too small, ConfigError for a model that does not
    fit the data, and Ray's TrainingFailedError when workers fail more than ``train.max_failures`` times.
    """
    info = {"train": to_dict(train), "vectors": None if vectors is None else vectors.version}
    job = Job(draft, graph, vectors, model, train, info, variation=variation)
    run = train_recipe(store, model, train, graph, vectors, variation).version
    return run_workers(store, run, job, on_metrics, reach)


def run_workers(
    store: Store, run: str, job: Job, on_metrics: OnMetrics | None, reach: StoreConfig | None = None
) -> dict[str, Any]:
    """Do a job on the connected Ray cluster; returns the counts of the artifact written. run: a name that only the same
    job has, by which it finds its checkpoints. Raises as :func:`train` does."""
    with reaching(store, job.graph, reach or StoreConfig(), job.model, job.variation) as access:
        return _run_workers(store, run, replace(job, access=access), on_metrics)


def _run_workers(store: Store, run: str, job: Job, on_metrics: OnMetrics | None) -> dict[str, Any]:
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig
    from ray.train.torch import TorchTrainer

    train = job.train
    place = store.scratch(_RUNS)
    filesystem, path = (None, place) if is_local(place) else resolve(place)
    trainer = TorchTrainer(
        _loop,
        train_loop_config={"job": job},
        scaling_config=_scaling(train),
        run_config=RunConfig(
            name=run,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig("WARNING"),
            callbacks=[] if on_metrics is None else [_reporter(on_metrics)],
        ),
    )
    outcome = trainer.fit().return_value
    if "user_error" in outcome:
        # The run is over, and a changed configuration is another run: its checkpoints would never be read.
        raise outcome["user_error"]
    store.drop_scratch(f"{_RUNS}/{run}")
    return dict(outcome["counts"])


def _scaling(train: TrainConfig) -> Any:
    """Ray Train's scaling configuration; raises TrainingError when the cluster cannot hold the workers at once."""
    from ray.train import ScalingConfig

    cpus, gpus = cluster_cpus(), cluster_gpus()
    use_gpu = train.device == "cuda" or (train.device == "auto" and gpus >= train.workers)
    if use_gpu and gpus < train.workers:
        raise TrainingError(
            f"train.workers={train.workers} with train.device={train.device} needs {train.workers} GPUs, the cluster "
            f"has {gpus}: fewer workers, or train.device=cpu"
        )
    # One CPU stays free: Ray Data and the driver's own tasks would otherwise wait for ever.
    share = train.cpus_per_worker
    if share is None:
        share = max(0.5, float((cpus - 1) // train.workers))
    if share * train.workers > cpus:
        raise TrainingError(
            f"train.workers={train.workers} of {share:g} CPUs each need {share * train.workers:g}, the cluster has "
            f"{cpus}: fewer workers, or a smaller train.cpus_per_worker"
        )
    return ScalingConfig(num_workers=train.workers, use_gpu=use_gpu, resources_per_worker={"CPU": share})


def _reporter(on_metrics: OnMetrics) -> Any:
    from ray.train import UserCallback

    class Reporter(UserCallback):  # type: ignore[misc]
        """Runs in the controller, which outlives its workers: metrics have one writer."""

        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            row = {k: v for k, v in metrics[0].items() if isinstance(v, float)}
            if "step" not in row:
                on_metrics(int(row["epoch"]), row)

    return Reporter()


def _loop(config: dict[str, Any]) -> dict[str, Any]:
    """One worker of Ray Train."""
    import ray.train

    from kgray.training.worker import Worker

    class RayWorker(Worker):
        """Reports to Ray Train."""

        def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
            name = f"epoch-{int(metrics['epoch']):04d}-step-{int(metrics.get('step', 0)):08d}"
            kept = None if checkpoint is None else ray.train.Checkpoint.from_directory(str(checkpoint))
            ray.train.report({k: float(v) for k, v in metrics.items()}, checkpoint=kept, checkpoint_dir_name=name)

    job: Job = config["job"]
    _set_up_process()
    try:
        worker = RayWorker("cuda" if ray.train.torch.get_device().type == "cuda" else "cpu")
        worker.device = ray.train.torch.get_device()
        graph, read = _inputs(job, worker)
        done = _fit(job, graph, read, worker)
        if graph.store is not None and (told := graph.store.told()):
            worker.say("asked of the graph's owners: %s", told)
        counts = _write(job, done) if worker.rank == 0 else {}
    except GraphStoreError:
        raise  # the other workers wait for this one: Ray Train starts all of them again, from the last checkpoint
    except UserError as error:
        # A wrong configuration fails the same way on every worker and every attempt: returned, it is not retried.
        return {"user_error": error}
    return {"counts": counts}


def _fit(job: Job, graph: Graph, read: Any, worker: Worker) -> Fit:
    import ray.train
    from safetensors.torch import load_file

    from kgray.training.loop import Trainer, fit

    if isinstance(job.variation, Snapshot):
        weights = load_file(job.variation.training.local_path(job.variation.file))
        return Trainer(graph, read, job.model, job.train, worker).finish_with(weights)
    snapshots = job.variation.kept if isinstance(job.variation, Cycles) else 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return fit(graph, read, job.model, job.train, worker, snapshots=snapshots)
    with checkpoint.as_directory() as folder:
        return fit(graph, read, job.model, job.train, worker, resume=Path(folder), snapshots=snapshots)


def _inputs(job: Job, worker: Worker) -> tuple[Graph, Any]:
    from kgray.graph.graph import Graph
    from kgray.model.bundle import Bundle
    from kgray.text.tokens import read_texts
    from kgray.text.vectors import load_vectors
    from kgray.training.pseudo import pseudo_labels

    graph = Graph.load(job.graph) if job.access is None else job.access.open(worker.rank)
    if job.text is not None:
        text, place = job.text
        return graph, read_texts(job.graph, text, local_place(text, place).path)
    if isinstance(job.variation, Lesson):
        labels = None
        if worker.rank == 0:  # decided once: machines that round differently would not ask for the same triples
            teacher = Bundle.load(job.variation.teacher)
            labels = pseudo_labels(teacher.scorer, graph, job.variation.pseudo)
        graph = graph.with_pseudo(worker.gather(labels)[0])
    return graph, None if job.vectors is None else load_vectors(job.vectors)


def _write(job: Job, done: Fit) -> dict[str, Any]:
    from safetensors.torch import save_file

    from kgray.graph.graph import Graph

    graph = Graph.load(job.graph)  # with names and the facts of all splits, which a model answers with
    info = {
        **job.info,
        "metrics": {done.metric: done.best},
        "best_epoch": done.best_epoch,
        "epochs": sum(row["epoch"] >= 0 for row in done.history),
    }
    folder = job.draft.local_dir()
    done.task.write(folder, done.scorer, graph, done.history, info)
    for number, weights in enumerate(done.snapshots, start=1):
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / snapshot_file(number))
    job.draft.upload_local()
    job.draft.drop_local()
    return {
        "entities": graph.num_entities,
        "relations": graph.num_relations,
        "parameters": sum(p.numel() for p in done.model.parameters()),
        "epochs": sum(row["epoch"] >= 0 for row in done.history),
        "best_epoch": done.best_epoch,
        done.metric: done.best,
    }


def _set_up_process() -> None:
    """Threads for the CPUs this worker reserved, and the loop's progress on stderr, which Ray shows the driver."""
    import ray
    import ray.train
    import torch

    reserved = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    here = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(max(1, min(int(reserved), local_cores() // here)))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    worker_progress()
