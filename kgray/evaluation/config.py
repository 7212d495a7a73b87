"""What the ``evaluate`` section of a configuration may say."""

from __future__ import annotations

from typing import Literal

from kgray.config import configuration, option
from kgray.errors import ConfigError


@configuration
class EvaluateConfig:
    """How a model is measured."""

    split: Literal["valid", "test"] = option(
        "test", "Which triples are ranked. valid is filtered by train and valid, test by all three."
    )
    tasks: tuple[Literal["tail", "head", "relation"], ...] = option(
        ("tail", "head", "relation"), "What is asked of each triple; 'both' is the mean over tail and head."
    )
    baselines: bool = option(True, "Whether frequency, reverse-edge and marginal baselines are ranked too.")
    ranks: bool = option(True, "Whether ranks.parquet is written, one row a query.")
    ablations: bool = option(False, "Whether text-only and graph-only variants are trained and shown beside the model.")
    workers: int | None = option(
        None, "Ray tasks at a time. Null: the cores of this machine, or the CPUs of the cluster joined."
    )
    batch_size: int | None = option(None, "Queries scored at once. Null: as many as score_memory_mb holds.")
    score_memory_mb: int = option(64, "MiB of float32 scores a worker holds at once.")

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ConfigError("tasks", list(self.tasks), "at least one of tail, head, relation, each once")
        for key in ("workers", "batch_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(key, value, "null or a positive number")
        if self.score_memory_mb < 1:
            raise ConfigError("score_memory_mb", self.score_memory_mb, "a positive number of MiB")
