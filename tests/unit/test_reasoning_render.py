"""Explanations as a person reads them: nothing that matters is cut off."""

from __future__ import annotations

import pytest

from kgray.reasoning.explain import Fact
from kgray.reasoning.prediction import Explanation, Neighbour, Neighbours
from kgray.reasoning.render import WIDTH, Vocabulary, render

REGION = "/film/film/release_date_s./film/film_regional_release_date/film_release_region"
DISTRIBUTOR = "/film/film/distributors./film/film_film_distributor_relationship/region"
TWINS = [f"/{kind}/statistical_region/places_exported_to./location/imports_and_exports/exported_to" for kind in "ab"]
RELATIONS = ["film", "a" * 60, REGION, DISTRIBUTOR, *TWINS]
ENTITIES = ["Easy Rider", "Bosnia and Herzegovina, a country in the Balkans of Europe"]
IDS = ["/m/0jqp3", "/m/0166b"]


def words() -> Vocabulary:
    return Vocabulary(IDS, ENTITIES, RELATIONS, RELATIONS)


def test_a_long_relation_shows_its_end_where_that_tells_it_apart() -> None:
    assert list(words().between) == [
        "film",
        "a" * 60,
        ".../film_release_region",
        ".../region",
        *TWINS,
    ]


def test_both_ends_of_every_fact_are_told() -> None:
    facts = tuple(Neighbour(Fact(0, relation, 1), 0.5) for relation in range(len(RELATIONS)))
    text = render(
        Explanation(
            task="tail", head=0, relation=2, tail=1, score=1.0, rank=1.0, candidates=2, known=False, rival=None,
            rival_score=None, addends=(), first_ranking=(), rules_score=None, rules=(), paths=(),
            neighbours=Neighbours("fused", 1.0, len(facts), facts), probability=None, in_set=None, coverage=None,
        ),
        words(),
        1,
    )  # fmt: skip
    assert max(map(len, text.splitlines())) <= WIDTH
    assert " ".join(text.split()).count("Bosnia and Herzegovina, a country in ... (/m/0166b)") == 1 + len(facts)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/film/performance/special_performance_type./film/performance/film", ".../film/performance/film"),
        ("http://www.w3.org/2000/01/rdf-schema#subClassOf", ".../2000/01/rdf-schema#subClassOf"),
        ("https://example.org/a/very/long/namespace/indeed#knows", ".../a/very/long/namespace/indeed#knows"),
        ("/" + "x" * 50 + "/", "/" + "x" * 50 + "/"),
    ],
)
def test_what_is_shown_of_a_long_relation(name: str, shown: str) -> None:
    assert Vocabulary(IDS, ENTITIES, [name], [name]).between == [shown]


def test_a_relation_that_answers_shows_its_end_too() -> None:
    named = Vocabulary(IDS, ENTITIES, [REGION], ["release region"])
    assert words().relation(2) == ".../film_release_region"
    assert named.relation(0) == "release region (.../film_release_region)"


@pytest.mark.parametrize("longest", [10, 39, 40])
def test_a_short_relation_is_left_alone(longest: int) -> None:
    name = "/" + "x" * (longest - 1)
    assert Vocabulary(IDS, ENTITIES, [name], [name]).between == [name]
