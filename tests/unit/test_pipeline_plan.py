"""Steps as a graph of artifacts, without Ray.

python3 -m pytest tests/unit/test_pipeline_plan.py
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kgray.artifact import Recipe
from kgray.config import configuration, option
from kgray.lineage.config import LineageConfig
from kgray.pipeline.plan import Step, Work, needed


@configuration
class _Storage:
    root: str = option("", "Where.")


@configuration
class _Settings:
    """As much of the settings as the machinery itself reads."""

    storage: _Storage = option(_Storage, "Where.")
    lineage: LineageConfig = option(LineageConfig, "MLflow.")
    number: int = option(1, "What the steps depend on.")


@dataclass
class _Work(Work):
    """Counts how often Ray is asked for, in place of starting it."""

    started: int = field(default=0)

    def ray(self):
        self.started += 1


def work(root: Path, number: int = 1) -> _Work:
    lineage = LineageConfig(enabled=False)
    return _Work(_Settings(storage=_Storage(root=str(root)), lineage=lineage, number=number), "test")  # type: ignore[arg-type]


def chain(made: list[str], fail_at: str | None = None) -> list[Step]:
    """first -> second -> third; only second depends on the number."""

    def step(name: str, needs: tuple[str, ...]) -> Step:
        def recipe(work: Work) -> Recipe:
            config = {"number": work.settings.number} if name == "second" else {}
            return Recipe(name, 1, tuple(work.artifacts[n].source for n in needs), config)

        def make(work: Work, draft, run):
            made.append(name)
            draft.write_json("x.json", {})
            if name == fail_at:
                raise ValueError(name)
            return {"rows": 2}

        return Step(name, needs, recipe, make)

    return [step("first", ()), step("second", ("first",)), step("third", ("first", "second"))]


def run(root: Path, number: int = 1, **options) -> tuple[list[str], _Work]:
    made: list[str] = []
    with work(root, number) as doing:
        for step in chain(made, **options):
            doing.run(step)
    return made, doing


def test_everything_is_built_once_and_then_nothing_starts_ray(tmp_path):
    made, first = run(tmp_path)
    assert made == ["first", "second", "third"]
    made, second = run(tmp_path)
    assert made == [] and second.started == 0
    assert [o.status for o in second.outcomes] == ["up to date"] * 3
    assert [o.artifact.version for o in second.outcomes] == [o.artifact.version for o in first.outcomes]


def test_a_changed_setting_rebuilds_what_depends_on_it_and_only_that(tmp_path):
    run(tmp_path)
    made, _ = run(tmp_path, number=2)
    assert made == ["second", "third"]
    assert run(tmp_path, number=1)[0] == []  # the old ones are still there


def test_a_broken_pipeline_goes_on_where_it_broke(tmp_path):
    with pytest.raises(ValueError, match="second"):
        run(tmp_path, fail_at="second")
    assert not list(tmp_path.glob("second/*"))
    assert run(tmp_path)[0] == ["second", "third"]


def test_needed_is_the_target_and_its_inputs_first():
    steps = chain([])
    assert [s.name for s in needed(steps, ["second"])] == ["first", "second"]
    assert [s.name for s in needed(steps, ["third", "first"])] == ["first", "second", "third"]
    assert needed(steps, []) == []


def test_steps_that_need_each_other_are_refused():
    a = Step("a", ("b",), lambda w: Recipe("a", 1), lambda w, d, r: None)
    b = Step("b", ("a",), lambda w: Recipe("b", 1), lambda w, d, r: None)
    with pytest.raises(ValueError, match="needs itself"):
        needed([a, b], ["a"])
