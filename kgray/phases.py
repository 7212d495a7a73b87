"""Where the time of a training worker goes: phases as context managers, the innermost one counted. Floor 2, standard
library only.

A :class:`Phases` is a stop-watch with a name for every moment: opening a phase stops the one around it, so that seconds
add up to the wall clock, and what stands in no phase is told as :data:`OTHER`. Code far below the loop (a text tower, a
sampler, a store) says ``with phase("fetching"):`` and ``counted("rows", n)`` and need not be handed the watch: they go
to the one that runs in their thread, and nowhere where none does. A boundary costs about a microsecond.

What is measured is the host's clock. On a GPU kernels run on behind it: there a phase is the time to launch its
kernels, and the rest shows where the host next waits for a number (in ``waiting`` or ``exchange``, or, every few steps,
``backward``). Nothing here ever makes a device wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

PHASES = (
    "sampling",
    "fetching",
    "encoding",
    "forward",
    "backward",
    "exchange",
    "optimiser",
    "waiting",
    "evaluation",
    "checkpointing",
)
"""sampling: triples, candidates and neighbours of a batch. fetching: rows of stored vectors and of tables. encoding:
the text tower. forward, backward: the rest of the model and the loss. exchange: between workers. waiting: for a batch,
or for other workers. evaluation, checkpointing: with all that happens inside."""

OTHER = "other"

_here = threading.local()


@dataclass(frozen=True)
class Spent:
    """Of one worker between two looks.

    wall: seconds. seconds: by phase, :data:`OTHER` among them; they add up to wall. calls: how often each phase was
    entered. counts: what was counted. ahead: seconds by phase of threads that work while the worker computes.
    """

    wall: float
    seconds: Mapping[str, float]
    calls: Mapping[str, int]
    counts: Mapping[str, int]
    ahead: Mapping[str, float]


class Phases:
    """The watch of one thread; see the module's text. clock: seconds, never going back."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._open: list[tuple[str, bool]] = []
        self._ahead: list[Phases] = []
        self._reset()

    def _reset(self) -> None:
        self._seconds: dict[str, float] = {}
        self._calls: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        self._begun = self._mark = self._clock()

    def _charge(self) -> None:
        now = self._clock()
        name = self._open[-1][0] if self._open else OTHER
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now

    def enter(self, name: str, whole: bool) -> None:
        """Open a phase; see :class:`phase`."""
        self._charge()
        if self._open and self._open[-1][1]:
            self._open.append(self._open[-1])
            return
        self._open.append((name, whole))
        self._calls[name] = self._calls.get(name, 0) + 1

    def leave(self) -> None:
        """Close the phase opened last."""
        self._charge()
        self._open.pop()

    def count(self, name: str, number: int) -> None:
        """Add to a count, but not inside a whole phase: what evaluation samples is no step of training."""
        if not (self._open and self._open[-1][1]):
            self._counts[name] = self._counts.get(name, 0) + number

    @contextmanager
    def running(self) -> Iterator[Phases]:
        """Take what this thread tells while the context lasts."""
        before = getattr(_here, "watch", None)
        _here.watch = self
        try:
            yield self
        finally:
            _here.watch = before

    def ahead(self) -> Phases:
        """A watch for another thread, whose phases are told beside this one's; what it does in none, such as waiting to
        be asked for more, is no cost."""
        other = Phases(self._clock)
        self._ahead.append(other)
        return other

    def take(self) -> Spent:
        """What was spent since the last call, or since the beginning; starts anew. The threads ahead must rest."""
        self._charge()
        ahead: dict[str, float] = {}
        calls, counts = dict(self._calls), dict(self._counts)
        for other in self._ahead:
            for name, seconds in other._seconds.items():
                if name != OTHER:
                    ahead[name] = ahead.get(name, 0.0) + seconds
            _add(calls, other._calls)
            _add(counts, other._counts)
        spent = Spent(self._mark - self._begun, dict(self._seconds), calls, counts, ahead)
        self._ahead.clear()
        self._reset()
        return spent


class phase:  # noqa: N801  (reads as a statement)
    """``with phase("forward"):`` charges what happens inside to that phase of the watch that runs in this thread.

    whole: phases inside are not told apart, nor is anything counted.
    """

    __slots__ = ("_name", "_watch", "_whole")

    def __init__(self, name: str, *, whole: bool = False) -> None:
        self._name, self._whole = name, whole

    def __enter__(self) -> None:
        self._watch: Phases | None = getattr(_here, "watch", None)
        if self._watch is not None:
            self._watch.enter(self._name, self._whole)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch is not None:
            self._watch.leave()


def counted(name: str, number: int) -> None:
    """Add ``number`` to a count of the watch that runs in this thread."""
    watch: Phases | None = getattr(_here, "watch", None)
    if watch is not None:
        watch.count(name, number)


def merged(label: str, parts: Sequence[Spent]) -> dict[str, Any]:
    """What every rank spent, as one row of plain JSON.

    ``part``: the label ("start", "epoch 3", "end"). ``wall``, ``seconds`` and ``ahead`` (by phase): [min, mean, max]
    over the ranks. ``calls``: the most of any rank. ``counts``: sums over the ranks.
    """
    counts: dict[str, int] = {}
    for part in parts:
        _add(counts, part.counts)
    calls = {name: max(p.calls.get(name, 0) for p in parts) for name in _names(p.calls for p in parts)}
    return {
        "part": label,
        "ranks": len(parts),
        "wall": _spread([part.wall for part in parts]),
        "seconds": {n: _spread([p.seconds.get(n, 0.0) for p in parts]) for n in _names(p.seconds for p in parts)},
        "ahead": {n: _spread([p.ahead.get(n, 0.0) for p in parts]) for n in _names(p.ahead for p in parts)},
        "calls": calls,
        "counts": dict(sorted(counts.items())),
    }


def total(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of rows that :func:`merged` made, as one such row. [min, mean, max] are summed each for itself, so the
    outer two bound those of any one rank."""
    summed: dict[str, Any] = {"part": "total", "ranks": max((row["ranks"] for row in rows), default=0)}
    summed["wall"] = [sum(column) for column in zip(*(row["wall"] for row in rows), strict=True)] or [0.0] * 3
    for key in ("seconds", "ahead"):
        summed[key] = {
            name: [sum(row[key].get(name, (0.0,) * 3)[place] for row in rows) for place in range(3)]
            for name in _names(row[key] for row in rows)
        }
    for key in ("calls", "counts"):
        summed[key] = {}
        for row in rows:
            _add(summed[key], row[key])
    return summed


def flat(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers by dotted name: ``seconds.forward`` (mean over ranks), of several ranks ``seconds.forward.min``
    and ``.max`` beside it, ``ahead.sampling``, ``count.edges``."""
    numbers: dict[str, float] = {"seconds.wall": row["wall"][1]}
    for key in ("seconds", "ahead"):
        for name, (least, mean, most) in row[key].items():
            numbers[f"{key}.{name}"] = mean
            if row["ranks"] > 1 and key == "seconds":
                numbers |= {f"{key}.{name}.min": least, f"{key}.{name}.max": most}
    return numbers | {f"count.{name}": float(number) for name, number in row["counts"].items()}


def brief(row: Mapping[str, Any], least: float = 0.05) -> str:
    """``forward 38%, backward 31%, waiting 12%``: mean shares of the wall, largest first, down to ``least``."""
    wall = row["wall"][1] or 1.0
    shares = sorted(((mean / wall, name) for name, (_, mean, _) in row["seconds"].items()), reverse=True)
    return ", ".join(f"{name} {share:.0%}" for share, name in shares if share >= least)


def _spread(values: Sequence[float]) -> list[float]:
    return [round(value, 6) for value in (min(values), sum(values) / len(values), max(values))]


def _names(parts: Any) -> list[str]:
    """Names in any of the mappings, in the order of :data:`PHASES`, then others, :data:`OTHER` last."""
    found = {name for part in parts for name in part}
    order = {name: place for place, name in enumerate(PHASES)}
    return sorted(found, key=lambda name: (name == OTHER, order.get(name, len(order)), name))


def _add(sums: dict[str, int], more: Mapping[str, int]) -> None:
    for name, number in more.items():
        sums[name] = sums.get(name, 0) + number
