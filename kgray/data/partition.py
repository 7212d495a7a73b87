"""Partitions: contiguous ranges of dense entity ids of near-equal size, free of the number of workers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kgray.config import configuration, option
from kgray.errors import ConfigError
from kgray.graph.config import StoreConfig


@configuration
class GraphConfig(StoreConfig):
    """How the graph is laid out on disk, and how training reaches it."""

    partitions: int = option(4, "Parts the entities (and the triples, by their head) are stored in.")

    def __post_init__(self) -> None:
        StoreConfig.__post_init__(self)
        if not 1 <= self.partitions <= 65536:
            raise ConfigError("partitions", self.partitions, "a number of parts from 1 to 65536")


def partition_ranges(entities: int, partitions: int) -> list[tuple[int, int]]:
    """``[start, end)`` of each partition; sizes differ by at most one, the larger ones first.

    Ids are dense in hash order (see dictionary.py), so equal ranges are also a random, balanced division of the
    graph.
    """
    base, rest = divmod(entities, partitions)
    bounds = [p * base + min(p, rest) for p in range(partitions + 1)]
    return list(pairwise(bounds))


def partition_of(ids: npt.NDArray[np.int64], ranges: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """The partition of each id. ids: (n,) int64 in [0, entities). Returns (n,) int64."""
    ends = np.asarray([end for _, end in ranges], dtype=np.int64)
    return np.searchsorted(ends, ids, side="right").astype(np.int64)
