"""The stop-watch of phases: seconds add up, the inner phase counts, ranks are merged.

python3 -m pytest tests/unit/test_phases.py
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kgray.phases import OTHER, Phases, brief, counted, flat, merged, phase, total


class Clock:
    """Moves only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture()
def clock() -> Clock:
    return Clock()


@pytest.fixture()
def watch(clock: Clock) -> Iterator[Phases]:
    with Phases(clock).running() as running:
        yield running


def test_the_inner_phase_counts_and_all_adds_up(clock: Clock, watch: Phases) -> None:
    clock.now += 1
    with phase("forward"):
        clock.now += 2
        with phase("encoding"):
            clock.now += 4
            counted("rows", 7)
        clock.now += 8
    clock.now += 16
    with phase("forward"):
        clock.now += 32
    spent = watch.take()
    assert spent.seconds == {OTHER: 17, "forward": 42, "encoding": 4}
    assert spent.wall == 63 == sum(spent.seconds.values())
    assert spent.calls == {"forward": 2, "encoding": 1} and spent.counts == {"rows": 7}
    assert watch.take().wall == 0, "taken once"


def test_a_whole_phase_keeps_what_is_inside(clock: Clock, watch: Phases) -> None:
    with phase("evaluation", whole=True):
        clock.now += 1
        with phase("encoding"), phase("fetching"):
            clock.now += 2
            counted("rows", 7)
        clock.now += 4
    with phase("encoding"):
        clock.now += 8
    spent = watch.take()
    assert spent.seconds == {"evaluation": 7, "encoding": 8, OTHER: 0}
    assert spent.calls == {"evaluation": 1, "encoding": 1} and not spent.counts


def test_an_error_closes_its_phases_and_a_take_within_one_splits_it(clock: Clock, watch: Phases) -> None:
    with pytest.raises(KeyError), phase("forward"), phase("encoding"):
        clock.now += 1
        raise KeyError
    clock.now += 2
    with phase("evaluation"):
        clock.now += 4
        assert watch.take().seconds == {OTHER: 2, "encoding": 1, "forward": 0, "evaluation": 4}
        clock.now += 8
    assert watch.take().seconds == {"evaluation": 8, OTHER: 0}


def test_without_a_watch_nothing_is_kept_and_threads_have_their_own(clock: Clock, watch: Phases) -> None:
    ahead = watch.ahead()

    def work() -> None:
        with phase("sampling"):  # no watch runs in this thread yet
            clock.now += 1
        with ahead.running():
            with phase("sampling"):
                clock.now += 2
                counted("edges", 5)
            clock.now += 4  # waits to be asked for more

    thread = threading.Thread(target=work)
    with phase("waiting"):
        thread.start()
        thread.join()
    spent = watch.take()
    assert spent.seconds["waiting"] == 7 == spent.wall
    assert spent.ahead == {"sampling": 2} and spent.counts == {"edges": 5}


def test_ranks_are_merged_and_rows_summed(clock: Clock) -> None:
    parts = []
    for seconds in (2, 6):
        with Phases(clock).running() as watch:
            with phase("forward"):
                clock.now += seconds
                counted("edges", 10)
            if seconds == 6:
                with phase("odd"):
                    clock.now += 1
            parts.append(watch.take())
    row = merged("epoch 0", parts)
    assert row["wall"] == [2, 4.5, 7] and row["counts"] == {"edges": 20}
    assert list(row["seconds"]) == ["forward", "odd", OTHER]
    assert row["seconds"]["forward"] == [2, 4, 6] and row["seconds"]["odd"] == [0, 0.5, 1]
    assert flat(row)["seconds.forward"] == 4 and flat(row)["seconds.forward.max"] == 6
    assert flat(row)["count.edges"] == 20
    assert brief(row) == "forward 89%, odd 11%"
    both = total([row, row])
    assert both["seconds"]["forward"] == [4, 8, 12] and both["counts"] == {"edges": 40} and both["wall"][1] == 9
    assert total([])["wall"] == [0, 0, 0]
