"""Entities the graph does not have, asked over HTTP and on the command line, of real artifacts."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from newcomer_store import (
    CONFIG,
    KINDS,
    columns,
    encoder_artifact,
    ensemble_artifact,
    graph_artifact,
    model_artifact,
    paths_artifact,
    save_encoder,
    vectors_artifact,
)
from starlette.testclient import TestClient

from kgray.artifact import Artifact, Store
from kgray.errors import EncoderError, UserError
from kgray.graph.graph import Graph
from kgray.model.config import ablation
from kgray.model.states import StateScorer
from kgray.pipeline.explain_command import new_query
from kgray.pipeline.explain_new import explain_new
from kgray.serving.api import Scored, create_api
from kgray.serving.app import load_predictor
from kgray.serving.config import ServeConfig
from kgray.serving.names import QueryError
from kgray.serving.predictor import NewEntity, NewFact, Predictor, Query, Ranking, Triple
from kgray.text.same import SameEncoder
from kgray.text.vectors import load_vectors


class World:
    """Artifacts over the toy graph."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(str(folder / "store"))
        self.encoder = save_encoder(folder / "encoder")
        self.graph = graph_artifact(self.store)
        self.vectors = vectors_artifact(self.store, self.graph, self.encoder)
        self.fused = model_artifact(self.store, self.graph, self.vectors)
        self.text_only = model_artifact(self.store, self.graph, self.vectors, ablation(CONFIG, "text_only"))
        self.paths = paths_artifact(self.store, self.graph)
        members = {"fused": self.fused, "paths": self.paths, "text_only": self.text_only}
        self.ensemble = ensemble_artifact(self.store, self.graph, members)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


class LocalService:
    """A predictor in this process."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor, self.version, self.ready = predictor, predictor.version, True

    def about(self) -> dict[str, Any]:
        return self.predictor.about()

    def facts(self, count: int) -> list[Triple]:
        return self.predictor.facts(count)

    async def predict(self, query: Query) -> Scored:
        return Scored(self.predictor.predict([query]), 1, 0.001)

    async def score(self, triples: list[Triple]) -> Scored:
        return Scored(self.predictor.score(triples), 1, 0.001)


def client_of(artifact: Artifact) -> TestClient:
    return TestClient(create_api(LocalService(load_predictor(artifact.uri)), ServeConfig(max_top_k=50)))


@pytest.fixture()
def client(world: World) -> Iterator[TestClient]:
    with client_of(world.ensemble) as client:
        yield client


def own_facts(graph: Graph, entity: int) -> tuple[NewFact, ...]:
    ids, names = graph.entity_ids.to_pylist(), graph.relation_ids.to_pylist()
    rows = graph.triples["train"].tolist()
    found = [NewFact(names[r], tail=ids[t]) for h, r, t in rows if h == entity]
    return tuple(found + [NewFact(names[r], head=ids[h]) for h, r, t in rows if t == entity])


@pytest.mark.parametrize("member", ["fused", "text_only"])
def test_an_entity_described_as_itself_is_answered_for_as_itself(world: World, member: str) -> None:
    """Text, neighbours and all, through names, encoder and artifacts: the stored states are the oracle."""
    artifact = getattr(world, member)
    predictor, graph, table = load_predictor(artifact.uri), Graph.load(world.graph), columns()
    scorer = predictor.bundle.scorer  # type: ignore[attr-defined]
    assert isinstance(scorer, StateScorer)
    for entity in (0, 5, 20):
        new = NewEntity(table["name"][entity], table["description"][entity], own_facts(graph, entity))
        one, r = torch.tensor([entity]), torch.tensor([1])
        oracle = {
            Query(new, "next", None, 33): scorer.score_tails(one, r)[0],
            Query(None, "next", new, 33): scorer.score_heads(r, one)[0],
            Query(new, None, "x07", 2): scorer.score_relations(one, torch.tensor([7]))[0],
        }
        for query, want in oracle.items():
            (answer,) = predictor.predict([query])
            assert isinstance(answer, Ranking) and answer.members == ("fused",)
            table_of = predictor.relations if query.relation is None else predictor.entities
            got = {table_of.find("tail", p.id).index: p.score for p in answer.predictions}
            # The encoder read the graph's texts in batches: the same to rounding, then to float16.
            np.testing.assert_allclose([got[i] for i in range(len(want))], want, atol=0.02)


def test_text_decides(client: TestClient) -> None:
    for kind in range(KINDS):
        head = {"name": "w19", "description": f"w{kind} w29"}
        body = client.post("/v1/predict", json={"head": head, "relation": "in", "top_k": 1}).json()
        assert body["predictions"][0]["name"] == f"hub {kind}"
        assert body["query"]["head"] == {"id": None, "name": "w19"}
        assert body["members"] == ["fused", "text_only"]
        assert body["answer_set"] is None and body["predictions"][0]["probability"] is None


def test_facts_are_heard_marked_and_filtered(client: TestClient) -> None:
    said = {"head": {"name": "w19", "description": "w1"}, "relation": "next", "top_k": 33}
    fact = {"relation": "next", "tail": "x07"}
    with_fact = {**said, "head": {**said["head"], "facts": [fact]}}
    plain, heard = (client.post("/v1/predict", json=body).json()["predictions"] for body in (said, with_fact))
    assert [p["score"] for p in plain] != [p["score"] for p in heard]
    assert [p["id"] for p in heard if p["known"]] == ["x07"] and not any(p["known"] for p in plain)
    left = client.post("/v1/predict", json={**with_fact, "filter_known": True}).json()["predictions"]
    assert [p["id"] for p in left] == [p["id"] for p in heard if p["id"] != "x07"]


def test_as_tail_and_both_ends(client: TestClient) -> None:
    new = {"name": "w19", "description": "w2", "facts": [{"relation": "next", "head": "x25"}]}
    body = client.post("/v1/predict", json={"relation": "next", "tail": new}).json()
    assert body["missing"] == "head" and next(p["id"] for p in body["predictions"] if p["known"]) == "x25"
    both = client.post("/v1/predict", json={"head": new, "tail": {"name": "w18"}, "top_k": 2}).json()
    assert both["missing"] == "relation" and len(both["predictions"]) == 2


@pytest.mark.parametrize(
    ("head", "status", "code", "where", "says"),
    [
        ({"name": "n", "facts": [{"relation": "nex", "tail": "x01"}]}, 404, "unknown-relation",
         "/head/facts/0/relation", "did you mean 'next'"),
        ({"name": "n", "facts": [{"relation": "in", "tail": "x01"}, {"relation": "in", "head": "x 01"}]}, 404,
         "unknown-entity", "/head/facts/1/head", "did you mean 'x01'"),
        ({"name": "n", "facts": [{"relation": "in", "tail": "w10"}]}, 422, "ambiguous-entity", "/head/facts/0/tail",
         "give one id"),
        ({"name": "n", "facts": [{"relation": "in"}]}, 422, "invalid", "/head/facts/0", "found none"),
        ({"name": "n", "facts": [{"relation": "in", "head": "x01", "tail": "x02"}]}, 422, "invalid", "/head/facts/0",
         "found both"),
        ({"name": ""}, 422, "invalid", "/head/name", "at least 1 character"),
        ({"description": "n"}, 422, "invalid", "/head/name", "required"),
        ({"name": "n", "descripton": "x"}, 422, "invalid", "/head/descripton", "did you mean 'description'"),
        ({"name": "n", "facts": [{"relation": "in", "tial": "x01"}]}, 422, "invalid", "/head/facts/0/tial",
         "did you mean 'tail'"),
        ({"name": "n", "facts": {"relation": "in"}}, 422, "invalid", "/head/facts", "valid list"),
        ({"name": 7}, 422, "invalid", "/head/name", "valid string"),
    ],
)  # fmt: skip
def test_mistakes(
    client: TestClient, head: dict[str, Any], status: int, code: str, where: str, says: str
) -> None:
    response = client.post("/v1/predict", json={"head": head, "relation": "in"})
    problem = response.json()
    assert (response.status_code, problem["type"]) == (status, f"urn:kgray:problem:{code}"), problem
    assert where in [error["pointer"] for error in problem["errors"]]
    assert says in problem["detail"]


def test_openapi_shows_it_and_the_example_works(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    operation = document["paths"]["/v1/predict"]["post"]
    example = operation["requestBody"]["content"]["application/json"]["examples"]["new"]["value"]
    assert set(example["head"]) == {"name", "description", "facts"}
    assert client.post("/v1/predict", json=example).status_code == 200
    assert "NewEntityBody" in document["components"]["schemas"]
    assert client.get("/v1/model").json()["new_entities"] is True


def test_a_model_of_ids_alone_says_so(world: World) -> None:
    with client_of(world.paths) as client:
        response = client.post("/v1/predict", json={"head": {"name": "n"}, "relation": "in"})
        assert response.status_code == 422 and "no member" in response.json()["detail"]
        assert client.get("/v1/model").json()["new_entities"] is False
        examples = client.get("/openapi.json").json()["paths"]["/v1/predict"]["post"]["requestBody"]
        assert "new" not in examples["content"]["application/json"]["examples"]


def test_without_the_encoder_only_such_queries_fail(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(text: object) -> None:
        raise EncoderError("secret /path/to/encoder")

    monkeypatch.setattr("kgray.text.same.find_encoder", absent)
    with client_of(world.fused) as client:
        response = client.post("/v1/predict", json={"head": {"name": "n"}, "relation": "in"})
        assert (response.status_code, response.json()["type"]) == (503, "urn:kgray:problem:no-encoder")
        assert "secret" not in response.text
        assert client.post("/v1/predict", json={"head": "x01", "relation": "in"}).status_code == 200


def test_storage_that_has_moved_is_found(world: World, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(world.store.root, moved)
    query = Query(NewEntity("w19", "w1"), "in", None, 3)
    before = load_predictor(world.fused.uri).predict([query])
    vectors = Path(world.vectors.uri)
    hidden = vectors.with_name("hidden")
    vectors.rename(hidden)
    try:
        assert load_predictor(f"{moved}/model/{world.fused.version}").predict([query]) == before
        (gone,) = load_predictor(world.fused.uri).predict([query])
        assert isinstance(gone, QueryError) and gone.code == "no-encoder"
    finally:
        hidden.rename(vectors)


def test_the_encoder_must_be_the_one_that_read_the_graph(world: World) -> None:
    index = load_vectors(world.vectors).index
    table = columns()
    own = load_vectors(world.vectors).entities[5]
    read = SameEncoder(index).entity(table["name"][5], table["description"][5])
    np.testing.assert_allclose(read, own, atol=2e-3)
    assert not SameEncoder(index).entity(" ", "").any()
    with pytest.raises(EncoderError, match="is not the one"):
        SameEncoder(index | {"encoder_sha256": "0" * 64}).entity("w1", "")


def test_a_tuned_encoder_reads_new_texts_as_it_read_the_graphs(world: World) -> None:
    tuned = encoder_artifact(world.store, world.graph, world.encoder)
    vectors = vectors_artifact(world.store, world.graph, world.encoder, tuned)
    model = model_artifact(world.store, world.graph, vectors, ablation(CONFIG, "text_only"))
    predictor, table = load_predictor(model.uri), columns()
    scorer = predictor.bundle.scorer  # type: ignore[attr-defined]
    (answer,) = predictor.predict([Query(NewEntity(table["name"][5], table["description"][5]), "in", None, 33)])
    assert isinstance(answer, Ranking)
    want = scorer.score_tails(torch.tensor([5]), torch.tensor([0]))[0]
    for one in answer.predictions:
        assert one.score == pytest.approx(float(want[predictor.entities.find("tail", one.id).index]), abs=0.05)
    assert not np.allclose(load_vectors(vectors).entities[5], load_vectors(world.vectors).entities[5], atol=0.02)


def options(**given: Any) -> argparse.Namespace:
    empty = {"head_text": None, "tail_text": None, "fact": [], "fact_of": [], "top": 2, "filter_known": False}
    return argparse.Namespace(**{**empty, **given})


def test_the_command_line_answers_and_leaves_each_fact_out(world: World) -> None:
    facts = {"fact": [["in", "x02"]], "fact_of": [["x04", "next"]]}
    query = new_query(options(head_text="w19: w1 w29", **facts), {"relation": "in"})
    assert query == Query(
        NewEntity("w19", "w1 w29", (NewFact("in", tail="x02"), NewFact("next", head="x04"))), "in", None, 2
    )
    found = explain_new(world.ensemble, query)
    predictor = load_predictor(world.ensemble.uri)
    (whole,) = predictor.predict([replace(query, top_k=33)])
    assert isinstance(whole, Ranking) and isinstance(query.head, NewEntity)
    for (text, data), prediction in zip(found, whole.predictions, strict=False):
        assert data["in" if "in" in data else "tail"] == prediction.id and prediction.name in text
        assert sum(data["addends"].values()) == pytest.approx(data["score"], abs=1e-4)
        for number, effect in enumerate(data["facts"]):
            rest = query.head.facts[:number] + query.head.facts[number + 1 :]
            (less,) = predictor.predict([replace(query, head=replace(query.head, facts=rest), top_k=33)])
            assert isinstance(less, Ranking)
            without = next(p.score for p in less.predictions if p.id == prediction.id)
            assert effect["change"] == pytest.approx(prediction.score - without, abs=1e-4)
    assert found[0][1]["facts"][0]["fact"] == "w19 in hub 2"


@pytest.mark.parametrize(
    ("given", "parts", "says"),
    [
        ({"head_text": "a", "tail_text": "b"}, {"relation": "in"}, "exactly one"),
        ({"head_text": "a"}, {"head": "x01", "relation": "in"}, "exactly one"),
        ({"head_text": "a"}, {}, "exactly one"),
        ({"head_text": ": b"}, {"relation": "in"}, "begin with a name"),
        ({"fact": [["in", "x01"]]}, {"relation": "in"}, "--head-text"),
    ],
)
def test_the_command_line_refuses(given: dict[str, Any], parts: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        new_query(options(**given), parts)


def test_without_a_new_entity_nothing_changes() -> None:
    assert new_query(options(), {"head": "a", "relation": "b"}) is None


def test_a_wrong_fact_on_the_command_line_is_told(world: World) -> None:
    query = new_query(options(head_text="w19", fact=[["in", "nobody"]]), {"relation": "in"})
    assert query is not None
    with pytest.raises(QueryError, match=r"head\.facts\.0\.tail: no entity"):
        explain_new(world.ensemble, query)
