"""Running plain functions as Ray tasks. Functions stay free of Ray, so unit tests call them directly.

Why tasks and not Ray Data pipelines: encoding needs one shuffle whose buckets come back to where they came from,
and every stage here takes some hundredths of a second of overhead where a Data pipeline takes seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from kgray.errors import KgrayError

log = logging.getLogger(__name__)
REPORT_EVERY_S = 10.0


def start(name: str, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], returns: int = 1) -> list[Any]:
    """Start one task per tuple of arguments; object references among the arguments (also in lists) are followed.

    Returns a reference for each, or with ``returns`` > 1 a list of that many.
    """
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


def fetch(name: str, references: Sequence[Any], until: Callable[[Any], None] | None = None) -> list[Any]:
    """The values of small results, in order; says how far it is from time to time.

    ``until`` sees each result in order, before a later failure is raised. An error of kgray raised in a task is
    raised as itself.
    """
    import ray

    _watch(name, references)
    values = []
    for reference in references:
        try:
            value = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, KgrayError):
                raise error.cause from None
            raise
        if until:
            until(value)
        values.append(value)
    return values


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
            left = (now - begun) / count * len(waiting) if count else float("nan")
            log.info("%s: %d of %d tasks, about %.0f s left", name, count, len(references), left)
        if not done and not waiting:
            break
