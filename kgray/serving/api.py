"""The HTTP interface as a FastAPI application over any `Service`: no Ray here, so tests call it directly.

No ``from __future__ import annotations``: FastAPI reads the annotations of the functions defined inside
`create_api`, which as text could not be resolved.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from kgray.errors import NonFiniteError
from kgray.serving import schemas
from kgray.serving.config import ServeConfig
from kgray.serving.guard import Guard, GuardRules
from kgray.serving.names import Named, QueryError
from kgray.serving.openapi import describe_api
from kgray.serving.predictor import (
    AnswerSet,
    NewEntity,
    NewFact,
    Prediction,
    Query,
    Ranking,
    ScoredTriple,
    Triple,
)
from kgray.serving.problems import Problem, pointer

_FIELDS = {
    "predict": tuple(schemas.PredictRequest.model_fields),
    "score": tuple(schemas.ScoreRequest.model_fields),
}


@dataclass(frozen=True, slots=True)
class Scored:
    """Answers of one request, with the number of requests scored together and the seconds that took."""

    answers: Sequence[Ranking | ScoredTriple | QueryError | NonFiniteError]
    batch: int
    seconds: float


class Service(Protocol):
    """What answers behind the interface: a Serve replica, or in tests a predictor in this process."""

    @property
    def version(self) -> str: ...
    @property
    def ready(self) -> bool: ...
    def about(self) -> Mapping[str, Any]: ...
    def facts(self, count: int) -> list[Triple]: ...
    async def predict(self, query: Query) -> Scored: ...
    async def score(self, triples: list[Triple]) -> Scored: ...


def create_api(service: Service, config: ServeConfig, *, own_request_id: bool = True) -> FastAPI:
    """The application. ``own_request_id``: False where the server in front writes X-Request-Id (Serve)."""
    # /docs and /redoc load their pages from a CDN; the service must work where there is none.
    api = FastAPI(title="kgray", version="1", docs_url=None, redoc_url=None)
    rules = GuardRules(
        version=lambda: service.version,
        max_body_bytes=config.max_body_bytes,
        max_ongoing=config.max_ongoing_requests,
        max_queued=config.max_queued_requests,
        timeout_s=config.request_timeout_s,
        retry_after_s=config.retry_after_s,
        own_request_id=own_request_id,
    )
    api.add_middleware(Guard, rules=rules)
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(HTTPException, _http_error)
    _add_status_routes(api, service, config)
    _add_scoring_routes(api, service, config)
    facts = service.facts(2) if service.ready else []
    describe_api(api, config, facts, new_entities=service.ready and service.about()["new_entities"])
    return api


def _add_status_routes(api: FastAPI, service: Service, config: ServeConfig) -> None:
    @api.get("/healthz", summary="The process is alive")
    async def healthz() -> schemas.Status:
        return schemas.Status(status="ok")

    @api.get("/readyz", summary="The model is loaded and answers")
    async def readyz() -> schemas.Status:
        _check_ready(service, config)
        return schemas.Status(status="ok")

    @api.get("/v1/model", summary="What is being served")
    async def model() -> schemas.ModelInfo:
        _check_ready(service, config)
        about = service.about()
        return schemas.ModelInfo(
            model=schemas.ModelRef(name=config.name, version=service.version),
            graph_version=about["graph_version"],
            new_entities=about["new_entities"],
            counts=schemas.Counts(**about["counts"]),
            metrics={name: _finite(value) for name, value in about["metrics"].items()},
            limits=schemas.Limits(
                max_top_k=config.max_top_k,
                max_triples=config.max_triples,
                max_body_bytes=config.max_body_bytes,
                request_timeout_s=config.request_timeout_s,
            ),
        )


def _add_scoring_routes(api: FastAPI, service: Service, config: ServeConfig) -> None:
    json_only = [Depends(_json_only)]

    @api.post("/v1/predict", summary="Give two of head, relation, tail: get the third", dependencies=json_only)
    async def predict(body: schemas.PredictRequest, response: Response) -> schemas.PredictResponse:
        _check_ready(service, config)
        _check_limit("top_k", body.top_k, config.max_top_k)
        head, tail = _entity(body.head), _entity(body.tail)
        scored = await service.predict(Query(head, body.relation, tail, body.top_k, body.filter_known))
        _add_timing(response, scored)
        _refuse(scored.answers, [()])
        (ranking,) = scored.answers
        if not isinstance(ranking, Ranking):
            raise TypeError(f"predict answered with {type(ranking).__name__}")
        return schemas.PredictResponse(
            model=schemas.ModelRef(name=config.name, version=service.version),
            query=schemas.QueryEcho(
                head=_item(ranking.head),
                relation=_item(ranking.relation),
                tail=_item(ranking.tail),
                top_k=body.top_k,
                filter_known=body.filter_known,
            ),
            missing=ranking.missing,
            predictions=[_prediction(p) for p in ranking.predictions],
            answer_set=_answer_set(ranking.answer_set),
            members=None if ranking.members is None else list(ranking.members),
        )

    @api.post("/v1/score", summary="Score one triple or a list of triples", dependencies=json_only)
    async def score(body: schemas.ScoreRequest, response: Response) -> schemas.ScoreResponse:
        _check_ready(service, config)
        triples = body.as_list()
        _check_limit("triples", len(triples), config.max_triples)
        scored = await service.score([Triple(t.head, t.relation, t.tail) for t in triples])
        _add_timing(response, scored)
        _refuse(scored.answers, [("triples", i) if body.triples else () for i in range(len(triples))])
        return schemas.ScoreResponse(
            model=schemas.ModelRef(name=config.name, version=service.version),
            scores=[_score(answer) for answer in scored.answers if isinstance(answer, ScoredTriple)],
        )


def _check_ready(service: Service, config: ServeConfig) -> None:
    if not service.ready:
        headers = {"retry-after": str(config.retry_after_s)}
        raise Problem(503, "not-ready", "The model is not loaded yet.", headers=headers)


def _json_only(request: Request) -> None:
    """Problem 415 unless the body says that it is JSON, uncompressed."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        found = f"not {kind[:100]}" if kind else "and say so"
        raise Problem(415, "media-type", f"Send JSON with 'content-type: application/json', {found}.")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise Problem(415, "content-encoding", f"Send the body uncompressed, not {encoding[:100]}.")


def _check_limit(field: str, value: int, limit: int) -> None:
    if value > limit:
        detail = f"{field}: {value} is over this server's limit of {limit}"
        raise Problem(422, "over-limit", detail, errors=[{"pointer": pointer(field), "detail": detail}])


def _refuse(
    answers: Sequence[Ranking | ScoredTriple | QueryError | NonFiniteError],
    places: Sequence[tuple[str | int, ...]],
) -> None:
    """Refuse the whole request if any part of it failed, naming every part that did."""
    for answer in answers:
        if isinstance(answer, NonFiniteError):
            raise answer
    wrong = [(a, place) for a, place in zip(answers, places, strict=True) if isinstance(a, QueryError)]
    if not wrong:
        return
    first = wrong[0][0]
    more = f" (and {len(wrong) - 1} more triples that cannot be scored)" if len(wrong) > 1 else ""
    errors = [
        {"pointer": pointer(*place, *error.field.split(".")), "detail": error.message, "near": list(error.near)}
        for error, place in wrong
    ]
    # Without the encoder the service answers every other query, and this one where it has it.
    status = 404 if first.code.startswith("unknown-") else 503 if first.code == "no-encoder" else 422
    raise Problem(status, first.code, first.message + more, errors=errors)


async def _invalid(request: Request, error: Exception) -> NoReturn:
    """Validation errors of FastAPI as a Problem: 400 when there is no JSON to speak of, else 422."""
    found = error.errors() if isinstance(error, RequestValidationError) else []
    if any(e["type"] == "json_invalid" for e in found):
        what = found[0].get("ctx", {}).get("error", "")
        place = found[0]["loc"][-1]
        raise Problem(400, "broken-json", f"The body is not JSON: {what} at character {place}.")
    if any(e["loc"] == ("body",) and e["type"] == "missing" for e in found):
        raise Problem(400, "no-body", "The request has no body; send a JSON object.")
    known = _FIELDS.get(request.url.path.rsplit("/", 1)[-1], ())
    errors = [_explain(e, known) for e in found[:20]]
    raise Problem(422, "invalid", "; ".join(e["detail"] for e in errors[:5]), errors=errors)


def _explain(error: Mapping[str, Any], known: Sequence[str]) -> dict[str, str]:
    """One pydantic error in words, with a pointer; the value itself is not repeated."""
    place = [part for part in error["loc"] if part not in ("body", *schemas.TAGS)]
    name = ".".join(str(part)[:100] for part in place) or "body"
    if error["type"] == "extra_forbidden":
        field = str(place[-1])[:100]
        of_new = len(place) == 2 and place[0] in ("head", "tail")
        parts = tuple(schemas.NewEntityBody.model_fields) if of_new else ("head", "relation", "tail")
        fields = parts if len(place) > 1 else known
        close = difflib.get_close_matches(field, fields, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(fields)}"
        what = f"unknown field; {hint}"
    else:
        what = str(error["msg"]).removeprefix("Value error, ")
    return {"pointer": pointer(*place), "detail": f"{name}: {what}" if place else what}


async def _http_error(request: Request, error: Exception) -> NoReturn:
    """Starlette's own refusals (unknown path, wrong method, unreadable body) as a Problem."""
    if not isinstance(error, HTTPException):
        raise error
    headers = dict(error.headers or {})
    if error.status_code == 404:
        raise Problem(404, "no-such-path", f"There is nothing at {request.url.path[:200]}.", headers=headers)
    if error.status_code == 405:
        allowed = headers.get("Allow", headers.get("allow", "another method"))
        raise Problem(405, "method", f"Use {allowed} here, not {request.method}.", headers=headers)
    if error.status_code == 400:
        raise Problem(400, "broken-json", "The body is not JSON that can be read.", headers=headers)
    raise Problem(error.status_code, "refused", str(error.detail), headers=headers)


def _add_timing(response: Response, scored: Scored) -> None:
    ms = 1000 * scored.seconds
    response.headers["server-timing"] = f'score;dur={ms:.2f};desc="batch of {scored.batch}"'


def _prediction(p: Prediction) -> schemas.PredictionBody:
    # Not validated again: there may be a thousand, and they come from us.
    return schemas.PredictionBody.model_construct(
        rank=p.rank,
        id=p.id,
        name=p.name,
        score=p.score,
        known=p.known,
        probability=p.probability,
        in_set=p.in_set,
    )


def _answer_set(found: AnswerSet | None) -> schemas.AnswerSetBody | None:
    return None if found is None else schemas.AnswerSetBody(size=found.size, coverage=found.coverage)


def _score(answer: ScoredTriple) -> schemas.ScoreBody:
    return schemas.ScoreBody(
        head=schemas.Item(id=answer.head.id, name=answer.head.name),
        relation=schemas.Item(id=answer.relation.id, name=answer.relation.name),
        tail=schemas.Item(id=answer.tail.id, name=answer.tail.name),
        score=answer.score,
        known=answer.known,
    )


def _item(row: Named | None) -> schemas.Item | None:
    return None if row is None else schemas.Item(id=None if row.index < 0 else row.id, name=row.name)


def _entity(given: str | schemas.NewEntityBody | None) -> str | NewEntity | None:
    if not isinstance(given, schemas.NewEntityBody):
        return given
    facts = tuple(NewFact(fact.relation, fact.head, fact.tail) for fact in given.facts)
    return NewEntity(given.name, given.description, facts)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
