"""Puts a model behind HTTP on the Ray cluster at hand, and proves it by asking over HTTP.

Nothing is believed that was not seen from outside: after Serve says that the application runs, `deploy` asks
the URL real questions, and compares the scores with those the model gives in this process. The application
outlives the driver. A deployment that fails raises, and what answered before goes on answering.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import time
from dataclasses import dataclass
from typing import Any

import httpx

from kgray.artifact import Artifact
from kgray.artifact.manifest import code_version
from kgray.config import to_dict
from kgray.errors import ConfigError, KgrayError, UserError
from kgray.serving.config import ServeConfig
from kgray.serving.names import QueryError
from kgray.serving.predictor import Predictor, Query, Ranking

TOLERANCE = 1e-5
"""Largest difference between a score over HTTP and the same score here, relative where it is above 1."""

_ELSEWHERE = frozenset({"examples", "startup_timeout_s", "host", "port", "insecure"})
"""Settings that a running replica does not know, so that a change of theirs needs no new one."""

_PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20"}
"""Serve kills an HTTP server that has not come up within three times this many seconds. Its own 5 are too few
on a small machine that has other work, and starting again from nothing does not help it."""

log = logging.getLogger(__name__)


class DeployError(KgrayError):
    """The model does not answer over HTTP as it should. What answered before does so still."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One exchange over HTTP: what was sent to ``path``, and the status and JSON that came back."""

    path: str
    request: dict[str, Any]
    status: int
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DeployResult:
    """``up_to_date``: this version answered already and nothing was changed."""

    url: str
    version: str
    up_to_date: bool
    answers: tuple[Answer, ...]


def deploy(config: ServeConfig, model: Artifact, *, verify: bool = True) -> DeployResult:
    """Serve ``model`` at ``http://host:port``; returns once it answers there, with the answers.

    Ray must be connected (``kgray.runtime.ray_session``). Deploying what answers already changes nothing.
    ``verify`` compares the scores that come back with the model's own, to `TOLERANCE`.

    Raises ConfigError: an example names something the graph lacks; the port is taken; Serve runs on this
    cluster with another address. DeployError: it did not come up, or answers wrongly. ArtifactError: the
    artifact is damaged.
    """
    from kgray.serving.app import load_predictor

    # Everything that can be found wrong here is found before anything that runs is touched.
    predictor = load_predictor(model.uri)
    queries = _queries(config, predictor)
    expected = _expected(config, predictor, queries)
    _start_serve(config)
    url = _url(config)
    arguments = {
        "model": model.uri,
        "serve": to_dict(config),
        "fingerprint": _fingerprint(config, model),
    }
    before = _running(config.name)
    up_to_date = (
        before.arguments is not None
        and before.arguments["fingerprint"] == arguments["fingerprint"]
        and _answering(url) == model.version
    )
    try:
        if not up_to_date:
            _run(config, arguments, time.monotonic() + config.startup_timeout_s)
            _await_version(url, model.version, time.monotonic() + config.startup_timeout_s)
        answers = tuple(_ask(url, config, query) for query in queries)
        if verify:
            for answer, ranking in zip(answers, expected, strict=True):
                _compare(answer, ranking)
    except Exception:
        if not up_to_date:
            _go_back(config, before)
        raise
    return DeployResult(url, model.version, up_to_date, answers)


def _queries(config: ServeConfig, predictor: Predictor) -> list[Query]:
    """The configured examples, then one question of each kind made from facts of the graph itself."""
    queries = [Query(e.head, e.relation, e.tail, e.top_k, e.filter_known) for e in config.examples]
    top_k = min(3, config.max_top_k)
    for fact, missing in zip(predictor.facts(3), ("tail", "head", "relation"), strict=False):
        queries.append(
            Query(
                head=None if missing == "head" else fact.head,
                relation=None if missing == "relation" else fact.relation,
                tail=None if missing == "tail" else fact.tail,
                top_k=top_k,
            )
        )
    return queries


def _expected(config: ServeConfig, predictor: Predictor, queries: list[Query]) -> list[Ranking]:
    """The model's own answers. ConfigError when an example asks for something the graph does not have."""
    rankings = []
    for place, answer in enumerate(predictor.predict(queries)):
        if isinstance(answer, QueryError) and place < len(config.examples):
            key = f"serve.examples[{place}].{answer.field}"
            raise ConfigError(key, answer.value, problem=f"does not fit the graph: {answer.message}")
        if not isinstance(answer, Ranking):
            raise answer
        rankings.append(answer)
    return rankings


def _start_serve(config: ServeConfig) -> None:
    """Start Serve's controller and HTTP server, or see that those which run are the ones wanted."""
    from ray import serve
    from ray.exceptions import RayActorError

    # No public call tells the HTTP options of a running Serve from inside the cluster, and `serve.start`
    # ignores options that differ.
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        running = (client.http_config.host, client.http_config.port)
        if running != (config.host, config.port):
            key = "serve.port" if running[0] == config.host else "serve.host"
            raise ConfigError(
                key,
                getattr(config, key.split(".")[1]),
                f"{running[0]}:{running[1]}, where Serve runs on this cluster already (its address cannot be "
                "changed while it runs: use that one, or end Serve with 'serve shutdown' first)",
            )
        return
    if _on_head():
        _check_free(config)
    # The service answers 504 itself; this is for a replica that cannot.
    timeout_s = 2 * config.request_timeout_s + 5
    try:
        serve.start(
            http_options={"host": config.host, "port": config.port, "request_timeout_s": timeout_s},
            controller_options={"runtime_env": {"env_vars": _PATIENCE}},
        )
    except (RayActorError, TimeoutError) as error:
        # Serve goes on trying. Whether the URL answers in time is seen in the end, and all that counts.
        log.warning("the HTTP server of Serve is slow to start: %s", str(error).splitlines()[0])


def _check_free(config: ServeConfig) -> None:
    """ConfigError when another program listens on the port. Serve itself would only wait and time out."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            problem = f"cannot be used at {config.host}:{config.port}: {error.strerror}"
            raise ConfigError(
                "serve.port", config.port, "a free port and an address of this machine", problem=problem
            ) from None


def _url(config: ServeConfig) -> str:
    """Where to ask. A server that listens everywhere is asked on the head node."""
    host = config.host
    if host in ("0.0.0.0", "::"):
        host = str(_head()["NodeManagerAddress"])
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def _head() -> dict[str, Any]:
    """The cluster's head node, where Serve always has an HTTP server."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()
    return next(node for node in nodes if node["Alive"] and "node:__internal_head__" in node["Resources"])


def _on_head() -> bool:
    import ray

    return bool(ray.get_runtime_context().get_node_id() == _head()["NodeID"])


def _fingerprint(config: ServeConfig, model: Artifact) -> str:
    """Tells deployments apart: equal where replacing one by the other would change nothing."""
    settings = {key: value for key, value in to_dict(config).items() if key not in _ELSEWHERE}
    # The hash of the sources alone: a Ray job's copy of them has no git commit.
    code = code_version().split(".git.")[0]
    content = {"model": model.uri, "version": model.version, "code": code, "serve": settings}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class _Running:
    """Whether there is an application of our name, and what it was deployed from, if it can tell."""

    exists: bool
    arguments: dict[str, Any] | None


def _running(name: str) -> _Running:
    from ray import serve

    if name not in serve.status().applications:
        return _Running(False, None)
    try:
        handle = serve.get_app_handle(name)
        return _Running(True, handle.deployed_from.remote().result(timeout_s=10))
    except Exception as error:
        # Whatever hinders it from answering, it is nothing that can be gone back to.
        log.warning("application %r is there but does not answer: %s", name, error)
        return _Running(True, None)


def _run(config: ServeConfig, arguments: dict[str, Any], deadline: float) -> None:
    """Hand the application to Serve and wait until it runs. DeployError with Serve's own words if not."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from kgray.serving.app import AppArgs, build

    target = serve.RunTarget(build(AppArgs(**arguments)), name=config.name, route_prefix="/")
    try:
        serve.run_many([target], wait_for_applications_running=False)
    except RayServeException as error:
        # Another application has the route. Ray puts the traceback of its controller into the text.
        reason = getattr(error, "cause", error)
        raise UserError(f"Serve refuses to run {config.name!r} (serve.name): {reason}") from error
    except TimeoutError as error:
        log.warning("Serve is slow: %s", error)
    while True:
        status = serve.status().applications[config.name]
        if status.status == "RUNNING":
            return
        why = status.message or "; ".join(d.message for d in status.deployments.values() if d.message)
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise DeployError(f"Serve could not start model {arguments['model']}: {why}")
        if time.monotonic() > deadline:
            state = status.status.value
            raise DeployError(f"the deployment is still {state} after {config.startup_timeout_s:g} s; {why}")
        time.sleep(0.2)


def _await_version(url: str, version: str, deadline: float) -> None:
    """Wait until three answers in a row carry ``version``: old replicas may still finish."""
    in_a_row = 0
    while in_a_row < 3:
        seen = _answering(url)
        in_a_row = in_a_row + 1 if seen == version else 0
        if in_a_row == 0:
            if time.monotonic() > deadline:
                what = f"answers with version {seen}" if seen else "does not answer"
                raise DeployError(f"{url} {what}, though version {version} was deployed there")
            time.sleep(0.2)


def _answering(url: str) -> str | None:
    """The model version that answers and is ready at ``url``; None when nothing does."""
    try:
        response = httpx.get(f"{url}/readyz", timeout=10, trust_env=False)
    except httpx.HTTPError:
        return None
    return response.headers.get("x-kgray-model-version") if response.status_code == 200 else None


def _go_back(config: ServeConfig, before: _Running) -> None:
    """After a failure: make what answered before the wanted state again, or take the failed one away."""
    from ray import serve

    try:
        if before.arguments is not None:
            log.warning("the deployment failed; going back to %s", before.arguments["model"])
            _run(config, before.arguments, time.monotonic() + config.startup_timeout_s)
        elif not before.exists:
            serve.delete(config.name)
    except Exception:
        # The failure that brought us here matters more; Serve keeps the old replicas in any case.
        log.exception("could not clean up after the failed deployment")


def _ask(url: str, config: ServeConfig, query: Query) -> Answer:
    request: dict[str, Any] = {
        part: value for part in ("head", "relation", "tail") if (value := getattr(query, part)) is not None
    }
    request |= {"top_k": query.top_k, "filter_known": query.filter_known}
    timeout = config.request_timeout_s + 5
    try:
        # Proxies of the environment are for the world outside, not for this machine.
        response = httpx.post(f"{url}/v1/predict", json=request, timeout=timeout, trust_env=False)
        return Answer("/v1/predict", request, response.status_code, response.json())
    except (httpx.HTTPError, ValueError) as error:
        raise DeployError(f"{url}/v1/predict does not answer {request}: {error!r}") from error


def _compare(answer: Answer, ranking: Ranking) -> None:
    """DeployError unless the answer holds what the model itself says."""
    if answer.status != 200:
        raise DeployError(f"{answer.path} answers {answer.status} to {answer.request}: {answer.body}")
    online = {p["id"]: float(p["score"]) for p in answer.body["predictions"]}
    offline = {p.id: p.score for p in ranking.predictions}
    # Near ties may change places between machines: scores are compared, best to worst, not ids.
    pairs = list(zip(sorted(online.values()), sorted(offline.values()), strict=False))
    if len(online) != len(offline) or any(abs(a - b) > TOLERANCE * max(1.0, abs(b)) for a, b in pairs):
        raise DeployError(f"{answer.path} answers {answer.request} with {online}, but the model gives {offline}")
