"""The vectors artifact as arrays: numpy only, memory-mapped."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from kgray.artifact import Artifact
from kgray.errors import ArtifactError

FORMAT = 1
INDEX = "index.json"
RELATIONS = "relations.npy"

Half = NDArray[np.float16]


def entities_file(part: int) -> str:
    return f"entities-{part:05d}.npy"


def keys_file(part: int) -> str:
    return f"keys-{part:05d}.parquet"


@dataclass(frozen=True)
class Vectors:
    """Text vectors of a graph.

    ``parts``: per partition (rows, dim) float16, memory-mapped, rows in id order; ``starts``: (parts + 1,)
    int64, the first id of each part and the number of entities; ``relations``: (2R, dim) float16, real then
    inverse.
    """

    parts: tuple[Half, ...]
    starts: NDArray[np.int64]
    relations: Half
    index: dict[str, Any]

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def dim(self) -> int:
        return int(self.relations.shape[1])

    @cached_property
    def entities(self) -> Half:
        """(N, dim) float16: the memory map itself where there is one part, else a copy of all parts."""
        return self.parts[0] if len(self.parts) == 1 else np.concatenate(self.parts)

    def rows(self, ids: NDArray[np.int64]) -> Half:
        """(len(ids), dim) float16 rows of some entities, read from the maps without copying the rest.

        Raises IndexError for an id outside 0..N-1.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"entity ids must lie in 0..{len(self) - 1}, got {ids.min()}..{ids.max()}")
        out = np.empty((ids.size, self.dim), dtype=np.float16)
        part_of = np.searchsorted(self.starts, ids, side="right") - 1
        for part in np.unique(part_of):
            chosen = part_of == part
            out[chosen] = self.parts[part][ids[chosen] - self.starts[part]]
        return out


def load_vectors(artifact: Artifact) -> Vectors:
    """Opens a vectors artifact; nothing but headers is read.

    Raises ArtifactError when it is of another kind, or shapes, dtypes or id ranges do not fit its index.
    """
    if artifact.kind != "vectors":
        raise ArtifactError(f"{artifact.uri} is of kind {artifact.kind}, not vectors")
    index = artifact.read_json(INDEX)
    dim, where = int(index["dim"]), artifact.uri
    parts, starts, expected = [], [], 0
    for entry in index["parts"]:
        start, end = int(entry["start"]), int(entry["end"])
        if start != expected or end < start:
            raise ArtifactError(
                f"{where}/{INDEX}: part {entry['file']} covers ids {start}..{end}, not from {expected}"
            )
        parts.append(_map(artifact.local_path(entry["file"]), (end - start, dim)))
        starts.append(start)
        expected = end
    relations = _map(artifact.local_path(RELATIONS), (2 * int(index["relations"]), dim))
    return Vectors(tuple(parts), np.asarray([*starts, expected], dtype=np.int64), relations, index)


def _map(path: Path, shape: tuple[int, int]) -> Half:
    try:
        # An empty array cannot be mapped.
        array = np.load(path, mmap_mode="r" if shape[0] else None, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} is no array: {error}") from None
    if array.shape != shape or array.dtype != np.float16:
        raise ArtifactError(f"{path} holds {array.dtype} {array.shape}; expected float16 {shape}")
    return cast(Half, array)
