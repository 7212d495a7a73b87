"""Rows of a table to the texts an encoder reads. Plain strings: no Ray, no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from string import Formatter

_REPEAT_ENDS = (":", " - ", " \u2013 ", " \u2014 ", ", ")
_SPACES = re.compile(r"\s+")
_BRACKETS = {"(": ")", "[": "]", "<": ">", '"': '"'}


def template_fields(template: str) -> list[str]:
    """The columns a template names, in order.

    Raises ValueError for unbalanced braces, positional or formatted fields.
    """
    return [field for _, field in _parse(template) if field]


@lru_cache(maxsize=32)
def _parse(template: str) -> tuple[tuple[str, str], ...]:
    parts, before = [], ""
    for literal, field, spec, conversion in Formatter().parse(template):
        before += literal
        if field is None:  # an escaped brace, or the end
            continue
        if not field.strip() or field.isdigit() or spec or conversion:
            raise ValueError(f"{{{field}}} names no column")
        parts.append((before, field))
        before = ""
    parts.append((before, ""))
    return tuple(parts)


def render(template: str, values: Mapping[str, str]) -> str:
    """One text. What is empty takes the separator before it along, so a missing description leaves just the
    name; without any value the text is empty. A field that repeats an earlier one is dropped; one that begins
    with an earlier one and a separator (``"stool: a seat"`` after the name ``stool``) loses that beginning.
    """
    text, written, dropped = "", list[str](), ""
    for position, (literal, field) in enumerate(_parse(template)):
        # A bracket opened before a field that was left out must not be closed after it.
        closing = _BRACKETS.get(dropped[-1:], "")
        before = literal.removeprefix(closing) if closing else literal
        if not field:
            return text + before if written else ""
        value = _without_repeats(_SPACES.sub(" ", values.get(field) or "").strip(), written)
        if not value:
            dropped = dropped or literal
            continue
        text += (before if written or position == 0 else prefix_of(template)) + value
        written.append(value)
        dropped = ""
    return text


def prefix_of(template: str) -> str:
    """What stands before the first field: a text keeps it whichever field comes first (``passage: `` of
    E5)."""
    return _parse(template)[0][0]


def _without_repeats(value: str, written: Sequence[str]) -> str:
    for earlier in written:
        if value.casefold() == earlier.casefold():
            return ""
        if value[: len(earlier)].casefold() == earlier.casefold():
            rest = value[len(earlier) :]
            for end in _REPEAT_ENDS:
                if rest.startswith(end):
                    return rest[len(end) :].strip()
    return value


def spoken(name: str) -> str:
    """An identifier as words: ``/people/person/nationality`` -> ``people person nationality``, ``_hypernym``
    -> ``hypernym``, ``birthPlace`` -> ``birth Place``. A name with a space in it is left as it is."""
    if re.search(r"\s", name):
        return name
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", re.sub(r"[_/.#]+", " ", name)).split()
    kept = [word for at, word in enumerate(words) if at == 0 or word != words[at - 1]]
    return " ".join(kept) or name


def entity_texts(columns: Mapping[str, Sequence[str | None]], template: str) -> list[str]:
    """The texts of entities. ``columns`` holds name, external_id and what the template names; a name that is
    only the external id is read as words."""
    names, ids = columns["name"], columns["external_id"]
    fields = template_fields(template)
    texts = []
    for row, (name, external) in enumerate(zip(names, ids, strict=True)):
        values = {field: columns[field][row] or "" for field in fields}
        if "name" in values and name == external:
            values["name"] = spoken(name or "")
        texts.append(render(template, values))
    return texts


def relation_texts(columns: Mapping[str, Sequence[str | None]], template: str) -> list[str]:
    """The texts of R relations and then of their R inverses (``inverse <text>``); (2R,)."""
    fields = template_fields(template)
    texts = []
    for row, name in enumerate(columns["name"]):
        values = {field: columns[field][row] or "" for field in fields}
        if "name" in values:
            values["name"] = spoken(name or "")
        texts.append(render(template, values))
    return texts + [f"inverse {text}" if text else "" for text in texts]
