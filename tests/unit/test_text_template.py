"""Rows to texts: separators, repeats, identifiers, relations."""

from __future__ import annotations

import pytest

from kgray.errors import ConfigError
from kgray.text.config import TextConfig
from kgray.text.template import entity_texts, relation_texts, render, spoken, template_fields

DEFAULT = "{name}: {description}"


@pytest.mark.parametrize(
    ("template", "values", "text"),
    [
        (DEFAULT, {"name": "stool", "description": "a seat"}, "stool: a seat"),
        (DEFAULT, {"name": "stool", "description": ""}, "stool"),
        (DEFAULT, {"name": "stool"}, "stool"),
        (DEFAULT, {"name": "", "description": "a seat"}, "a seat"),
        (DEFAULT, {"name": " ", "description": "\t"}, ""),
        (DEFAULT, {"name": "stool", "description": "Stool"}, "stool"),
        (DEFAULT, {"name": "stool", "description": "stool: a seat"}, "stool: a seat"),
        (DEFAULT, {"name": "stool", "description": "stool - a seat"}, "stool: a seat"),
        (DEFAULT, {"name": "stool", "description": "stools are seats"}, "stool: stools are seats"),
        (DEFAULT, {"name": "two\n words", "description": "a  b"}, "two words: a b"),
        ("passage: {name}: {description}", {"name": "", "description": "a seat"}, "passage: a seat"),
        ("passage: {name}", {"name": ""}, ""),
        ("{name} ({type}): {description}", {"name": "a", "type": "T", "description": "d"}, "a (T): d"),
        ("{name} ({type}): {description}", {"name": "a", "type": "", "description": "d"}, "a: d"),
        ("{name} ({type})", {"name": "a", "type": ""}, "a"),
        ("{name} ({type})", {"name": "a", "type": "T"}, "a (T)"),
        ("{{{name}}}", {"name": "a"}, "{a}"),
    ],
)
def test_what_is_empty_or_repeated_leaves_no_trace(template: str, values: dict[str, str], text: str) -> None:
    assert render(template, values) == text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("_hypernym", "hypernym"),
        ("/people/person/nationality", "people person nationality"),
        ("/film/film/genre", "film genre"),
        ("interacts_with", "interacts with"),
        ("birthPlace", "birth Place"),
        ("already some_words", "already some_words"),
        ("___", "___"),
        ("", ""),
        ("有关", "有关"),
    ],
)
def test_identifiers_are_read_as_words(name: str, words: str) -> None:
    assert spoken(name) == words


def test_relations_are_followed_by_their_inverses() -> None:
    columns = {"name": ["_has_part", "plain name", ""], "description": ["", "d", ""]}
    texts = relation_texts(columns, DEFAULT)
    assert texts[:3] == ["has part", "plain name: d", ""]
    assert texts[3:] == ["inverse has part", "inverse plain name: d", ""]


def test_a_name_that_is_only_the_id_becomes_words_and_a_real_one_stays() -> None:
    columns = {
        "name": ["idea_or_concept", "some_name", None],
        "external_id": ["idea_or_concept", "Q1", "Q2"],
        "description": ["", "", None],
    }
    assert entity_texts(columns, DEFAULT) == ["idea or concept", "some_name", ""]


def test_a_template_may_name_any_column_but_must_name_one() -> None:
    assert template_fields("{label} [{kind}]") == ["label", "kind"]
    for wrong in ("no field", "{", "{}", "{0}", "{name!r}", "{name:>3}", "}"):
        with pytest.raises(ConfigError, match="template"):
            TextConfig(template=wrong)


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_length", 2), ("batch_tokens", 0), ("workers", 0), ("cpus_per_worker", 0), ("encoder", " ")],
)
def test_impossible_settings_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        TextConfig(**{key: value})  # type: ignore[arg-type]
