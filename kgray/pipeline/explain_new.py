"""Answers for an entity the graph does not have, on the command line, and what each fact given of it does. Floor 6."""

from __future__ import annotations

from typing import Any

from kgray.artifact import Artifact
from kgray.model.bundle import Bundle
from kgray.model.newcomer import NEW, Newcomer, Part
from kgray.serving.names import Names, QueryError
from kgray.serving.newcomers import NewEntities, predictor_of
from kgray.serving.predictor import Query, Ranking


def explain_new(model: Artifact, query: Query) -> list[tuple[str, dict[str, Any]]]:
    """Text and JSON of each answer: its score, what each member adds, by how much the score falls without each fact.

    Raises UserError (a QueryError) for a query that cannot be answered.
    """
    predictor = predictor_of(model, Bundle.load(model))
    (ranking,) = predictor.predict([query])
    if not isinstance(ranking, Ranking):
        raise ranking
    new = predictor.new
    if not isinstance(new, NewEntities):
        raise TypeError("a query of a new entity was answered by something else")
    parts = new.understand(query)
    first, second = (part for name, part in parts.items() if name != query.missing)
    table = new.relations if query.missing == "relation" else new.entities
    places = [table.find(query.missing, one.id).index for one in ranking.predictions]
    addends = {name: row[places].tolist() for name, row in new.answer(query, first, second).addends.items()}
    changes = _changes(new, query, first, second, places)
    found = []
    for number, one in enumerate(ranking.predictions):
        told: dict[str, Any] = {
            "rank": one.rank,
            query.missing: one.id,
            "name": one.name,
            "score": one.score,
            "known": one.known,
            "addends": {name: values[number] for name, values in addends.items()},
            "facts": [{"fact": words, "change": values[number]} for words, values in changes],
        }
        found.append((_render(told, query.missing), told))
    return found


def _changes(
    new: NewEntities, query: Query, first: Part, second: Part, places: list[int]
) -> list[tuple[str, list[float]]]:
    """Each fact of the new entity in words, and the scores of the candidates less what they are without it.

    A member that knows nothing without the fact has no say then, so that its addend goes too.
    """
    whole = new.answer(query, first, second).scores
    found = []
    for at, part in enumerate((first, second)):
        if not isinstance(part, Newcomer):
            continue
        for number, fact in enumerate(part.facts.tolist()):
            rest: list[Part] = [first, second]
            rest[at] = part.without(number)
            try:
                change = (whole - new.answer(query, *rest).scores)[places].tolist()
            except QueryError:
                change = whole[places].tolist()  # it was all that was known
            found.append((_words(fact, part, new.entities, new.relations), change))
    return found


def _words(fact: list[int], entity: Newcomer, entities: Names, relations: Names) -> str:
    head, tail = (entity.name if end == NEW else entities.row(end).name for end in (fact[0], fact[2]))
    return f"{head} {relations.row(fact[1]).name} {tail}"


def _render(told: dict[str, Any], missing: str) -> str:
    known = "  (given)" if told["known"] else ""
    lines = [f"{told['rank']}. {told['name']} ({told[missing]})  score {told['score']:.3f}{known}"]
    lines += [f"   {value:+8.3f}  {name}" for name, value in told["addends"].items()]
    lines += [f"   {one['change']:+8.3f}  by the fact: {one['fact']}" for one in told["facts"]]
    return "\n".join(lines)
