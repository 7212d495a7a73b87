"""Jobs as a graph of artifacts, run by one driver, each step skipped where its artifact is there. Floor 6.

A step knows its inputs by the names of other steps, can tell the recipe of what it would write, and can write
it. Running is a walk over the steps in the order of their inputs: recipe, look it up, build what is missing.
That is also how a broken pipeline resumes. Neither Ray nor MLflow is touched until a step must run.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kgray.artifact import Artifact, Draft, Recipe, Store
from kgray.config import to_dict
from kgray.lineage.tracking import Run, Tracker, job_tags

if TYPE_CHECKING:
    from kgray.pipeline.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One artifact of the pipeline.

    needs: steps whose artifacts it reads. recipe and make read those from ``Work.artifacts``; make gets the
    MLflow run for numbers that move, and returns the counts of the manifest. sections: configuration recorded
    with the run. done: called in the run after the artifact is published (to register a model).
    """

    name: str
    needs: tuple[str, ...]
    recipe: Callable[[Work], Recipe]
    make: Callable[[Work, Draft, Run], Mapping[str, Any] | None]
    sections: tuple[str, ...] = ()
    done: Callable[[Work, Run, Artifact], None] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a step. status: "done" or "up to date"; seconds: what it took here."""

    step: str
    status: str
    artifact: Artifact
    seconds: float


@dataclass
class Work:
    """One run of the driver: what is configured, what has been built, and Ray and MLflow once something needs
    them.

    A context manager: leaving it ends the MLflow run and the Ray session it began.
    """

    settings: Settings
    name: str
    store: Store = field(init=False)
    tracker: Tracker = field(init=False)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    parent: Run | None = None
    _session: Any = None
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __post_init__(self) -> None:
        self.store = Store(self.settings.storage.root)
        self.tracker = Tracker(self.settings.lineage, self.store.root)

    def __enter__(self) -> Work:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    def ray(self) -> Any:
        """The Ray session, started or joined at the first call."""
        if self._session is None:
            from kgray.runtime import ray_session

            self._session = self._stack.enter_context(ray_session(self.settings.ray))
        return self._session

    @contextlib.contextmanager
    def tracked(self, step: str, sections: Sequence[str], recipe: Recipe) -> Iterator[Run]:
        """The step's run in MLflow, nested under the one of this driver."""
        tags = job_tags()
        if self.parent is None:
            whole = self.tracker.run(
                self.name, params=to_dict(self.settings), tags={**tags, "kgray.job": self.name}
            )
            self.parent = self._stack.enter_context(whole)
        params = {name: to_dict(getattr(self.settings, name)) for name in sections}
        tags |= {"kgray.job": step, "kgray.version": recipe.version}
        with self.tracker.run(
            step, params=params, tags=tags, inputs=recipe.inputs, parent=self.parent
        ) as run:
            yield run

    def run(self, step: Step) -> Outcome:
        """The step's artifact, built if it is not there yet."""
        begin = time.monotonic()
        recipe = step.recipe(self)
        found = self.store.find(recipe)
        if found is not None:
            log.info("%s: up to date (%s %s)", step.name, found.kind, found.version)
            return self.record(step.name, found, begin, up_to_date=True)
        log.info("%s: building %s %s", step.name, recipe.kind, recipe.version)
        self.ray()
        with self.tracked(step.name, step.sections, recipe) as run:
            built = self.store.build(recipe, lambda draft: step.make(self, draft, run))
            run.output(built.artifact)
            run.metrics(0, built.artifact.counts)
            if step.done is not None:
                step.done(self, run, built.artifact)
        outcome = self.record(step.name, built.artifact, begin, up_to_date=built.up_to_date)
        log.info(
            "%s: %s %s in %.1f s", step.name, built.artifact.kind, built.artifact.version, outcome.seconds
        )
        return outcome

    def record(self, step: str, artifact: Artifact, begin: float, *, up_to_date: bool) -> Outcome:
        """Note what became of a step; later steps find its artifact."""
        outcome = Outcome(step, "up to date" if up_to_date else "done", artifact, time.monotonic() - begin)
        self.artifacts[step] = artifact
        self.outcomes.append(outcome)
        return outcome


def needed(steps: Sequence[Step], targets: Sequence[str]) -> list[Step]:
    """The targets and all they need, inputs first, in the order the steps are given.

    Raises KeyError for a name that is no step, ValueError where steps need each other in a circle.
    """
    by_name = {step.name: step for step in steps}
    order: list[Step] = []
    state: dict[str, str] = {}

    def visit(name: str) -> None:
        if state.get(name) == "done":
            return
        if state.get(name) == "open":
            raise ValueError(f"step {name!r} needs itself")
        state[name] = "open"
        for other in by_name[name].needs:
            visit(other)
        state[name] = "done"
        order.append(by_name[name])

    for target in targets:
        visit(target)
    return order
