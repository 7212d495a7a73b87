"""Partitions: contiguous ranges of dense entity ids, free of worker counts, and the cells they are worked on in.

Which entities lie together is for ``graph.partitioner`` to say: ids are given partition by partition.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kgray.config import configuration, option
from kgray.errors import ConfigError
from kgray.graph.config import StoreConfig

MOST = 65536
"""Partitions, and cells: their numbers are of 16 bits."""

Partitioner = Literal["hash", "locality", "relation"]


@configuration
class GraphConfig(StoreConfig):
    """How the graph is laid out on disk, and how training reaches it."""

    partitions: int = option(4, "Parts the entities (and the triples, by their head) are stored in.")
    partitioner: Partitioner = option(
        "hash",
        "Which entities lie together: hash deals them out evenly; locality puts neighbours together, so that few "
        "triples cross (Fennel, restreamed); relation puts entities together that are heads of the same relations.",
    )
    slack: float = option(0.05, "locality, relation: share by which a partition may have more entities than the mean.")
    triple_slack: float = option(
        0.3, "locality, relation: the same of triples, as far as whole entities and their balance allow."
    )
    passes: int = option(8, "locality, relation: times the entities are gone through; more passes, fewer cuts.")

    def __post_init__(self) -> None:
        StoreConfig.__post_init__(self)
        if not 1 <= self.partitions <= MOST:
            raise ConfigError("partitions", self.partitions, f"a number of parts from 1 to {MOST}")
        for key in ("slack", "triple_slack"):
            if not 0 <= getattr(self, key) <= 10:
                raise ConfigError(key, getattr(self, key), "a share from 0 to 10")
        if not 1 <= self.passes <= 1000:
            raise ConfigError("passes", self.passes, "a number of passes from 1 to 1000")

    @property
    def streams(self) -> bool:
        """Whether entities are given to partitions by a stream of them, and not by their hash."""
        return self.partitioner != "hash" and self.partitions > 1


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


@dataclass(frozen=True)
class Layout:
    """Partitions and their cells.

    A cell is a range of ids within a partition, small enough that one task holds its triples in memory. A graph does
    not depend on how it is cut into cells.
    """

    ranges: list[tuple[int, int]]
    cells: list[tuple[int, int]]
    owners: list[int]
    """Of each cell its partition."""

    @classmethod
    def of(cls, ranges: list[tuple[int, int]], triples: int, cell_triples: int) -> Layout:
        """Cells of some ``cell_triples`` triples each, if triples are spread evenly."""
        each = min(-(-triples // (len(ranges) * cell_triples)), MOST // len(ranges))
        cells: list[tuple[int, int]] = []
        owners = []
        for number, (start, end) in enumerate(ranges):
            spans = partition_ranges(end - start, max(1, min(each, end - start)))
            cells += [(start + low, start + high) for low, high in spans]
            owners += [number] * len(spans)
        return cls(ranges, cells, owners)

    @property
    def num_cells(self) -> int:
        return len(self.cells)

    @property
    def num_entities(self) -> int:
        return self.ranges[-1][1]

    @property
    def id_type(self) -> Any:
        """The narrowest type ids fit, on their way between tasks."""
        return np.uint32 if self.num_entities <= 2**32 else np.int64

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        return np.asarray([end for _, end in self.cells], dtype=np.int64)

    def cell_of(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
        """The cell of each id, (n,) uint16."""
        return np.searchsorted(self._ends, ids, side="right").astype(np.uint16)

    def cells_of(self, partition: int) -> list[int]:
        """The cells of a partition, in order."""
        return [cell for cell, owner in enumerate(self.owners) if owner == partition]
