"""Sets of weighted items an entity has (words, character n-grams, neighbours), and how far two of them overlap."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]

_WORD = re.compile(r"\w+")
_MOST_WORDS = 64
_DECAY = 4.0


@dataclass(frozen=True, slots=True)
class Bags:
    """One bag an entity, as CSR: the items of entity e are ``items[offsets[e]:offsets[e + 1]]``, ascending, each once.

    offsets: (N + 1,) int64; items: (V,) int32 in 0..num_items-1; values: (V,) float32, what an item counts in its bag.
    weights: (num_items,) float32, what an item counts wherever it stands, for instance its rarity.
    """

    offsets: Int64
    items: NDArray[np.int32]
    values: Float32
    weights: Float32

    @classmethod
    def build(cls, rows: Int64, items: Int64, values: Float32, num_rows: int, weights: Float32) -> Bags:
        """From (entity, item, value) entries in any order; of an item twice in a bag the greater value stays."""
        order = np.lexsort((-values, items, rows))
        rows, items, values = rows[order], items[order], values[order]
        fresh = np.ones(len(rows), dtype=bool)
        fresh[1:] = (rows[1:] != rows[:-1]) | (items[1:] != items[:-1])
        rows, items, values = rows[fresh], items[fresh], values[fresh]
        offsets = np.zeros(num_rows + 1, dtype=np.int64)
        np.cumsum(np.bincount(rows, minlength=num_rows), out=offsets[1:])
        return cls(offsets, items.astype(np.int32), values.astype(np.float32), weights.astype(np.float32))

    def totals(self) -> Float32:
        """(N,) weight of every whole bag, values left aside."""
        whole = np.concatenate([[0.0], np.cumsum(self.weights[self.items], dtype=np.float64)])
        total: Float32 = (whole[self.offsets[1:]] - whole[self.offsets[:-1]]).astype(np.float32)
        return total

    def expand(self, rows: Int64, most: int | None = None) -> tuple[Int64, Int64]:
        """Entries of B bags: (place in ``rows``, position in ``items``), both int64; at most the first ``most`` of a
        bag."""
        start, length = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        if most is not None:
            length = np.minimum(length, most)
        places = np.repeat(np.arange(len(rows), dtype=np.int64), length)
        ends = np.cumsum(length)
        within = np.arange(len(places), dtype=np.int64) - np.repeat(ends - length, length)
        return places, start[places] + within

    def to_arrays(self, name: str) -> dict[str, NDArray[np.generic]]:
        """Flat arrays, what :meth:`from_arrays` takes."""
        return {f"{name}.{part}": getattr(self, part) for part in self.__slots__}

    @classmethod
    def from_arrays(cls, name: str, arrays: Mapping[str, NDArray[np.generic]]) -> Bags:
        return cls(*(arrays[f"{name}.{part}"] for part in cls.__slots__))  # type: ignore[arg-type]


def overlap(
    left: Bags, anchors: Int64, right: Bags, candidates: Int64, *, most: int | None = None
) -> Float32:
    """(B,) anchors, (B, K) candidates -> (B, K): the summed weight of items in both, times their values in each bag.

    left and right must number their items alike. most: candidates' bags are read to that many items (hubs). The
    weights are ``left``'s.
    """
    size = np.int64(len(left.weights))
    # An anchor asked for many times is read once: it may be a hub of millions.
    anchors, row = np.unique(anchors, return_inverse=True)
    places, at = left.expand(anchors)
    keys = places * size + left.items[at]  # ascending: places ascend, items ascend within a bag
    counts = left.values[at] * left.weights[left.items[at]]
    flat = candidates.reshape(-1)
    cells, there = right.expand(flat, most)
    out = np.zeros(len(flat), dtype=np.float32)
    if not len(keys) or not len(cells):
        return out.reshape(candidates.shape)
    wanted = row[cells // candidates.shape[1]] * size + right.items[there]
    found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    hit = keys[found] == wanted
    value = counts[found[hit]] * right.values[there[hit]]
    out += np.bincount(cells[hit], weights=value, minlength=len(flat)).astype(np.float32)
    return out.reshape(candidates.shape)


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text, underscores read as spaces."""
    return _WORD.findall(text.replace("_", " ").casefold())


@dataclass(frozen=True, slots=True)
class TextBags:
    """What the names and descriptions of N entities are made of; weights are inverse document frequencies.

    names: words of the name. grams: character trigrams of the name. texts: words of the description, an earlier word
    counting more (the first 1, the fifth a half): definitions begin with what a thing is. names and texts share items.
    """

    names: Bags
    grams: Bags
    texts: Bags

    @classmethod
    def build(cls, names: Sequence[str], descriptions: Sequence[str]) -> TextBags:
        """From one name and one description an entity; either may be empty. A description is read to 64 words."""
        if len(names) != len(descriptions):
            raise ValueError(f"{len(names)} names but {len(descriptions)} descriptions")
        vocabulary: dict[str, int] = {}
        gram_ids: dict[str, int] = {}
        in_names, in_texts, in_grams = _Entries(), _Entries(), _Entries()
        for row, (name, description) in enumerate(zip(names, descriptions, strict=True)):
            spelled = words(name)
            in_names.add(row, [vocabulary.setdefault(w, len(vocabulary)) for w in spelled])
            text = [vocabulary.setdefault(w, len(vocabulary)) for w in words(description)[:_MOST_WORDS]]
            in_texts.add(row, text, [_DECAY / (_DECAY + place) for place in range(len(text))])
            joined = " ".join(spelled)
            framed = f" {joined} " if joined else ""
            pieces = {framed[i : i + 3] for i in range(len(framed) - 2)}
            in_grams.add(row, [gram_ids.setdefault(g, len(gram_ids)) for g in sorted(pieces)])
        count = len(names)
        rarity = _rarity(np.concatenate([in_names.items(), in_texts.items()]), len(vocabulary), count)
        return cls(
            in_names.bags(count, rarity),
            in_grams.bags(count, _rarity(in_grams.items(), len(gram_ids), count)),
            in_texts.bags(count, rarity),
        )

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        return {k: v for name in self.__slots__ for k, v in getattr(self, name).to_arrays(name).items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> TextBags:
        return cls(*(Bags.from_arrays(name, arrays) for name in cls.__slots__))


class _Entries:
    """Growing (row, item, value) entries."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.ids: list[int] = []
        self.values: list[float] = []

    def add(self, row: int, items: list[int], values: list[float] | None = None) -> None:
        self.rows += [row] * len(items)
        self.ids += items
        self.values += [1.0] * len(items) if values is None else values

    def items(self) -> Int64:
        return np.array(self.ids, dtype=np.int64)

    def bags(self, count: int, weights: Float32) -> Bags:
        rows, values = np.array(self.rows, dtype=np.int64), np.array(self.values, dtype=np.float32)
        return Bags.build(rows, self.items(), values, count, weights)


def _rarity(items: Int64, vocabulary: int, count: int) -> Float32:
    """(vocabulary,) log((1 + n) / uses), never negative: a word that half the entities have says little."""
    uses = np.maximum(np.bincount(items, minlength=vocabulary), 1)
    return np.maximum(np.log((1 + count) / uses), 0.05).astype(np.float32)
