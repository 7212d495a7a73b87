"""Deploying: the model behind HTTP, and the artifact that keeps what it answered when it was proved. Floor 6.

A deployment is a process, so "up to date" means two things. On a cluster that outlives the job (RAY_ADDRESS,
``ray job submit``, ``ray.address``) the job always makes sure that the service answers with this model, and
changes nothing where it does. In a Ray of the job's own the service ends with the job: it is started to prove
itself once, the answers are kept in the ``deployment`` artifact, and later runs show those instead of
starting it again, unless they are asked to keep serving.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from dataclasses import asdict
from typing import Any

from kgray.artifact import Artifact, Draft, Recipe
from kgray.config import to_dict
from kgray.lineage.tracking import Run
from kgray.pipeline.plan import Work

log = logging.getLogger(__name__)

FORMAT = 2  # 2: answers carry probabilities and answer sets
ANSWERS = "answers.json"


def deployment_recipe(work: Work) -> Recipe:
    """A deployment is the model it serves and how it is served."""
    return Recipe("deployment", FORMAT, (work.artifacts["ensemble"].source,), to_dict(work.settings.serve))


def outlives(work: Work) -> bool:
    """Whether the job joins a cluster, which goes on when the job has ended."""
    return (work.settings.ray.address or os.environ.get("RAY_ADDRESS") or "local") != "local"


def deploy_step(work: Work, *, keep_serving: bool) -> str | None:
    """Deploy the ensemble unless that would prove nothing new; returns the URL where it answers now.

    Raises what ``kgray.serving.deploy.deploy`` raises.
    """
    begin = time.monotonic()
    recipe = deployment_recipe(work)
    found = work.store.find(recipe)
    if found is not None and not keep_serving and not outlives(work):
        log.info(
            "deploy: up to date (%s %s); its service ended with the job that started it. Below: the answers "
            "it gave then; --keep-serving starts it again",
            found.kind,
            found.version,
        )
        work.record("deploy", found, begin, up_to_date=True)
        return None
    if found is not None:
        url, _ = _deploy(work)
        work.record("deploy", found, begin, up_to_date=True)
        return url
    work.ray()
    with work.tracked("deploy", ("serve",), recipe) as run:
        # What answers is proved before the artifact says so, and the artifact is there before anyone is told.
        url, content = _deploy(work)
        built = work.store.build(recipe, lambda draft: _write(draft, content))
        _note(run, built.artifact, url)
    work.record("deploy", built.artifact, begin, up_to_date=built.up_to_date)
    return url


def _deploy(work: Work) -> tuple[str, dict[str, Any]]:
    from kgray.serving.deploy import deploy

    work.ray()
    result = deploy(work.settings.serve, work.artifacts["ensemble"])
    log.info("deploy: model %s answers at %s", result.version, result.url)
    return result.url, asdict(result)


def _write(draft: Draft, content: dict[str, Any]) -> dict[str, Any]:
    draft.write_json(ANSWERS, content)
    return {"answers": len(content["answers"])}


def _note(run: Run, artifact: Artifact, url: str) -> None:
    run.output(artifact)
    run.tag(url=url)


def exchanges(deployment: Artifact) -> str:
    """The questions asked over HTTP and what was answered, for people."""
    content = deployment.read_json(ANSWERS)
    return "\n".join(_exchange(content["url"], answer) for answer in content["answers"])


def _exchange(url: str, answer: dict[str, Any]) -> str:
    body = answer["body"]
    lines = [f"POST {url}{answer['path']} {json.dumps(answer['request'], ensure_ascii=False)}"]
    if "predictions" not in body:
        return f"{lines[0]}\n  {answer['status']} {json.dumps(body, ensure_ascii=False)}"
    lines.append(f"  {answer['status']}  model {body['model']['version']}  {body['missing']}:")
    for one in body["predictions"]:
        known = "  (known)" if one["known"] else ""
        sure = "" if one.get("probability") is None else f"  {one['probability']:>5.1%}"
        lines.append(f"  {one['rank']:>4}  {one['score']:>8.3f}{sure}  {one['name']}{known}")
    return "\n".join(lines)


def wait_for_signal() -> None:
    """Stay until SIGINT or SIGTERM."""
    asked = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        while not asked.wait(1.0):
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
