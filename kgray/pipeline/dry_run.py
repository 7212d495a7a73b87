"""``jobs.train --dry-run``: what training would need, against what there is. Floor 6."""

from __future__ import annotations

from typing import Any

from kgray.errors import UserError
from kgray.pipeline import steps
from kgray.pipeline.plan import Work, needed
from kgray.pipeline.settings import Settings


def dry_run(settings: Settings, config: str) -> dict[str, Any]:
    """Log memory, disk and time of training the main model; the fields of the line of JSON. Nothing is built.

    Raises UserError where an artifact that training reads is not there yet, TrainingError where it would be refused.
    """
    from kgray.training.distributed import rehearse

    with Work(settings, "train --dry-run") as work:
        *inputs, train = needed(steps.steps_of(settings), steps.targets_of("train", settings))
        for step in inputs:
            recipe = step.recipe(work)
            found = work.store.find(recipe)
            if found is None:
                raise UserError(
                    f"--dry-run measures with artifacts that are there and builds none: {recipe.kind} {recipe.version} "
                    f"is missing; run python -m jobs.{step.name} {config} first"
                )
            work.artifacts[step.name] = found
        version = train.recipe(work).version
        work.ray()
        graph, vectors = work.artifacts["ingest"], work.artifacts.get("embed")
        needs = rehearse(work.store, settings.model, settings.train, graph, vectors, settings.graph)
    return {"status": "dry run", "version": version, "metrics": dict(needs)}
