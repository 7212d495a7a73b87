"""A graph that is drawn instead of read, as large as wanted: triple n is a function of the seed and of n alone.

Popularity follows a power law: entity i is drawn with a weight of (i + 1) ** (-1 / (exponent - 1)), which gives degrees
with that exponent (Chung and Lu 2002), by inverting the law's distribution, so that no table grows with the graph.
Relations have frequencies 1, 1/2, 1/3, ... (Zipf).

What there is to learn: entities lie in communities on a ring (entity i in community i modulo their number), and every
relation maps the ring onto itself: some turn it by a small offset, as RotatE models (Sun et al. 2019), some reflect it,
and are then their own inverses. The tail lies in the community its head's is mapped to, by popularity there; a share
``noise`` of the tails is drawn from all entities. Offsets are small, so there are cuts that few triples cross.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kgray.data.config import DataConfig, SyntheticConfig
from kgray.data.dictionary import I64, STRING, U64, mix

SYNTHETIC_FORMAT = 1
"""Raised whenever the same settings would draw another graph."""
_DRAWS = 4  # numbers a triple is made of: what Philox gives for one step of its counter
_STEPS = 16


@dataclass(frozen=True)
class SyntheticGraph:
    """A graph of ``triples`` rows, duplicates among them, as a person would have it in a file.

    power: popularity is drawn as entities * u ** power, of u uniform in [0, 1).
    """

    triples: int
    entities: int
    relations: int
    communities: int
    power: float
    noise: float
    seed: int

    @classmethod
    def of(cls, data: DataConfig) -> SyntheticGraph | None:
        """What a configuration asks for; None where it names files."""
        return cls.sized(data.triples, data.synthetic) if isinstance(data.triples, int) else None

    @classmethod
    def sized(cls, triples: int, config: SyntheticConfig) -> SyntheticGraph:
        entities = config.entities_of(triples)
        return cls(
            triples=triples,
            entities=entities,
            relations=config.relations,
            communities=config.communities_of(entities),
            # In steps of 1/16: square roots and products are the same on every machine, powers are not.
            power=round((config.exponent - 1) / (config.exponent - 2) * _STEPS) / _STEPS,
            noise=config.noise,
            seed=config.seed,
        )

    def draw(self, start: int, count: int) -> tuple[I64, I64, I64]:
        """Triples ``start`` to ``start + count``. Returns heads, relations, tails, each (count,) int64."""
        bits: Any = np.random.Philox(key=self.seed)
        raw = bits.advance(start).random_raw(_DRAWS * count).reshape(count, _DRAWS)
        heads = self._popular(_uniform(raw[:, 0]), self.entities)
        bounds, offsets, reflected = self._relations()
        relations = np.searchsorted(bounds, raw[:, 1], side="right")
        ring = heads % self.communities
        ring = np.where(reflected[relations], -ring, ring) + offsets[relations]
        ring %= self.communities
        members = (self.entities - 1 - ring) // self.communities + 1
        popular = _uniform(raw[:, 2])
        tails = self._popular(popular, members) * self.communities + ring
        noisy = np.flatnonzero(_uniform(raw[:, 3]) < self.noise)
        tails[noisy] = self._popular(popular[noisy], self.entities)
        return heads, relations, tails

    def _popular(self, uniform: npt.NDArray[np.float64], among: int | I64) -> I64:
        """Ranks below ``among``, the low ones more often."""
        drawn = (_power(uniform, self.power) * among).astype(np.int64)
        return np.minimum(drawn, np.asarray(among, dtype=np.int64) - 1)

    def _relations(self) -> tuple[U64, I64, npt.NDArray[np.bool_]]:
        """Of each relation: where its range of random numbers ends (but of the last one), how far it turns the ring,
        whether it reflects it."""
        numbers = np.arange(self.relations)
        shares = np.cumsum(1.0 / (numbers + 1.0))
        bounds = (shares[:-1] / shares[-1] * 2.0**53).astype(np.uint64) << np.uint64(11)
        near = max(1, self.communities // 100)
        drawn = mix(numbers.astype(np.uint64) + mix(np.asarray([self.seed], np.uint64) + np.uint64(1)))
        offsets = (drawn % np.uint64(2 * near + 1)).astype(np.int64) - near
        offsets[0] = 0  # the most frequent keeps to its community
        return bounds, offsets, numbers % 3 == 2

    def blocks(self, start: int, end: int, block: int = 1 << 21) -> Iterator[tuple[Any, Any, Any, int]]:
        """Triples [start, end) as dictionary-encoded large_string columns (head, relation, tail), the first two
        dictionaries shared by head and tail, and the number of the first."""
        for low in range(start, end, block):
            heads, relations, tails = self.draw(low, min(block, end - low))
            head, tail = _encoded("e", heads, tails)
            (relation,) = _encoded("r", relations)
            yield head, relation, tail, low

    def write_tsv(self, path: str, start: int, end: int) -> None:
        """The same triples as a file of lines ``head relation tail``: what a user would have."""
        from pyarrow import csv

        options = csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
        schema = pa.schema([(name, STRING) for name in ("head", "relation", "tail")])
        with csv.CSVWriter(path, schema, write_options=options) as writer:
            for head, relation, tail, _ in self.blocks(start, end):
                columns = [column.dictionary_decode() for column in (head, relation, tail)]
                writer.write_table(pa.table(columns, schema=schema))


def _encoded(letter: str, *columns: I64) -> list[Any]:
    """Columns of numbers as external ids, over one dictionary of those that occur."""
    numbers, codes = np.unique(np.concatenate(columns), return_inverse=True)
    first, nothing = pa.scalar(letter, STRING), pa.scalar("", STRING)
    ids = pc.binary_join_element_wise(first, pa.array(numbers).cast(STRING), nothing)
    ends = np.cumsum([len(column) for column in columns])[:-1]
    return [pa.DictionaryArray.from_arrays(pa.array(part.astype(np.int32)), ids) for part in np.split(codes, ends)]


def _uniform(raw: U64) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) of 53 bits."""
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _power(values: npt.NDArray[np.float64], power: float) -> npt.NDArray[np.float64]:
    """values ** power, of a power that is a multiple of 1/16 and at least 1, by products and square roots alone, which
    IEEE 754 rounds alike everywhere."""
    sixteenths = round(power * _STEPS)
    whole, rest = divmod(sixteenths, _STEPS)
    result = values.copy()
    for _ in range(whole - 1):
        result *= values
    root = values
    bit = _STEPS // 2
    while rest:
        root = np.sqrt(root)
        if rest & bit:
            result *= root
            rest -= bit
        bit //= 2
    return result
