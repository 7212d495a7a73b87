"""The texts of a graph as token ids, and sequences packed without padding: numpy only, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kgray.artifact import Artifact
from kgray.text.config import Pooling, TextConfig
from kgray.text.template import entity_texts, relation_texts, spoken, template_fields

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """Token ids of many texts, one after the other. ids: (T,) int64; offsets: (texts + 1,) int64."""

    ids: Int64
    offsets: Int64

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Tokens:
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        return cls(np.fromiter((i for row in rows for i in row), np.int64, int(offsets[-1])), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> Int64:
        return np.diff(self.offsets)

    def __getitem__(self, row: int) -> Int64:
        return self.ids[self.offsets[row] : self.offsets[row + 1]]


@dataclass(frozen=True)
class Texts:
    """What an encoder in training reads.

    encoder: its directory. tokens: of the N entities and then of the 2R relations, real and inverse. pooling,
    max_length: as in TextConfig. lead: special tokens a text begins with, which one that continues another drops.
    names: tokens of the N entities' names, without special ones; None where nothing asks for them.
    """

    encoder: str
    tokens: Tokens
    num_entities: int
    pooling: Pooling = "mean"
    max_length: int = 128
    lead: int = 1
    names: Tokens | None = None


def read_texts(graph: Artifact, text: TextConfig, encoder: str) -> Texts:
    """The texts of a ``graph`` artifact as the encoder in the directory ``encoder`` reads them.

    Raises EncoderError for a directory that transformers cannot read.
    """
    columns = sorted({"name", "external_id", *template_fields(text.template)})
    entities = _columns(graph, "entities", columns)
    relations = _columns(graph, "relations.parquet", sorted({"name", *template_fields(text.relation_template)}))
    names = None
    if text.tuning is not None and text.tuning.mask_mentions:
        pairs = zip(entities["name"], entities["external_id"], strict=True)
        names = [spoken(name or "") if name == external else name or "" for name, external in pairs]
    return texts_of(
        entity_texts(entities, text.template), relation_texts(relations, text.relation_template), text, encoder, names
    )


def texts_of(
    entities: Sequence[str],
    relations: Sequence[str],
    text: TextConfig,
    encoder: str,
    names: Sequence[str] | None = None,
) -> Texts:
    """Texts given as strings: N entities, 2R relations, perhaps the entities' names."""
    from kgray.text.encoder import load_tokenizer, tokenise

    tokenizer = load_tokenizer(encoder)
    rows, _ = tokenise(tokenizer, [*entities, *relations], text.max_length)
    starts = {row[0] for row in rows if row}
    lead = int(len(starts) == 1 and starts <= set(tokenizer.all_special_ids))
    called = None
    if names is not None:
        called = Tokens.of(tokenizer(list(names), add_special_tokens=False, verbose=False)["input_ids"])
    return Texts(encoder, Tokens.of(rows), len(entities), text.pooling, text.max_length, lead, called)


def _columns(graph: Artifact, place: str, names: Sequence[str]) -> Mapping[str, list[str | None]]:
    table = graph.read_table(place, columns=names)
    return {name: [None if v is None else str(v) for v in table[name].to_pylist()] for name in names}


@dataclass(frozen=True)
class Packed:
    """Token sequences without padding, the shortest first.

    places: (T,) int64 into ``Texts.tokens.ids``, sequence after sequence; groups: (sequences, tokens in each) of runs
    of equal length; back: (n,) int64, where the i-th sequence asked for stands.
    """

    places: Int64
    groups: tuple[tuple[int, int], ...]
    back: Int64


def pack(
    texts: Texts,
    rows: Int64,
    continued: Int64 | None = None,
    *,
    drop: float = 0.0,
    generator: np.random.Generator | None = None,
    without: Int64 | None = None,
) -> Packed:
    """Sequences of texts.

    rows: (n,) texts; continued: (n,) texts each goes on with, -1 for none. Together they keep to ``texts.max_length``:
    what goes on gets at most half of it, and the beginning is cut. drop: share of tokens left out by ``generator``.
    without: positions in ``Texts.tokens.ids`` to leave out of sequences, as ``sequence * T + position``. The first
    token of a sequence always stays.
    """
    tokens, n = texts.tokens, len(rows)
    start, length = tokens.offsets[rows], tokens.lengths[rows]
    if continued is not None:
        second = np.maximum(continued, 0)
        lead = np.minimum(np.where(length > 0, texts.lead, 0), tokens.lengths[second])
        more = np.minimum(tokens.lengths[second] - lead, texts.max_length // 2)
        more = np.where(continued >= 0, more, 0)
        length = np.minimum(length, texts.max_length - more)
        start = np.stack([start, tokens.offsets[second] + lead], axis=1).ravel()
        length = np.stack([length, more], axis=1).ravel()
    first = np.cumsum(length) - length
    places = np.arange(int(length.sum())) + np.repeat(start - first, length)
    owner = np.repeat(np.arange(len(length)) // (1 if continued is None else 2), length)
    keep = np.ones(len(places), dtype=bool)
    if drop and generator is not None:
        keep = generator.random(len(places), dtype=np.float32) >= drop
    if without is not None and len(without):
        keep &= ~np.isin(owner * len(tokens.ids) + places, without)
    keep[np.flatnonzero(np.diff(owner, prepend=-1))] = True
    places, owner = places[keep], owner[keep]
    sizes = np.bincount(owner, minlength=n)
    order = np.argsort(sizes, kind="stable")
    back = np.empty(n, dtype=np.int64)
    back[order] = np.arange(n)
    lengths, counts = np.unique(sizes, return_counts=True)
    groups = tuple(zip(counts.tolist(), lengths.tolist(), strict=True))
    return Packed(places[np.argsort(back[owner], kind="stable")], groups, back)


def mentions(texts: Texts, rows: Int64, named: Int64) -> Int64:
    """Where texts hold the names of other entities, as :func:`pack` takes it in ``without``. rows, named: (n,)."""
    if texts.names is None:
        return np.empty(0, dtype=np.int64)
    found = []
    for sequence, (row, name) in enumerate(zip(rows.tolist(), named.tolist(), strict=True)):
        wanted, held = texts.names[name], texts.tokens[row]
        if 0 < len(wanted) <= len(held):
            windows = np.lib.stride_tricks.sliding_window_view(held, len(wanted))
            for at in np.flatnonzero((windows == wanted).all(axis=1)).tolist():
                begin = sequence * len(texts.tokens.ids) + int(texts.tokens.offsets[row]) + at
                found.append(np.arange(begin, begin + len(wanted)))
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def batches(texts: Texts, rows: Int64, continued: Int64 | None, budget: int) -> list[Int64]:
    """Positions in ``rows`` in batches of some ``budget`` tokens, texts of like length together."""
    size = texts.tokens.lengths[rows]
    if continued is not None:
        size = size + texts.tokens.lengths[np.maximum(continued, 0)]
    order = np.argsort(size, kind="stable")
    parts = np.cumsum(size[order]) // budget
    return np.split(order, np.flatnonzero(np.diff(parts)) + 1)
