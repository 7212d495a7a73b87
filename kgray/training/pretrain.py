"""The ``encoder`` artifact: the configured text encoder, trained on the training triples by the one loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kgray.artifact import Artifact, Draft, Recipe, Store
from kgray.config import to_dict
from kgray.graph.config import StoreConfig
from kgray.text.config import TextConfig
from kgray.text.embed import check_columns, place_of
from kgray.text.tuning_config import TuningConfig
from kgray.training.config import OptimiserConfig, TrainConfig
from kgray.training.distributed import Job, OnMetrics, identity, run_workers

KIND = "encoder"
FORMAT = 1
_DECIDES = ("pooling", "max_length", "template", "relation_template")


def pretrain_config(tuning: TuningConfig, train: TrainConfig) -> TrainConfig:
    """How the loop trains the encoder: as ``tuning`` says, where and how safely as ``train`` does.

    ``train.adversarial`` is of models with vectors of entities; an encoder has none to move.
    """
    return replace(
        train,
        epochs=tuning.epochs,
        batch_size=tuning.batch_size,
        accumulate=1,
        optimiser=OptimiserConfig(
            lr=tuning.lr, weight_decay=tuning.weight_decay, warmup=tuning.warmup, schedule="linear"
        ),
        adversarial=0.0,
        seed=tuning.seed,
        evaluate_every=1,
        patience=tuning.patience,
        valid_triples=tuning.valid_triples,
    )


def pretrain_recipe(
    store: Store, text: TextConfig, tuning: TuningConfig, train: TrainConfig, graph: Artifact
) -> Recipe:
    """What an ``encoder`` artifact depends on: the graph, the files of the encoder it begins as, how it learns.

    Raises EncoderError when that one cannot be found.
    """
    place = place_of(store, text)
    files = store.hash_files([f"{place.path}/{name}" for name, _ in place.files])
    config = {key: getattr(text, key) for key in _DECIDES}
    how = identity(pretrain_config(tuning, train))
    return Recipe(KIND, FORMAT, (graph.source, *files), {"text": config, "tuning": to_dict(tuning), "train": how})


def pretrain(
    draft: Draft,
    store: Store,
    text: TextConfig,
    tuning: TuningConfig,
    train: TrainConfig,
    graph: Artifact,
    reach: StoreConfig | None = None,
    *,
    on_metrics: OnMetrics | None = None,
) -> Mapping[str, Any]:
    """Train on the connected Ray cluster and write the ``encoder`` artifact; returns its counts. reach: as there.

    Raises what :func:`kgray.training.distributed.train` does; EncoderError, and ConfigError for a template or a mode
    that does not fit.
    """
    check_columns(text, graph)
    how = pretrain_config(tuning, train)
    job = Job(draft, graph, None, tuning, how, {"train": to_dict(how)}, (text, place_of(store, text)))
    return run_workers(store, pretrain_recipe(store, text, tuning, train, graph).version, job, on_metrics, reach)
