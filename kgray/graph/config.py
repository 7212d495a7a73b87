"""How training reaches the graph."""

from __future__ import annotations

from typing import Literal

from kgray.config import configuration, option
from kgray.errors import ConfigError
from kgray.graph.store import AHEAD


@configuration
class StoreConfig:
    """Where the training graph lies while a model is trained; it changes no result."""

    store: Literal["resident", "partitioned"] = option(
        "resident",
        "resident: the whole graph on every node, mapped once for all its workers (under KGRAY_CACHE); partitioned: "
        "a Ray actor a partition holds its part, wherever in the cluster it has room.",
    )
    replicas: int = option(1, "partitioned: actors a partition, so that one may be lost without a wait.")
    cache_mib: int = option(
        64, "partitioned: MiB that each worker may fill with the rows of the busiest entities; 0 keeps none."
    )
    prefetch: int = option(AHEAD, "Batches sampled ahead, while the model computes.")
    patience_s: float = option(
        120.0, "partitioned: seconds a partition may be out of reach, being restarted, before training gives up."
    )

    def __post_init__(self) -> None:
        for key in ("replicas", "prefetch"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "a number of 1 or more")
        if self.cache_mib < 0:
            raise ConfigError("cache_mib", self.cache_mib, "a number of MiB, 0 or more")
        if self.patience_s <= 0:
            raise ConfigError("patience_s", self.patience_s, "a number of seconds above 0")
