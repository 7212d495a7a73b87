"""Makes /openapi.json say what the service really does: its limits, its errors, examples that work here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from kgray.serving.config import ServeConfig
from kgray.serving.predictor import Triple
from kgray.serving.problems import MEDIA_TYPE
from kgray.serving.schemas import ProblemBody

_ERRORS = {
    "400": "The body is missing or is not JSON.",
    "404": "An entity or relation is unknown; `errors` names the field and near ids.",
    "408": "The body did not arrive in time.",
    "413": "The body is larger than the limit.",
    "415": "The body is not announced as uncompressed JSON.",
    "422": "The JSON is not a request: a wrong type, an unknown field, a limit passed, an ambiguous name.",
    "429": "Too many requests wait already; see Retry-After.",
    "500": "The server failed.",
    "503": "The model is not loaded yet, see Retry-After; or the text of a new entity cannot be read here.",
    "504": "No answer within the time limit.",
}
_OF_GET = ("429", "500", "503", "504")
_HEADERS = {
    "X-Kgray-Model-Version": {
        "description": "Version of the model that answers.",
        "schema": {"type": "string"},
    },
    "X-Request-Id": {
        "description": "The request's id, the client's own if it sent one.",
        "schema": {"type": "string"},
    },
}


def describe_api(api: FastAPI, config: ServeConfig, facts: Sequence[Triple], *, new_entities: bool) -> None:
    """Set the OpenAPI document of ``api``; ``facts`` of the served graph become its examples, one of them with an
    entity the graph does not have where the model takes ``new_entities``."""
    document = get_openapi(
        title=api.title,
        version=api.version,
        summary="Predicts the missing part of a triple from text and graph.",
        routes=api.routes,
    )
    _add_errors(document)
    parts = document["components"]["schemas"]
    _property(parts["PredictRequest"], "top_k")["maximum"] = config.max_top_k
    for member in _property(parts["ScoreRequest"], "triples")["anyOf"]:
        if member.get("type") == "array":
            member["maxItems"] = config.max_triples
    if facts:
        _add_examples(document["paths"], facts, new_entities=new_entities)
    # A function, because FastAPI calls it at each request of /openapi.json; the document itself is fixed.
    api.openapi = lambda: document  # type: ignore[method-assign]


def _property(schema: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = schema["properties"][name]
    return found


def _add_errors(document: dict[str, Any]) -> None:
    parts = document["components"]["schemas"]
    body = ProblemBody.model_json_schema(ref_template="#/components/schemas/{model}")
    parts.update(body.pop("$defs"))
    parts["ProblemBody"] = body
    # FastAPI announces its own form of validation errors, which this service never sends.
    for name in ("HTTPValidationError", "ValidationError"):
        parts.pop(name, None)
    problem = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemBody"}}}
    for operations in document["paths"].values():
        for method, operation in operations.items():
            responses = operation["responses"]
            codes = _ERRORS if method == "post" else _OF_GET
            for code in codes:
                responses[code] = {"description": _ERRORS[code], "content": problem}
            for response in responses.values():
                response["headers"] = _HEADERS


def _add_examples(paths: dict[str, Any], facts: Sequence[Triple], *, new_entities: bool) -> None:
    fact = facts[0]
    h, r, t = {"head": fact.head}, {"relation": fact.relation}, {"tail": fact.tail}
    options = {"top_k": 5, "filter_known": True}
    examples: dict[str, dict[str, Any]] = {
        "/v1/predict": {
            "tail": {"summary": "Which tails?", "value": {**h, **r, **options}},
            "head": {"summary": "Which heads?", "value": {**r, **t, **options}},
            "relation": {"summary": "Which relations?", "value": {**h, **t, "top_k": 5}},
        },
        "/v1/score": {
            "one": {"summary": "One triple", "value": {**h, **r, **t}},
            "several": {
                "summary": "Several triples",
                "value": {"triples": [{"head": f.head, "relation": f.relation, "tail": f.tail} for f in facts]},
            },
        },
    }
    if new_entities:
        said = {"name": "a new entity", "description": "What is known of it.", "facts": [{**r, **t}]}
        summary = "Which tails, of an entity that the graph does not have?"
        examples["/v1/predict"]["new"] = {"summary": summary, "value": {"head": said, **r, **options}}
    for path, shown in examples.items():
        paths[path]["post"]["requestBody"]["content"]["application/json"]["examples"] = shown
