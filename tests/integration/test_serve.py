"""A model artifact behind real Ray Serve, asked over real HTTP. One cluster for the whole module.

The tests run in the order they are written: each leaves the service answering.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from serve_models import free_port, make_model, umls_graph

import kgray.serving.deploy as deploy_module
from kgray.artifact import Artifact, Store
from kgray.errors import ConfigError, UserError
from kgray.model.bundle import Bundle
from kgray.serving.config import ExampleQuery, ServeConfig
from kgray.serving.deploy import DeployError, DeployResult, deploy

GOOD = {"head": "virus", "relation": "causes", "top_k": 5}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    store, graph = Store(str(tmp_path_factory.mktemp("store"))), umls_graph()
    return make_model(store, graph, 1), make_model(store, graph, 2)


@pytest.fixture(scope="module")
def config() -> ServeConfig:
    return ServeConfig(
        port=free_port(),
        max_body_bytes=100_000,
        max_top_k=100,
        max_ongoing_requests=32,
        max_queued_requests=8,
        batch_wait_s=0.05,
        startup_timeout_s=120,
        examples=(ExampleQuery(head="virus", relation="causes"),),
    )


@pytest.fixture(scope="module")
def deployed(ray_cluster: object, models: tuple[Artifact, Artifact], config: ServeConfig) -> Iterator[DeployResult]:
    from ray import serve

    yield deploy(config, models[0])
    serve.shutdown()  # the cluster goes on to other tests


@pytest.fixture
def http(deployed: DeployResult) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=deployed.url, trust_env=False, timeout=30) as client:
        yield client


def check_problem(response: httpx.Response, status: int, version: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-kgray-model-version"] == version
    assert len(response.headers.get_list("x-request-id")) == 1
    problem: dict[str, Any] = response.json()
    assert problem["request_id"] == response.headers["x-request-id"]
    return problem


def test_deploy_asks_what_it_deployed(deployed: DeployResult, models: tuple[Artifact, Artifact]) -> None:
    assert not deployed.up_to_date
    assert deployed.version == models[0].version
    assert [a.status for a in deployed.answers] == [200] * 4
    assert deployed.answers[0].request == {**GOOD, "filter_known": False}
    assert {a.body["missing"] for a in deployed.answers} == {"head", "relation", "tail"}


def test_online_scores_equal_offline_scores(http: httpx.Client, models: tuple[Artifact, Artifact]) -> None:
    bundle = Bundle.load(models[0])
    rows = umls_graph().triples["test"][:8]
    ids, relations = bundle.entity_ids, bundle.relation_ids
    for h, r, t in rows.tolist():
        head, relation, tail = torch.tensor([h]), torch.tensor([r]), torch.tensor([t])
        for missing, offline, names in (
            ("tail", bundle.score_tails(head, relation)[0], ids),
            ("head", bundle.score_heads(relation, tail)[0], ids),
            ("relation", bundle.score_relations(head, tail)[0], relations),
        ):
            query = {"head": ids[h], "relation": relations[r], "tail": ids[t], "top_k": 100, missing: None}
            response = http.post("/v1/predict", json=query)
            assert response.headers["x-kgray-model-version"] == models[0].version
            predictions = response.json()["predictions"]
            assert len(predictions) == min(100, len(names))
            online = {p["id"]: p["score"] for p in predictions}
            for i, name in enumerate(names):
                if name in online:
                    assert online[name] == pytest.approx(offline[i].item(), abs=1e-5)
            assert min(online.values()) >= sorted(offline.tolist(), reverse=True)[len(online) - 1] - 1e-5
    triples = [{"head": ids[h], "relation": relations[r], "tail": ids[t]} for h, r, t in rows.tolist()]
    scores = http.post("/v1/score", json={"triples": triples}).json()["scores"]
    offline = bundle.score_triples(*torch.tensor(rows).T)
    assert [s["score"] for s in scores] == pytest.approx(offline.tolist(), abs=1e-5)
    assert all(s["known"] for s in scores)


def test_health_model_and_openapi(http: httpx.Client, models: tuple[Artifact, Artifact]) -> None:
    for path in ("/healthz", "/readyz"):
        response = http.get(path)
        assert (response.status_code, response.json()) == (200, {"status": "ok"})
        assert response.headers["x-kgray-model-version"] == models[0].version
    about = http.get("/v1/model").json()
    assert about["model"] == {"name": "kgray", "version": models[0].version}
    assert about["counts"]["entities"] == 135 and about["counts"]["relations"] == 46
    assert about["metrics"] == {"valid.both.realistic.filtered.full.mrr": 0.01}
    operation = http.get("/openapi.json").json()["paths"]["/v1/predict"]["post"]
    for example in operation["requestBody"]["content"]["application/json"]["examples"].values():
        assert http.post("/v1/predict", json=example["value"]).status_code == 200


def test_bad_requests(http: httpx.Client, models: tuple[Artifact, Artifact]) -> None:
    version = models[0].version

    def post(body: Any, status: int, path: str = "/v1/predict") -> dict[str, Any]:
        return check_problem(http.post(path, json=body), status, version)

    assert post({**GOOD, "head": "viruss"}, 404)["errors"] == [
        {
            "pointer": "/head",
            "detail": "head: no entity has the id or name 'viruss'; did you mean 'virus'?",
            "near": ["virus"],
        }
    ]
    assert post({**GOOD, "relation": "cause"}, 404)["errors"][0]["near"][0] == "causes"
    assert "limit of 100" in post({**GOOD, "top_k": 10**7}, 422)["detail"]
    for change in ({"top_k": "5"}, {"head": 5}, {"filter_known": 1}, {"extra": 1}, {"tail": "virus"}):
        post({**GOOD, **change}, 422)
    post({"head": "virus"}, 422)
    post({"triples": [{"head": "virus"}]}, 422, "/v1/score")
    json_type = {"content-type": "application/json"}
    for body in (b'{"head": ', b"\xff\xff", b""):
        check_problem(http.post("/v1/predict", content=body, headers=json_type), 400, version)
    check_problem(http.post("/v1/predict", content=json.dumps(GOOD)), 415, version)
    big = b"x" * 300_000
    for content in (big, iter([big[:1000], big[1000:]])):
        check_problem(http.post("/v1/predict", content=content, headers=json_type), 413, version)
    check_problem(http.get("/v1/predict"), 405, version)
    check_problem(http.get("/nowhere"), 404, version)
    assert http.get("/healthz", headers={"x-request-id": "abc"}).headers.get_list("x-request-id") == ["abc"]


def test_concurrent_requests_are_batched_and_not_mixed_up(http: httpx.Client, config: ServeConfig) -> None:
    bundle_ids = [e["id"] for e in http.post("/v1/predict", json={**GOOD, "top_k": 100}).json()["predictions"]]

    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=str(http.base_url), trust_env=False, timeout=30) as client:
            bodies = [{**GOOD, "head": bundle_ids[i]} for i in range(30)]
            return await asyncio.gather(*(client.post("/v1/predict", json=body) for body in bodies))

    answers = asyncio.run(flood())
    assert [a.status_code for a in answers] == [200] * 30
    for i, answer in enumerate(answers):
        assert answer.json()["query"]["head"]["id"] == bundle_ids[i]
    alone = http.post("/v1/predict", json={**GOOD, "head": bundle_ids[7]}).json()["predictions"]
    together = answers[7].json()["predictions"]
    assert [p["score"] for p in together] == pytest.approx([p["score"] for p in alone], abs=1e-5)
    sizes = [int(a.headers["server-timing"].split("batch of ")[1].strip('"')) for a in answers]
    assert max(sizes) > 1


def test_overload_is_a_problem_too(http: httpx.Client, models: tuple[Artifact, Artifact]) -> None:
    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=str(http.base_url), trust_env=False, timeout=60) as client:
            return await asyncio.gather(*(client.post("/v1/predict", json=GOOD) for _ in range(75)))

    # How fast a flood arrives is up to the machine; what is refused must be refused well.
    for _ in range(5):
        answers = asyncio.run(flood())
        refused = [a for a in answers if a.status_code != 200]
        if refused:
            break
    assert refused and len(refused) < 75
    for answer in refused:
        check_problem(answer, 429, models[0].version)
        assert answer.headers["retry-after"] == "1"


def test_deploying_what_answers_already_changes_nothing(
    deployed: DeployResult, config: ServeConfig, models: tuple[Artifact, Artifact]
) -> None:
    again = deploy(config, models[0])
    assert again.up_to_date
    assert again.answers == deployed.answers


def test_mistakes_are_found_before_anything_is_touched(
    http: httpx.Client, config: ServeConfig, models: tuple[Artifact, Artifact]
) -> None:
    with pytest.raises(ConfigError, match="did you mean 'virus'"):
        deploy(replace(config, examples=(ExampleQuery(head="viruss", relation="causes"),)), models[1])
    with pytest.raises(ConfigError, match=f"127.0.0.1:{config.port}, where Serve runs"):
        deploy(replace(config, port=free_port()), models[1])
    assert http.get("/readyz").headers["x-kgray-model-version"] == models[0].version


def test_a_failed_deployment_leaves_the_old_version_answering(
    http: httpx.Client, config: ServeConfig, models: tuple[Artifact, Artifact]
) -> None:
    with pytest.raises(DeployError, match=r"after 5 s"):
        deploy(replace(config, num_cpus=1000.0, startup_timeout_s=5), models[1])
    response = http.post("/v1/predict", json=GOOD)
    assert response.status_code == 200
    assert response.headers["x-kgray-model-version"] == models[0].version


def test_a_version_that_answers_wrongly_is_taken_back(
    http: httpx.Client,
    config: ServeConfig,
    models: tuple[Artifact, Artifact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deploy_module, "TOLERANCE", -1.0)  # nothing is right enough
    with pytest.raises(DeployError, match="but the model gives"):
        deploy(config, models[1])
    assert http.post("/v1/predict", json=GOOD).headers["x-kgray-model-version"] == models[0].version


def test_a_route_that_another_application_has(
    http: httpx.Client, config: ServeConfig, models: tuple[Artifact, Artifact]
) -> None:
    with pytest.raises(UserError, match=r"'other' \(serve.name\): Prefix / is being used"):
        deploy(replace(config, name="other"), models[1])
    assert http.post("/v1/predict", json=GOOD).headers["x-kgray-model-version"] == models[0].version


def test_redeployment_swaps_the_version_without_a_gap(
    http: httpx.Client, config: ServeConfig, models: tuple[Artifact, Artifact]
) -> None:
    before = http.post("/v1/predict", json=GOOD).json()["predictions"]
    seen: set[tuple[int, str]] = set()

    async def watch() -> DeployResult:
        async with httpx.AsyncClient(base_url=str(http.base_url), trust_env=False, timeout=30) as client:
            work = asyncio.create_task(asyncio.to_thread(deploy, config, models[1]))
            while not work.done():
                response = await client.post("/v1/predict", json=GOOD)
                seen.add((response.status_code, response.headers["x-kgray-model-version"]))
                assert response.json()["model"]["version"] == response.headers["x-kgray-model-version"]
                await asyncio.sleep(0.1)
            return work.result()

    result = asyncio.run(watch())
    assert not result.up_to_date and result.version == models[1].version
    assert seen <= {(200, models[0].version), (200, models[1].version)}
    response = http.post("/v1/predict", json=GOOD)
    assert response.headers["x-kgray-model-version"] == models[1].version
    assert response.json()["predictions"] != before
