"""Vectors of texts that were encoded before, in any earlier vectors artifact of the same encoder."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kgray.artifact import Artifact
from kgray.errors import ArtifactError
from kgray.text.vectors import Half, Vectors, keys_file, load_vectors

log = logging.getLogger(__name__)

KEY_BYTES = 16
Keys = NDArray[np.uint64]


def text_keys(texts: Sequence[str]) -> Keys:
    """(n, 2) uint64: the first 128 bits of the sha256 of each text's UTF-8."""
    digests = b"".join(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:KEY_BYTES] for text in texts)
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def keys_table(keys: Keys) -> pa.Table:
    """Keys as one column ``text_sha`` of 16 bytes each, in row order."""
    data = keys.astype(">u8").tobytes()
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(keys), [None, pa.py_buffer(data)])
    return pa.table({"text_sha": column})


def keys_of(table: pa.Table) -> Keys:
    """The inverse of :func:`keys_table`."""
    column = table["text_sha"].combine_chunks()
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    data = b"".join(
        memoryview(c.buffers()[1])[c.offset * KEY_BYTES : (c.offset + len(c)) * KEY_BYTES] for c in chunks
    )
    return np.frombuffer(data, dtype=">u8").astype(np.uint64).reshape(-1, 2)


class Known:
    """Where vectors of known texts lie. Holds 24 bytes a text; the vectors stay memory-mapped."""

    def __init__(self, artifacts: Sequence[Artifact]) -> None:
        self._vectors: list[Vectors] = []
        first, second, row, source = [], [], [], []
        for artifact in artifacts:
            try:
                vectors = load_vectors(artifact)
                keys = np.concatenate(
                    [keys_of(artifact.read_table(keys_file(p))) for p in range(len(vectors.parts))]
                )
            except (ArtifactError, OSError, KeyError) as error:
                log.warning("not reusing the vectors of %s: %s", artifact.uri, error)
                continue
            if len(keys) != len(vectors):
                log.warning(
                    "not reusing the vectors of %s: %d keys, %d rows", artifact.uri, len(keys), len(vectors)
                )
                continue
            first.append(keys[:, 0])
            second.append(keys[:, 1])
            row.append(np.arange(len(keys), dtype=np.int64))
            source.append(np.full(len(keys), len(self._vectors), dtype=np.int16))
            self._vectors.append(vectors)
        self._first = np.concatenate([*first, np.empty(0, np.uint64)])
        order = np.argsort(self._first, kind="stable")
        self._first = self._first[order]
        self._second = np.concatenate([*second, np.empty(0, np.uint64)])[order]
        self._row = np.concatenate([*row, np.empty(0, np.int64)])[order]
        self._source = np.concatenate([*source, np.empty(0, np.int16)])[order]

    def __len__(self) -> int:
        return int(self._first.size)

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """(n,) positions for :meth:`take`, -1 for texts that are not known."""
        if not len(self):
            return np.full(len(keys), -1, dtype=np.int64)
        at = np.minimum(np.searchsorted(self._first, keys[:, 0]), len(self) - 1)
        # Two texts that share 64 bits and not 128 would only make the later one unknown, never wrong.
        same = (self._first[at] == keys[:, 0]) & (self._second[at] == keys[:, 1])
        return np.where(same, at, -1)

    def take(self, positions: NDArray[np.int64], dim: int) -> Half:
        """(n, dim) float16 vectors of positions that :meth:`find` gave.

        Raises ArtifactError when an earlier artifact has another dimension.
        """
        out = np.empty((len(positions), dim), dtype=np.float16)
        sources = self._source[positions]
        for source in np.unique(sources):
            vectors = self._vectors[int(source)]
            if vectors.dim != dim:
                raise ArtifactError(f"vectors of the same encoder with {vectors.dim} and {dim} dimensions")
            chosen = sources == source
            out[chosen] = vectors.rows(self._row[positions[chosen]])
        return out
