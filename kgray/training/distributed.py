"""Training on Ray Train: workers that read artifacts, run the one loop, and resume from the last checkpoint.

The run's name is the version of the model it will become, so the same recipe goes on where it stopped, whoever was
killed, and another recipe can never pick up its checkpoints.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from kgray.artifact import Artifact, Draft, Recipe, Store
from kgray.artifact.filesystem import is_local, join, local_copy, resolve
from kgray.config import to_dict
from kgray.errors import GraphStoreError, OutOfMemoryError, TrainingError, UserError
from kgray.graph.config import StoreConfig
from kgray.machine import local_cores
from kgray.runtime import cluster_cpus, cluster_gpus, cluster_rooms, remote_errors, worker_progress
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
PHASES_FILE = "phases.json"
"""Where a trained artifact tells what its time went into. It is how a run went, not what it computed: not a word of the
version, and readers do without it."""

_RUNS = "train"
_NOT_IDENTITY = ("device", "cpus_per_worker", "max_failures", "checkpoint_steps", "least_workers", "preflight")


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
    decides = {k: v for k, v in to_dict(train).items() if k not in _NOT_IDENTITY}
    # Of several workers' shares each draws its dropout by its own number, not as the stream of whoever computes it.
    return decides | ({"dropout": "by share"} if train.workers > 1 else {})


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
    reach = reach or StoreConfig()
    scaling = _scaling(job.train)
    preflight(store, job, scaling.resources_per_worker["CPU"], reach)
    with reaching(store, job.graph, reach, job.model, job.variation) as access:
        return _run_workers(store, run, replace(job, access=access), scaling, on_metrics)


def _run_workers(store: Store, run: str, job: Job, scaling: Any, on_metrics: OnMetrics | None) -> dict[str, Any]:
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from kgray.training.ray_worker import Halving, reporter

    train = job.train
    place = store.scratch(_RUNS)
    filesystem, path = (None, place) if is_local(place) else resolve(place)
    halving = Halving(join(place, run))
    halved = halving.reason() is not None

    def attempt() -> dict[str, Any]:
        trainer = TorchTrainer(
            _loop,
            train_loop_config={"job": job, "run": join(place, run)},
            scaling_config=scaling,
            run_config=RunConfig(
                name=run,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=train.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                logging_config=LoggingConfig("WARNING"),
                callbacks=[reporter(on_metrics, halving)],
            ),
        )
        return dict(trainer.fit().return_value)

    try:
        outcome = attempt()
    except TrainingFailedError:
        # Where no failure is survived, Ray has not begun anew with the halved batch.
        if train.max_failures or halved or halving.reason() is None:
            raise
        outcome = attempt()
    if "user_error" in outcome:
        # The run is over, and a changed configuration is another run: its checkpoints would never be read.
        raise outcome["user_error"]
    store.drop_scratch(f"{_RUNS}/{run}")
    return dict(outcome["counts"])


def preflight(store: Store, job: Job, share: float, reach: StoreConfig) -> Mapping[str, float]:
    """Tell what the job needs against what the cluster has; its numbers. share: CPUs a worker reserves. reach: how
    workers reach the graph.

    Raises TrainingError where it does not fit, unless ``train.preflight`` is force; nothing happens where it is off.
    """
    from kgray.training.estimate import estimate
    from kgray.training.preflight import check, disks, sizes_of

    if job.train.preflight == "off" or isinstance(job.variation, Snapshot):
        return {}
    snapshots = job.variation.kept if isinstance(job.variation, Cycles) else 0
    needs = estimate(sizes_of(job.graph, job.vectors, job.text), job.model, job.train, snapshots, reach)
    places = disks(needs, store.root)
    check(needs, job.train, share, cluster_rooms(), places)
    disk = float(sum(place.needs for place in places))
    memory = {f"memory.{need.name}": float(need.bytes) for need in needs.memory}
    return {**memory, "memory.worker": float(needs.total), "disk": disk}


def rehearse(
    store: Store,
    model: TrainableConfig,
    train: TrainConfig,
    graph: Artifact,
    vectors: Artifact | None,
    reach: StoreConfig,
) -> Mapping[str, float]:
    """A preflight and nothing more: what training would need, and, from a few steps in a Ray task, how long it would
    take; the numbers. The steps are over the graph mapped whole, whatever ``reach`` is.

    Raises as :func:`preflight` does, and what training would before its first step."""
    import ray

    job = Job(Draft(join(store.root, ".tmp", "rehearsal")), graph, vectors, model, train, {})
    scaling = _scaling(train)
    share = scaling.resources_per_worker["CPU"]
    needs = preflight(store, job, share, reach)
    task = ray.remote(num_cpus=share, num_gpus=int(scaling.use_gpu))(_rehearse)
    with remote_errors():
        seconds, said = ray.get(task.remote(job, scaling.num_workers, "cuda" if scaling.use_gpu else "cpu"))
    log.info("preflight: %s", said)
    return {**needs, **({} if seconds is None else {"seconds_a_step": seconds})}


def _rehearse(job: Job, workers: int, device: Literal["cuda", "cpu"]) -> tuple[float | None, str]:
    import ray
    import torch

    from kgray.training.loop import Trainer
    from kgray.training.probe import seconds_a_step, told
    from kgray.training.worker import Worker

    worker_progress()
    torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    worker = Worker(device)
    trainer = Trainer(*_inputs(job, worker), job.model, job.train, worker)
    # As many shares of a step as the busiest of so many workers has.
    trainer.batches.shares = list(trainer.batches.shares)[: -(-trainer.batches.world // workers)]
    seconds = seconds_a_step(trainer)
    return seconds, "the loss of a first step is not finite" if seconds is None else told(trainer, seconds)


def _scaling(train: TrainConfig) -> Any:
    """Ray Train's scaling configuration; raises TrainingError when the cluster cannot hold the workers at once."""
    from ray.train import ScalingConfig

    cpus, gpus = cluster_cpus(), cluster_gpus()
    least = train.least_workers or train.workers
    use_gpu = train.device == "cuda" or (train.device == "auto" and gpus >= least)
    if use_gpu and gpus < least:
        raise TrainingError(
            f"train.workers={train.workers} with train.device={train.device} needs {train.workers} GPUs, the cluster "
            f"has {gpus}: fewer workers, or train.device=cpu"
        )
    # One CPU stays free: Ray Data and the driver's own tasks would otherwise wait for ever.
    share = train.cpus_per_worker
    if share is None:
        share = max(0.5, float((cpus - 1) // train.workers))
    fitting = min(train.workers, int(cpus // share), gpus if use_gpu else train.workers)
    if fitting < least:
        raise TrainingError(
            f"train.workers={train.workers} of {share:g} CPUs each need {share * train.workers:g}, the cluster has "
            f"{cpus}: fewer workers, or a smaller train.cpus_per_worker"
        )
    if fitting < train.workers:
        log.warning("the cluster holds %d of train.workers=%d: they compute the shares of all", fitting, train.workers)
    return ScalingConfig(num_workers=fitting, use_gpu=use_gpu, resources_per_worker={"CPU": share})


def _loop(config: dict[str, Any]) -> dict[str, Any]:
    """One worker of Ray Train."""
    from kgray.training.ray_worker import RayWorker

    job: Job = config["job"]
    _set_up_process()
    try:
        worker = RayWorker(config["run"].rpartition("/")[2])
        with worker.watch.running():
            graph, read = worker.together(lambda: _inputs(job, worker))
            done = _fit(job, graph, read, worker, config["run"])
            if graph.store is not None and (told := graph.store.told()):
                worker.say("asked of the graph's owners: %s", told)
            counts = _write(job, done) if worker.rank == 0 else {}
    except GraphStoreError:
        raise  # the other workers wait for this one: Ray Train starts all of them again, from the last checkpoint
    except OutOfMemoryError as error:
        if worker.world > 1:
            raise  # the others wait for this worker, and end with it
        return {"user_error": error}
    except UserError as error:
        # A wrong configuration fails the same way on every worker and every attempt: returned, it is not retried.
        return {"user_error": error}
    return {"counts": counts}


def _fit(job: Job, graph: Graph, read: Any, worker: Worker, run: str) -> Fit:
    import ray.train
    from safetensors.torch import load_file

    from kgray.training.checkpoint import newest_sound
    from kgray.training.loop import Trainer, fit
    from kgray.training.ray_worker import Halving

    if isinstance(job.variation, Snapshot):
        weights = load_file(job.variation.training.local_path(job.variation.file))
        return Trainer(graph, read, job.model, job.train, worker).finish_with(weights)
    snapshots = job.variation.kept if isinstance(job.variation, Cycles) else 0
    filesystem, path = resolve(run)
    found: Any = None
    if worker.rank == 0:  # one decides, as all must go on from the same one
        try:
            finished = ray.train.get_checkpoint() is not None
            found = newest_sound(filesystem, path, worker.say, expected=finished), Halving(run).reason()
        except TrainingError as error:
            found = error
    found = worker.gather(found)[0]
    if isinstance(found, TrainingError):
        raise found
    checkpoint, reason = found
    parts = 1 if reason is None else 2
    if reason is not None:
        worker.say("memory had run out (%s): batches of %d are computed as two halves", reason, job.train.batch_size)
    if checkpoint is None:
        return fit(graph, read, job.model, job.train, worker, snapshots=snapshots, parts=parts)
    with local_copy(filesystem, checkpoint) as folder:
        return fit(graph, read, job.model, job.train, worker, resume=folder, snapshots=snapshots, parts=parts)


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
        labels: Any = None
        if worker.rank == 0:  # decided once: machines that round differently would not ask for the same triples
            try:
                teacher = Bundle.load(job.variation.teacher)
                labels = pseudo_labels(teacher.scorer, graph, job.variation.pseudo)
            except UserError as error:
                labels = error
        labels = worker.gather(labels)[0]
        if isinstance(labels, UserError):
            raise labels
        graph = graph.with_pseudo(labels)
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
        **({"batch_parts": done.parts} if done.parts > 1 else {}),
    }
    folder = job.draft.local_dir()
    done.task.write(folder, done.scorer, graph, done.history, info)
    (folder / PHASES_FILE).write_text(json.dumps(list(done.phases), indent=1) + "\n")
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
