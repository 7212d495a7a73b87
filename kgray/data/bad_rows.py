"""Bad rows: what is wrong with them, how many may be, and how the user is told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from kgray.errors import DataError

TEXT_LIMIT = 500
"""Characters of a bad row that are kept for the quarantine file."""


class Policy(Protocol):
    """What is done about bad rows; a section of the configuration that reads rows has these options."""

    @property
    def on_bad_row(self) -> Literal["fail", "skip"]: ...
    @property
    def max_bad_rows(self) -> int: ...


@dataclass(frozen=True, order=True)
class BadRow:
    """One row that cannot be used. ``reason`` tells what was found and what was expected."""

    source: int
    line: int
    reason: str
    text: str = ""


class BadRows:
    """Bad rows of any order: all are counted, the first ``limit`` in file order kept."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self._rows: list[BadRow] = []

    def add(self, source: int, line: int, reason: str, text: str = "") -> None:
        self.count += 1
        self._rows.append(BadRow(source, line, reason, text[:TEXT_LIMIT]))
        if len(self._rows) > 2 * self.limit + 100:
            self._rows = sorted(self._rows)[: self.limit]

    @property
    def rows(self) -> list[BadRow]:
        self._rows = sorted(self._rows)[: self.limit]
        return self._rows

    def take(self, other: BadRows) -> None:
        """Add those of another."""
        self._rows = sorted(self._rows + other._rows)[: self.limit]
        self.count += other.count


def kept_details(policy: Policy) -> int:
    """How many bad rows a task describes in full."""
    return policy.max_bad_rows + 1 if policy.on_bad_row == "skip" else 1


def merge(parts: Iterable[BadRows], limit: int) -> BadRows:
    """Bad rows of several tasks as one."""
    merged = BadRows(limit)
    for part in parts:
        merged.take(part)
    return merged


def judge(bad: BadRows, policy: Policy, paths: Sequence[str], section: str = "data") -> None:
    """Let the policy decide, which is configured in ``section``. Raises DataError naming file and line of the first bad
    row and how many more."""
    if not bad.count:
        return
    first = bad.rows[0]
    more = f"; and {bad.count - 1} more bad row{'s' * (bad.count != 2)}" if bad.count > 1 else ""
    told = f"{paths[first.source]}, line {first.line}: {first.reason}{more}"
    if policy.on_bad_row == "fail":
        raise DataError(f"{told} ({section}.on_bad_row=skip sets bad rows aside)")
    if bad.count > policy.max_bad_rows:
        limit = f"{section}.max_bad_rows={policy.max_bad_rows}"
        raise DataError(f"{bad.count} bad rows, more than {limit}; the first: {told}")
