"""The HTTP layer over a predictor in this process: every answer's shape, and every refusal."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving_bundle import TableBundle
from starlette.testclient import TestClient

from kgray.config import from_dict
from kgray.errors import ConfigError
from kgray.serving.api import Scored, create_api
from kgray.serving.config import ServeConfig
from kgray.serving.guard import Guard, GuardRules
from kgray.serving.predictor import Predictor, Query, Triple

CONFIG = ServeConfig(max_top_k=20, max_triples=3, max_body_bytes=2000)
JSON = {"content-type": "application/json"}
GOOD = {"head": "e01", "relation": "r0", "top_k": 3}


class LocalService:
    """A predictor in this process, with the faults the tests want."""

    def __init__(self, bundle: TableBundle) -> None:
        self.predictor = Predictor(bundle)
        self.version = bundle.model_version
        self.ready = True
        self.delay = 0.0
        self.gate: asyncio.Event | None = None
        self.failure: Exception | None = None

    def about(self) -> dict[str, Any]:
        return self.predictor.about()

    def facts(self, count: int) -> list[Triple]:
        return self.predictor.facts(count)

    async def predict(self, query: Query) -> Scored:
        await asyncio.sleep(self.delay)
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return Scored(self.predictor.predict([query]), 1, 0.001)

    async def score(self, triples: list[Triple]) -> Scored:
        return Scored(self.predictor.score(triples), 1, 0.001)


@pytest.fixture
def service() -> LocalService:
    return LocalService(TableBundle())


@pytest.fixture
def client(service: LocalService) -> Iterator[TestClient]:
    with TestClient(create_api(service, CONFIG)) as client:
        yield client


def check_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """RFC 9457 shape and the headers every answer carries; returns the document."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    check_headers(response)
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem["type"] == f"urn:kgray:problem:{code}"
    assert problem["title"] and problem["detail"]
    assert problem["request_id"] == response.headers["x-request-id"]
    assert problem["instance"].endswith(problem["request_id"])
    return problem


def check_headers(response: httpx.Response) -> None:
    assert response.headers["x-kgray-model-version"] == "0123456789abcdef"
    assert response.headers["x-request-id"]


def test_predict(client: TestClient, service: LocalService) -> None:
    response = client.post("/v1/predict", json={**GOOD, "head": "entity 1", "filter_known": True})
    check_headers(response)
    assert response.headers["server-timing"].startswith("score;dur=1.00")
    (want,) = service.predictor.predict([Query("e01", "r0", None, 3, True)])
    assert response.json() == {
        "model": {"name": "kgray", "version": "0123456789abcdef"},
        "query": {
            "head": {"id": "e01", "name": "entity 1"},
            "relation": {"id": "r0", "name": "relation_0"},
            "tail": None,
            "top_k": 3,
            "filter_known": True,
        },
        "missing": "tail",
        "predictions": [
            {"rank": p.rank, "id": p.id, "name": p.name, "score": p.score, "known": False}
            | {"probability": None, "in_set": None}
            for p in want.predictions
        ],
        "answer_set": None,
        "members": None,
    }


def test_an_explicit_null_asks_for_that_part(client: TestClient) -> None:
    body = client.post("/v1/predict", json={"head": None, "relation": "r0", "tail": "e01"}).json()
    assert body["missing"] == "head" and len(body["predictions"]) == 10


def test_score_one_and_several(client: TestClient) -> None:
    triple = {"head": "e01", "relation": "r0", "tail": "e02"}
    one = client.post("/v1/score", json=triple).json()["scores"]
    several = client.post("/v1/score", json={"triples": [triple, {**triple, "tail": "e03"}]}).json()["scores"]
    assert len(several) == 2 and one[0] == several[0]
    assert several[1]["tail"] == {"id": "e03", "name": "twin"}


def test_health_and_model(client: TestClient, service: LocalService) -> None:
    for path in ("/healthz", "/readyz"):
        response = client.get(path)
        assert (response.status_code, response.json()) == (200, {"status": "ok"})
        check_headers(response)
    about = client.get("/v1/model").json()
    assert about["model"]["version"] == "0123456789abcdef"
    assert about["graph_version"] == "fedcba9876543210"
    assert about["counts"] == {
        "entities": 40,
        "relations": 5,
        "known_facts": service.predictor.bundle.known.num_triples,
    }
    assert about["metrics"] == {"valid.both.realistic.filtered.full.mrr": 0.5, "broken": None}
    assert about["limits"]["max_top_k"] == 20


def test_not_ready(client: TestClient, service: LocalService) -> None:
    service.ready = False
    assert client.get("/healthz").status_code == 200
    for response in (client.get("/readyz"), client.get("/v1/model"), client.post("/v1/predict", json=GOOD)):
        check_problem(response, 503, "not-ready")
        assert response.headers["retry-after"] == "1"


def test_openapi_has_examples_that_work_and_every_error(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    for path in ("/v1/predict", "/v1/score"):
        operation = document["paths"][path]["post"]
        assert {"200", "400", "404", "413", "415", "422", "429", "500", "503", "504"} <= set(operation["responses"])
        assert "application/problem+json" in operation["responses"]["422"]["content"]
        for example in operation["requestBody"]["content"]["application/json"]["examples"].values():
            assert client.post(path, json=example["value"]).status_code == 200
    parts = document["components"]["schemas"]
    assert parts["PredictRequest"]["properties"]["top_k"]["maximum"] == 20
    assert "HTTPValidationError" not in json.dumps(document)


def test_no_page_from_a_cdn(client: TestClient) -> None:
    for path in ("/docs", "/redoc"):
        check_problem(client.get(path), 404, "no-such-path")


@pytest.mark.parametrize(
    ("body", "code", "field", "near"),
    [
        ({"head": "E-01", "relation": "r0"}, "unknown-entity", "/head", "e01"),
        ({"head": "e01", "relation": "relation 00"}, "unknown-relation", "/relation", "r0"),
        ({"relation": "r0", "tail": "qqq"}, "unknown-entity", "/tail", None),
    ],
)
def test_unknown_ids(client: TestClient, body: dict[str, str], code: str, field: str, near: str | None) -> None:
    problem = check_problem(client.post("/v1/predict", json=body), 404, code)
    (error,) = problem["errors"]
    assert error["pointer"] == field
    assert body[field[1:]] in problem["detail"]
    assert error["near"][:1] == ([near] if near else [])


def test_an_ambiguous_name_lists_the_ids(client: TestClient) -> None:
    problem = check_problem(client.post("/v1/predict", json={**GOOD, "head": "twin"}), 422, "ambiguous-entity")
    assert problem["errors"][0]["near"] == ["e03", "e04"]


def test_all_bad_triples_are_named_at_once(client: TestClient) -> None:
    triples = [
        {"head": "e01", "relation": "r0", "tail": "zz"},
        {"head": "e01", "relation": "r0", "tail": "e02"},
        {"head": "e01", "relation": "nope", "tail": "e02"},
    ]
    problem = check_problem(client.post("/v1/score", json={"triples": triples}), 404, "unknown-entity")
    assert [e["pointer"] for e in problem["errors"]] == ["/triples/0/tail", "/triples/2/relation"]
    assert "1 more" in problem["detail"]


@pytest.mark.parametrize(
    ("change", "where", "says"),
    [
        ({"head": 7}, "/head", "valid string"),
        ({"head": ""}, "/head", "at least 1 character"),
        ({"head": "x" * 1025}, "/head", "at most 1024"),
        ({"head": ["e01"]}, "/head", "valid string"),
        ({"top_k": "5"}, "/top_k", "valid integer"),
        ({"top_k": 5.0}, "/top_k", "valid integer"),
        ({"top_k": True}, "/top_k", "valid integer"),
        ({"top_k": 0}, "/top_k", "greater than or equal to 1"),
        ({"top_k": -1}, "/top_k", "greater than or equal to 1"),
        ({"top_k": None}, "/top_k", "valid integer"),
        ({"filter_known": "yes"}, "/filter_known", "valid boolean"),
        ({"filter_known": 1}, "/filter_known", "valid boolean"),
        ({"topk": 5}, "/topk", "did you mean 'top_k'"),
        ({"a/b~c": 5}, "/a~1b~0c", "known are"),
        ({"tail": "e02"}, "", "exactly two of head, relation, tail; found head, relation, tail"),
        ({"head": None}, "", "exactly two of head, relation, tail; found relation"),
        ({"head": "\ud800"}, "/head", "valid string"),
    ],
)
def test_wrong_types(client: TestClient, change: dict[str, Any], where: str, says: str) -> None:
    response = client.post("/v1/predict", content=json.dumps({**GOOD, **change}), headers=JSON)
    problem = check_problem(response, 422, "invalid")
    assert problem["errors"][0]["pointer"] == where
    assert says in problem["detail"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"head": "e01", "relation": "r0"},
        {"triples": []},
        {"triples": {}},
        {"triples": [{"head": "e01", "relation": "r0"}]},
        {"triples": [{"head": "e01", "relation": "r0", "tail": "e02", "x": 1}]},
        {"triples": [["e01", "r0", "e02"]]},
        {"head": "e01", "triples": [{"head": "e01", "relation": "r0", "tail": "e02"}]},
    ],
)
def test_score_refuses_what_is_not_a_triple(client: TestClient, body: dict[str, Any]) -> None:
    check_problem(client.post("/v1/score", json=body), 422, "invalid")


@pytest.mark.parametrize("top_k", [21, 10**9, 10**30])
def test_a_huge_top_k_is_told_the_limit(client: TestClient, top_k: int) -> None:
    problem = check_problem(client.post("/v1/predict", json={**GOOD, "top_k": top_k}), 422, "over-limit")
    assert "limit of 20" in problem["detail"]
    assert problem["errors"][0]["pointer"] == "/top_k"


def test_too_many_triples(client: TestClient) -> None:
    triples = [{"head": "e01", "relation": "r0", "tail": "e02"}] * 4
    problem = check_problem(client.post("/v1/score", json={"triples": triples}), 422, "over-limit")
    assert "limit of 3" in problem["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"head": "e01", "relation"',
        b"head=e01",
        b"\xff\xfe\xfd",
        b'{"head": "\xff"}',
        b"",
        b"[" * 1500,
        b'{"top_k": ' + b"9" * 1900 + b"}",
    ],
)
def test_broken_bodies(client: TestClient, body: bytes) -> None:
    response = client.post("/v1/predict", content=body, headers=JSON)
    assert response.status_code in (400, 422)
    check_problem(response, response.status_code, response.json()["type"].rsplit(":", 1)[1])
    if not body.startswith(b'{"top_k"'):
        assert response.status_code == 400


@pytest.mark.parametrize("body", ["[]", "null", '"text"', "7"])
def test_json_that_is_no_object(client: TestClient, body: str) -> None:
    response = client.post("/v1/predict", content=body, headers=JSON)
    assert response.status_code in (400, 422)
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("size", [2001, 7000, 50_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_oversize_body_is_refused_before_it_is_parsed(client: TestClient, size: int, chunked: bool) -> None:
    body = b"x" * size
    content = iter([body[:1000], body[1000:]]) if chunked else body
    problem = check_problem(client.post("/v1/predict", content=content, headers=JSON), 413, "body-too-large")
    assert "2000 bytes" in problem["detail"]


def test_a_body_of_exactly_the_limit_is_read(client: TestClient) -> None:
    body = json.dumps(GOOD).encode()
    body += b" " * (CONFIG.max_body_bytes - len(body))
    assert client.post("/v1/predict", content=body, headers=JSON).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {},
        {**JSON, "content-encoding": "gzip"},
    ],
)
def test_other_media_types(client: TestClient, headers: dict[str, str]) -> None:
    response = client.post("/v1/predict", content=json.dumps(GOOD), headers=headers)
    assert response.status_code == 415, response.text
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/ld+json"])
def test_json_by_another_spelling(client: TestClient, kind: str) -> None:
    assert client.post("/v1/predict", content=json.dumps(GOOD), headers={"content-type": kind}).status_code == 200


def test_wrong_method_and_path(client: TestClient) -> None:
    response = client.get("/v1/predict")
    assert "POST" in check_problem(response, 405, "method")["detail"]
    assert response.headers["allow"] == "POST"
    check_problem(client.get("/v1/nothing"), 404, "no-such-path")
    check_problem(client.post("/v2/predict", json=GOOD), 404, "no-such-path")


def test_a_failure_keeps_its_inside_to_itself(
    client: TestClient, service: LocalService, caplog: pytest.LogCaptureFixture
) -> None:
    service.failure = RuntimeError("secret /path/to/model")
    response = client.post("/v1/predict", json=GOOD, headers={"x-request-id": "abc-123"})
    problem = check_problem(response, 500, "internal")
    assert "secret" not in response.text
    assert problem["request_id"] == "abc-123"
    assert "abc-123" in caplog.text and "secret" in caplog.text


def test_a_non_finite_score_is_a_failure(client: TestClient, service: LocalService) -> None:
    service.predictor.bundle.forward[1, 0, 9] = float("nan")
    check_problem(client.post("/v1/predict", json=GOOD), 500, "internal")


def test_timeout(service: LocalService) -> None:
    service.delay = 20
    with TestClient(create_api(service, ServeConfig(request_timeout_s=0.5))) as client:
        started = time.monotonic()
        check_problem(client.post("/v1/predict", json=GOOD), 504, "timeout")
    assert time.monotonic() - started < 15


def test_request_ids(client: TestClient) -> None:
    assert client.get("/healthz", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    for bad in ("x" * 500, "ü\x7f"):
        given = client.get("/healthz", headers={"x-request-id": bad.encode("latin-1")}).headers["x-request-id"]
        assert given != bad and len(given) == 36
    assert client.get("/healthz").headers["x-request-id"] != client.get("/healthz").headers["x-request-id"]


def test_overload_is_refused_and_health_is_not(service: LocalService) -> None:
    config = ServeConfig(max_ongoing_requests=2, max_queued_requests=1, retry_after_s=7)
    api = create_api(service, config)

    async def flood() -> tuple[list[httpx.Response], httpx.Response]:
        transport = httpx.ASGITransport(app=api)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            service.gate = asyncio.Event()
            requests = [asyncio.create_task(client.post("/v1/predict", json=GOOD)) for _ in range(8)]
            while sum(request.done() for request in requests) < 5:
                await asyncio.sleep(0.01)
            health = await client.get("/readyz")
            service.gate.set()
            answers = await asyncio.gather(*requests)
            assert (await client.post("/v1/predict", json=GOOD)).status_code == 200, "places are given back"
            return answers, health

    answers, health = asyncio.run(flood())
    assert health.status_code == 200
    assert sorted(a.status_code for a in answers) == [200] * 3 + [429] * 5
    for answer in answers:
        if answer.status_code == 429:
            check_problem(answer, 429, "overload")
            assert answer.headers["retry-after"] == "7"


def test_a_body_that_never_comes_and_a_client_that_leaves() -> None:
    """Below HTTP, where a slow sender can be played: 408 for the first, silence for the second."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("reached the application")

    rules = GuardRules(
        version=lambda: "v",
        max_body_bytes=10,
        max_ongoing=1,
        max_queued=0,
        timeout_s=0.05,
        retry_after_s=1,
        own_request_id=True,
    )
    scope = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": []}
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def never() -> Any:
        await asyncio.sleep(10)

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    asyncio.run(Guard(app, rules)(dict(scope), never, send))
    assert sent[0]["status"] == 408
    sent.clear()
    asyncio.run(Guard(app, rules)(dict(scope), gone, send))
    assert sent == []


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"port": 0}, "port"),
        ({"host": "0.0.0.0"}, "host"),
        ({"host": ""}, "host"),
        ({"port": 12000}, "port"),
        ({"port": "8000"}, "port"),
        ({"max_top_k": 0}, "max_top_k"),
        ({"num_cpus": 0}, "num_cpus"),
        ({"batch_wait_s": -1}, "batch_wait_s"),
        ({"max_topk": 5}, "max_topk"),
        ({"examples": [{"head": "a"}]}, "examples[0]"),
        ({"examples": [{"head": "a", "relation": "b", "top_k": 5000}]}, "examples[0].top_k"),
    ],
)
def test_configuration_mistakes(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(ServeConfig, values)
    assert caught.value.key == key
