"""Rules that fired for a batch of queries, and what they predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from kgray.reasoning.facts import Int64


@dataclass(frozen=True)
class Fired:
    """query, rule: (n,) int64, query ascending. rows: (n, N), the entities each rule predicts for its query; only
    where there is an entry counts, not its value."""

    query: Int64
    rule: Int64
    rows: sparse.csr_array

    def between(self, low: int, high: int) -> Fired:
        """Those of queries low..high-1."""
        start, stop = np.searchsorted(self.query, [low, high])
        first, last = self.rows.indptr[start], self.rows.indptr[stop]
        parts = (self.rows.data[first:last], self.rows.indices[first:last], self.rows.indptr[start : stop + 1] - first)
        rows = sparse.csr_array(parts, shape=(int(stop - start), self.rows.shape[1]))
        return Fired(self.query[start:stop], self.rule[start:stop], rows)

    def ordered(self, rank: Int64) -> Fired:
        """By query, and within one by falling confidence."""
        order = np.lexsort((rank[self.rule], self.query))
        return Fired(self.query[order], self.rule[order], self.rows[order])

    @classmethod
    def join(cls, parts: Sequence[Fired]) -> Fired:
        query = np.concatenate([part.query for part in parts])
        rule = np.concatenate([part.rule for part in parts])
        rows = sparse.csr_array(sparse.vstack([part.rows for part in parts], format="csr"))
        order = np.argsort(query, kind="stable")
        return cls(query[order], rule[order], rows[order])
