"""The Ray Serve application: one deployment whose replicas parse, batch, score and answer.

Parsing and scoring share a process on purpose. A replica is then of one version as a whole (a half-done
redeployment cannot label the scores of one model with the version of another), a request costs one hop
less, and more load is met by more replicas. Scoring runs in a thread, so that health checks and refusals are
answered while it does.

No ``from __future__ import annotations``: Serve looks at the annotation of `build` as a class.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve

from kgray.config import from_dict
from kgray.serving.api import Scored, create_api
from kgray.serving.config import ServeConfig
from kgray.serving.predictor import Predictor, Query, Triple


class AppArgs(BaseModel):
    """What an application is built from; also the ``args`` of a Serve YAML file.

    ``model``: URI of a model artifact. ``serve``: the `serve` section as plain values. ``fingerprint``: tells
    one deployment from another, see ``kgray.serving.deploy``.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    serve: dict[str, Any] = {}
    fingerprint: str = ""


def load_predictor(uri: str) -> Predictor:
    """The predictor of the model artifact at ``uri``.

    Raises ArtifactError when it is absent, damaged, or of another kind.
    """
    # Here, not above: a driver that only builds the application needs no torch.
    from kgray.artifact import Artifact
    from kgray.errors import ArtifactError
    from kgray.model.bundle import Bundle
    from kgray.serving.newcomers import predictor_of

    artifact = Artifact.load(uri)
    if artifact.kind != "model":
        raise ArtifactError(f"{uri} is an artifact of kind {artifact.kind!r}, not 'model'")
    return predictor_of(artifact, Bundle.load(artifact))


class Replica:
    """Holds one model and answers for it; `serve.ingress` below makes it an HTTP server."""

    def __init__(self, args: dict[str, Any]) -> None:
        import torch

        self._args = args
        self._config = from_dict(ServeConfig, args["serve"], where="serve")
        torch.set_num_threads(self._config.threads)
        self._predictor = load_predictor(args["model"])
        for batched in (self._predict, self._score):
            batched.set_max_batch_size(self._config.max_batch_size)
            batched.set_batch_wait_timeout_s(self._config.batch_wait_s)

    def __serve_build_asgi_app__(self) -> Any:
        # Serve calls this once, after __init__. Its proxy writes X-Request-Id.
        return create_api(self, self._config, own_request_id=False)

    def check_health(self) -> None:
        """Serve restarts a replica whose check raises: a model that no longer scores finite numbers does."""
        answer = self._predictor.score(self._predictor.facts(1))
        for item in answer:
            if isinstance(item, Exception):
                raise item

    def deployed_from(self) -> dict[str, Any]:
        """The arguments of this deployment, for `deploy` to compare with and to go back to."""
        return self._args

    @property
    def version(self) -> str:
        return self._predictor.version

    @property
    def ready(self) -> bool:
        # Serve routes nothing to a replica before __init__ is done, and that loads the model.
        return True

    def about(self) -> Mapping[str, Any]:
        """Graph version, counts, metrics: what /v1/model tells."""
        return self._predictor.about()

    def facts(self, count: int) -> list[Triple]:
        """Known facts, as examples."""
        return self._predictor.facts(count)

    async def predict(self, query: Query) -> Scored:
        """Rank one query, together with whatever others wait."""
        scored: Scored = await self._predict(query)
        return scored

    async def score(self, triples: list[Triple]) -> Scored:
        """Score the triples of one request, together with those of others."""
        scored: Scored = await self._score(triples)
        return scored

    @serve.batch
    async def _predict(self, queries: list[Query]) -> list[Scored]:
        started = time.perf_counter()
        answers = await asyncio.to_thread(self._predictor.predict, queries)
        seconds = time.perf_counter() - started
        return [Scored([answer], len(queries), seconds) for answer in answers]

    @serve.batch
    async def _score(self, requests: list[list[Triple]]) -> list[Scored]:
        started = time.perf_counter()
        flat = [triple for request in requests for triple in request]
        answers = await asyncio.to_thread(self._predictor.score, flat)
        seconds = time.perf_counter() - started
        scored, start = [], 0
        for request in requests:
            scored.append(Scored(answers[start : start + len(request)], len(requests), seconds))
            start += len(request)
        return scored


def build(args: AppArgs) -> serve.Application:
    """The application of one model; `serve run kgray.serving.app:build model=URI` works too."""
    config = from_dict(ServeConfig, args.serve, where="serve")
    # The guard inside the replica refuses overload in our words; it must be let in to do so. What Serve
    # refuses itself, in plain text, is only what comes on top of twice the limits.
    inside = config.max_ongoing_requests + config.max_queued_requests
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="Replica",
        num_replicas=config.replicas,
        max_ongoing_requests=2 * inside,
        max_queued_requests=2 * inside,
        backpressure_config={"status_code": 429, "retry_after_s": config.retry_after_s},
        ray_actor_options={"num_cpus": config.num_cpus},
        # New replicas must answer before old ones stop: no gap, and a broken version changes nothing.
        max_surge_percent=100,
        graceful_shutdown_timeout_s=config.request_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return deployment.bind({"model": args.model, "serve": dict(args.serve), "fingerprint": args.fingerprint})
