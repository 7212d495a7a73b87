"""External ids and names to dense ids and back, with a good answer when nothing is found.

An external id wins over a name: ids are unique by construction, names are what people type. A name that
several rows share is refused with the ids it could mean; guessing would give a confident wrong answer.
"""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from kgray.errors import UserError

Kind = Literal["entity", "relation"]
Field = Literal["head", "relation", "tail"]

_SCAN = 2000
"""Keys compared for a suggestion: all of a small graph, the alphabetic neighbourhood in a large one."""

_SPACES = str.maketrans("_-", "  ")

_LISTED = 20
"""Ids named in the message about an ambiguous name."""


class QueryError(UserError):
    """A query that cannot be answered as it stands; ``code`` is ``unknown-entity`` and the like.

    ``field`` is the part of the query that is wrong (``head``, ``head.facts.0.tail``), ``value`` what it held,
    ``near`` external ids that the user may have meant (the candidates themselves, for an ambiguous name).
    """

    def __init__(self, code: str, field: str, value: str, message: str, near: Sequence[str] = ()) -> None:
        self.code = code
        self.field = field
        self.value = value
        self.message = message
        self.near = tuple(near)
        super().__init__(code, field, value, message, self.near)

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class Named:
    """One row of the entity or relation table: dense ``index``, external ``id``, ``name``."""

    index: int
    id: str
    name: str


class Names:
    """Lookup over one table. ``ids`` (unique) and ``names`` are lists of equal length, in dense id order."""

    def __init__(self, kind: Kind, ids: Sequence[str], names: Sequence[str]) -> None:
        self.kind = kind
        self._ids = ids
        self._names = names
        self._by_id = {external: index for index, external in enumerate(ids)}
        self._by_name: dict[str, int] = {}
        self._shared: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            first = self._by_name.setdefault(name, index)
            if first != index:
                self._shared.setdefault(name, [first]).append(index)

    @cached_property
    def _sorted(self) -> tuple[list[str], list[int]]:
        """Keys and their rows, for suggestions; names that spell their id differently come a second time. Made when
        something is not found, which most batches of queries never see."""
        plain = [_plain(external) for external in self._ids]
        keys = list(zip(plain, range(len(plain)), strict=True))
        keys += [(key, i) for i, name in enumerate(self._names) if (key := _plain(name)) != plain[i]]
        keys.sort()
        return [key for key, _ in keys], [index for _, index in keys]

    def __len__(self) -> int:
        return len(self._ids)

    def row(self, index: int) -> Named:
        """The row of dense id ``index``."""
        return Named(index, self._ids[index], self._names[index])

    def index_of(self, value: str) -> int | None:
        """Dense id of the row whose external id, else whose unique name, is ``value``; None where there is none."""
        index = self._by_id.get(value)
        if index is None and value not in self._shared:
            index = self._by_name.get(value)
        return index

    def find(self, field: str, value: str) -> Named:
        """The row of :meth:`index_of`; QueryError that says what is wrong with ``value`` where there is none."""
        index = self.index_of(value)
        if index is not None:
            return self.row(index)
        shared = self._shared.get(value)
        if shared is not None:
            raise self._ambiguous(field, value, [self._ids[i] for i in shared])
        near = self.near(value)
        hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
        shown = value if len(value) <= 100 else value[:100] + "..."
        message = f"{field}: no {self.kind} has the id or name {shown!r}{hint}"
        raise QueryError(f"unknown-{self.kind}", field, value, message, near)

    def near(self, value: str, limit: int = 3) -> list[str]:
        """At most ``limit`` external ids that look like ``value``, best first."""
        keys, rows = self._sorted
        plain = _plain(value[:200])
        middle = bisect_left(keys, plain)
        start = max(0, min(middle - _SCAN // 2, len(keys) - _SCAN))
        window = keys[start : start + _SCAN]
        # get_close_matches returns keys; a key may belong to several rows, all of which are worth naming.
        found: list[str] = []
        for key in difflib.get_close_matches(plain, dict.fromkeys(window), n=limit, cutoff=0.6):
            place = bisect_left(keys, key)
            while place < len(keys) and keys[place] == key and len(found) < limit:
                external = self._ids[rows[place]]
                if external not in found:
                    found.append(external)
                place += 1
        return found

    def _ambiguous(self, field: str, value: str, ids: list[str]) -> QueryError:
        listed = ", ".join(ids[:_LISTED]) + (f" and {len(ids) - _LISTED} more" if len(ids) > _LISTED else "")
        message = f"{field}: the name {value!r} belongs to {len(ids)} {self.kind} rows; give one id: {listed}"
        return QueryError(f"ambiguous-{self.kind}", field, value, message, ids[:_LISTED])


def _plain(text: str) -> str:
    """Spelling without case and without the choice between space, dash and underscore."""
    return " ".join(text.translate(_SPACES).split()).casefold()
