"""The candidates of one model divided among Ray actors: each reads the states of its own range alone, and keeps them.

Where entities are so many that a node's memory does not hold their states, a worker that answers alone reads all of
them from disk for every batch. Divided, each holder finds its share in memory, every worker asks all holders, and what
they say of their ranges adds up exactly (:mod:`kgray.evaluation.ranged`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from kgray.artifact import Artifact
from kgray.errors import ConfigError
from kgray.runtime import remote_errors

_RETRIES = 3


class _Holder:
    """What runs in an actor. start, stop: its candidates, looked at ``size`` at a time."""

    def __init__(self, model: Artifact, size: int, start: int, stop: int) -> None:
        self._model, self._bounds = model, (size, start, stop)
        self._blocks: Any = None

    def each(self, method: str, *arguments: Any) -> Any:
        """See ``Blocks.each``; the model is opened with the first call, so that what is wrong with it is its answer."""
        from kgray.evaluation.ranged import Blocks
        from kgray.model.bundle import Bundle

        if self._blocks is None:
            self._blocks = Blocks(Bundle.load(self._model).scorer, *self._bounds)
        return self._blocks.each(method, *arguments)


@dataclass(frozen=True)
class Holders:
    """Implements ``Ranges``; pickles into workers. batch: queries at once that holders have memory for."""

    actors: tuple[Any, ...]
    batch: int

    def each(self, method: str, *arguments: Any) -> Any:
        """All holders at a time, their answers added up."""
        import ray

        from kgray.evaluation.merging import total

        with remote_errors():
            return total(ray.get([actor.each.remote(method, *arguments) for actor in self.actors]))


def plan_ranges(model: Artifact, cells: int, holders: int) -> tuple[int, list[tuple[int, int, int]]]:
    """Queries at once, and (size, start, stop) of each holder: whole ranges of ``size`` candidates.

    Raises ConfigError for a member that cannot be scored by range. Of few candidates there are fewer holders.
    """
    from kgray.evaluation.ranged import BATCH, can_range, members_of, sizes
    from kgray.model.bundle import Bundle

    bundle = Bundle.load(model)
    whole = [name for name, member in members_of(bundle.scorer, "tail").items() if not can_range(member)]
    if whole:
        expected = f"0 with the members {', '.join(whole)}: every holder would compute all of what they say"
        raise ConfigError("predict.holders", holders, expected)
    batch, size = sizes(bundle.scorer, bundle.num_entities, cells) or (BATCH, bundle.num_entities)
    size = min(size, -(-bundle.num_entities // holders))
    ranges = -(-bundle.num_entities // size)
    cuts = [min(ranges * number // holders * size, bundle.num_entities) for number in range(holders + 1)]
    return batch, [(size, start, stop) for start, stop in pairwise(cuts) if start < stop]


@contextlib.contextmanager
def held(model: Artifact, cells: int, holders: int) -> Iterator[Holders | None]:
    """The holders, for the length of the block; None for none. Needs a Ray session."""
    if not holders:
        yield None
        return
    import ray

    with remote_errors():
        batch, bounds = ray.get(ray.remote(plan_ranges).remote(model, cells, holders))
    # Ray starts a holder that died anew, and asks it again: it holds nothing that is not on disk.
    options = {"num_cpus": 1, "max_restarts": -1, "max_task_retries": _RETRIES, "scheduling_strategy": "SPREAD"}
    actors = [ray.remote(_Holder).options(**options).remote(model, *one) for one in bounds]
    try:
        yield Holders(tuple(actors), batch)
    finally:
        for actor in actors:
            ray.kill(actor)
