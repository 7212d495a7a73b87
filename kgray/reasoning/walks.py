"""Path bodies followed from many starts at once, as sparse products that keep object identity.

A row is one start entity under one sequence of relations; its entries are the entities reached, with the number of
walks. Rows of different relations go through the same product: an entry (row, e) continues by relation r in the row
``r * N + e`` of :attr:`Facts.matrix`.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from kgray.reasoning.facts import Facts, Int64, find, spread


def lengths(rows: sparse.csr_array) -> Int64:
    """Entries of each row, (n,) int64."""
    entries: Int64 = np.diff(rows.indptr).astype(np.int64)
    return entries


def first(facts: Facts, starts: Int64, r1: Int64) -> sparse.csr_array:
    """r1(X, Y) from n starts by n relations: (n, N) int64 walks."""
    return facts.matrix[r1 * facts.num_entities + starts]


def second(facts: Facts, starts: Int64, ones: sparse.csr_array, r2: Int64) -> sparse.csr_array:
    """r1(X, Z), r2(Z, Y) with X, Y, Z different, from the rows of :func:`first`; (n, N) int64 walks."""
    return _without(_continued(facts, ones, r2) @ facts.matrix, starts)


def third(
    facts: Facts, starts: Int64, ones: sparse.csr_array, twos: sparse.csr_array, r2: Int64, r3: Int64
) -> sparse.csr_array:
    """r1(X, Z1), r2(Z1, Z2), r3(Z2, Y) with all four different; (n, N) int64 walks.

    ``twos`` has no walk with Z2 = X. Those with Y = Z1 are taken off again: of each entry z of ``ones`` as many as
    there are walks z, Z2, z with Z2 other than X.
    """
    rows = _continued(facts, twos, r3)
    returning = _returning(facts, starts, ones, r2, r3)
    if returning is not None:
        rows = _beside(rows, *returning)
    return _without(rows @ facts.matrix, starts)


def reach(facts: Facts, rows: sparse.csr_array, relations: Int64) -> Int64:
    """Most entries each row can have after a step by its relation, (n,) int64: cheap, before any product."""
    sums: Int64 = np.concatenate([[0], np.cumsum(facts.degrees[_continued(facts, rows, relations).indices])])
    most: Int64 = sums[rows.indptr[1:]] - sums[rows.indptr[:-1]]
    return most


def _continued(facts: Facts, rows: sparse.csr_array, relations: Int64) -> sparse.csr_array:
    indices = rows.indices + np.repeat(relations * facts.num_entities, lengths(rows))
    shape = (rows.shape[0], facts.matrix.shape[0])
    return sparse.csr_array((rows.data, indices.astype(facts.matrix.indices.dtype), rows.indptr), shape=shape)


def _without(rows: sparse.csr_array, starts: Int64) -> sparse.csr_array:
    rows.data[rows.indices == np.repeat(starts, lengths(rows))] = 0
    rows.eliminate_zeros()
    return rows


def _returning(
    facts: Facts, starts: Int64, ones: sparse.csr_array, r2: Int64, r3: Int64
) -> tuple[Int64, Int64, Int64] | None:
    """Minus the walks z, Z2, z of each entry z of ``ones``, for the identity: (row, column, value)."""
    keys, counts, some = facts.closed
    chosen = np.flatnonzero(some[r2, r3])
    span, place = spread(ones.indptr[chosen].astype(np.int64), lengths(ones)[chosen])
    row = chosen[span]
    z = ones.indices[place].astype(np.int64)
    a, b = r2[row], r3[row]
    found = find(keys, (a * (2 * facts.num_relations) + b) * facts.num_entities + z)
    kept = found >= 0
    row, z, a, b = row[kept], z[kept], a[kept], b[kept]
    back = facts.contains(z, a, starts[row]) & facts.contains(starts[row], b, z)
    walks = counts[found[kept]] - back
    kept = walks > 0
    if not kept.any():
        return None
    return row[kept], 2 * facts.num_relations * facts.num_entities + z[kept], -walks[kept]


def _beside(rows: sparse.csr_array, row: Int64, column: Int64, value: Int64) -> sparse.csr_array:
    """``rows`` with further entries; a sum of sparse matrices would pass over their millions of columns."""
    each = np.concatenate([np.repeat(np.arange(rows.shape[0]), lengths(rows)), row])
    order = np.argsort(each, kind="stable")
    indices = np.concatenate([rows.indices, column.astype(rows.indices.dtype)])[order]
    offsets = np.zeros_like(rows.indptr)
    np.cumsum(np.bincount(each, minlength=rows.shape[0]), out=offsets[1:])
    return sparse.csr_array((np.concatenate([rows.data, value])[order], indices, offsets), shape=rows.shape)
