"""Running plain functions as Ray tasks. Functions stay free of Ray, so unit tests call them directly.

Why tasks and not Ray Data pipelines: encoding needs one shuffle whose buckets come back to where they came from, with
a bound on memory that Ray's object store does not give, and every stage here takes some hundredths of a second of
overhead where a Data pipeline takes seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kgray.runtime import remote_errors

log = logging.getLogger(__name__)
_in_process = False


@dataclass
class _Failed:
    """Stands for the result of a call that raised, until it is fetched."""

    error: Exception


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function with all tasks it starts running at once, in this process, in order.

    Small data is taken whole by one task this way: a second worker would take longer to start than to help.
    """
    global _in_process
    before, _in_process = _in_process, True
    try:
        return function(*arguments)
    finally:
        _in_process = before


def _call_here(function: Callable[..., Any], arguments: tuple[Any, ...], returns: int) -> Any:
    given = [one for argument in arguments for one in (argument if isinstance(argument, list) else [argument])]
    failed = next((one for one in given if isinstance(one, _Failed)), None)
    if failed is None:
        try:
            return function(*arguments)
        except Exception as error:
            failed = _Failed(error)
    return failed if returns == 1 else [failed] * returns


REPORT_EVERY_S = 10.0


def start(name: str, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], returns: int = 1) -> list[Any]:
    """Start one task per tuple of arguments; object references among the arguments (also in lists) are followed.

    Returns a reference for each, or with ``returns`` > 1 a list of that many.
    """
    if _in_process:
        return [_call_here(function, one, returns) for one in arguments]
    import ray

    # Ray follows references that are arguments themselves, not those within lists: so lists are laid out flat.
    remote = ray.remote(_flat_call).options(num_returns=returns, name=f"ingest: {name}", num_cpus=1)
    return [remote.remote(function, *_flatten(one)) for one in arguments]


def _flatten(arguments: tuple[Any, ...]) -> list[Any]:
    """A layout, then the leaves: -1 for an argument of its own, n for a list of n."""
    import ray

    layout: list[int] = []
    leaves: list[Any] = []
    for argument in arguments:
        if isinstance(argument, list) and any(isinstance(item, ray.ObjectRef) for item in argument):
            layout.append(len(argument))
            leaves += argument
        else:
            layout.append(-1)
            leaves.append(argument)
    return [layout, *leaves]


def _flat_call(function: Callable[..., Any], layout: list[int], *leaves: Any) -> Any:
    arguments: list[Any] = []
    at = 0
    for size in layout:
        arguments.append(leaves[at] if size < 0 else list(leaves[at : at + size]))
        at += abs(size)
    return function(*arguments)


def fetch(name: str, references: Sequence[Any]) -> list[Any]:
    """The values of small results, in order; says how far it is from time to time.

    An error of kgray raised in a task is raised as itself, the first in order.
    """
    if not _in_process:
        _watch(name, references)
    return [_value(reference) for reference in references]


def _value(reference: Any) -> Any:
    if _in_process:
        if isinstance(reference, _Failed):
            raise reference.error
        return reference
    import ray

    with remote_errors():
        return ray.get(reference)


def run_all(name: str, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Start tasks and fetch their small results."""
    return fetch(name, start(name, function, arguments))


def _watch(name: str, references: Sequence[Any]) -> None:
    import ray

    begun = told = time.monotonic()
    waiting = list(references)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=REPORT_EVERY_S)
        now = time.monotonic()
        if waiting and now - told >= REPORT_EVERY_S:
            told = now
            count = len(references) - len(waiting)
            left = f", about {(now - begun) / count * len(waiting):.0f} s left" if count else ""
            log.info("%s: %d of %d tasks%s", name, count, len(references), left)
        if not done and not waiting:
            break
