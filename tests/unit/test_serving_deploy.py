"""The parts of deploying that need no cluster: what is asked, what counts as right, what counts as new."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest
from serving_bundle import TableBundle

from kgray.artifact import Artifact
from kgray.errors import ConfigError
from kgray.serving import deploy as module
from kgray.serving.config import ExampleQuery, ServeConfig
from kgray.serving.deploy import Answer, DeployError
from kgray.serving.predictor import Predictor, Query, Ranking

MODEL = Artifact("/store/model/0123", {"kind": "model", "version": "0123456789abcdef", "files": []})


def test_examples_come_first_then_one_question_of_each_kind() -> None:
    config = ServeConfig(examples=(ExampleQuery(head="e01", relation="r0", filter_known=True),), max_top_k=7)
    predictor = Predictor(TableBundle())
    queries = module._queries(config, predictor)
    assert queries[0] == Query("e01", "r0", None, 5, True)
    assert [q.missing for q in queries[1:]] == ["tail", "head", "relation"]
    rankings = module._expected(config, predictor, queries)
    known = [p.known for ranking in rankings[1:] for p in ranking.predictions]
    assert len(rankings) == 4 and any(known)


def test_an_example_that_the_graph_lacks_is_a_mistake_in_the_configuration() -> None:
    config = ServeConfig(examples=(ExampleQuery(head="e01", relation="r-3"),))
    predictor = Predictor(TableBundle())
    with pytest.raises(ConfigError, match=r"serve.examples\[0\].relation.*did you mean") as caught:
        module._expected(config, predictor, module._queries(config, predictor))
    assert caught.value.value == "r-3"


def exchange(status: int = 200, shift: float = 0.0, drop: int = 0) -> tuple[Answer, Ranking]:
    """An answer of the service and the model's own, which differ as told."""
    (ranking,) = Predictor(TableBundle()).predict([Query("e01", "r0", None, 4)])
    assert isinstance(ranking, Ranking)
    predictions = [{"id": p.id, "score": p.score + shift} for p in ranking.predictions[drop:]]
    return Answer("/v1/predict", {}, status, {"predictions": predictions}), ranking


def test_scores_over_http_must_be_the_models_own() -> None:
    module._compare(*exchange())
    module._compare(*exchange(shift=5e-6))
    for answer, ranking in (exchange(shift=1e-3), exchange(drop=1), exchange(status=500)):
        with pytest.raises(DeployError):
            module._compare(answer, ranking)


def test_what_makes_a_deployment_a_new_one() -> None:
    config = ServeConfig()
    same = module._fingerprint(config, MODEL)
    for change in ({"port": 8001}, {"startup_timeout_s": 1.0}, {"examples": (ExampleQuery(head="a", tail="b"),)}):
        assert module._fingerprint(replace(config, **change), MODEL) == same
    assert module._fingerprint(replace(config, max_top_k=5), MODEL) != same
    newer = Artifact(MODEL.uri, {**MODEL.manifest, "version": "f" * 16})
    assert module._fingerprint(config, newer) != same


def test_a_taken_port_is_found_before_serve_waits_for_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        # Not through ServeConfig: the system may have picked a port that it refuses.
        config = ServeConfig()
        object.__setattr__(config, "port", taken.getsockname()[1])
        with pytest.raises(ConfigError, match="Address already in use"):
            module._check_free(config)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("localhost", "http://localhost:8000"),
        ("::1", "http://[::1]:8000"),
    ],
)
def test_url(host: str, url: str) -> None:
    assert module._url(ServeConfig(host=host)) == url
