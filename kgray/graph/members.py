"""Which of many numbers are among a few."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kgray.graph.neighbours import Int64, Ints

_SPARSE = 16
_LEAST_BITS, _MOST_BITS = 12, 24


class Members:
    """A small set of integers from 0 up, asked about many at once.

    A table of bits of the numbers' low digits, small enough for the processor's cache, turns nearly all away; what is
    left is looked up. A table of every number there is would be quicker by little, and as large as the graph.
    """

    def __init__(self, numbers: Ints) -> None:
        self.numbers: Int64 = np.unique(np.asarray(numbers, dtype=np.int64))
        bits = min(max(_LEAST_BITS, (_SPARSE * len(self.numbers)).bit_length()), _MOST_BITS)
        self._mask = (1 << bits) - 1
        self._table = np.zeros(1 << bits, dtype=bool)
        self._table[self.numbers & self._mask] = True

    def positions_in(self, asked: Ints) -> Int64:
        """Positions (k,) in ``asked`` (n,) of those that are members, ascending."""
        if not len(self.numbers):
            return np.empty(0, dtype=np.int64)
        low_digits = asked & asked.dtype.type(self._mask & np.iinfo(asked.dtype).max)
        maybe: Int64 = np.flatnonzero(self._table.take(low_digits))
        candidates = asked[maybe].astype(np.int64)
        place = np.minimum(np.searchsorted(self.numbers, candidates), len(self.numbers) - 1)
        found: Int64 = maybe[self.numbers[place] == candidates]
        return found

    def __call__(self, asked: Ints) -> NDArray[np.bool_]:
        """(n,) bool: which of ``asked`` are members."""
        found = np.zeros(len(asked), dtype=bool)
        found[self.positions_in(asked)] = True
        return found
