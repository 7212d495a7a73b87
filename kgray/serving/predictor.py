"""From a query in the user's words to a ranked answer: a plain class over a model bundle.

No Ray and no FastAPI here: the same class answers inside a Serve replica, in a test, in a notebook and in
the check that `deploy` makes of what it deployed. Scores are exactly those of the bundle, which are those
the evaluation ranked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from kgray.errors import NonFiniteError
from kgray.evaluation.answers import Answerer, Answers
from kgray.evaluation.calibration import Calibration
from kgray.graph.filter_index import FilterIndex
from kgray.serving.names import Field, Named, Names, QueryError

Missing = Literal["head", "relation", "tail"]


class Bundle(Protocol):
    """What the predictor needs of ``kgray.model.bundle.Bundle``; ids in and scores out as torch tensors."""

    @property
    def num_entities(self) -> int: ...
    @property
    def num_relations(self) -> int: ...
    @property
    def tasks(self) -> Sequence[str]: ...
    @property
    def entity_ids(self) -> Sequence[str]: ...
    @property
    def entity_names(self) -> Sequence[str]: ...
    @property
    def relation_ids(self) -> Sequence[str]: ...
    @property
    def relation_names(self) -> Sequence[str]: ...
    @property
    def known(self) -> FilterIndex: ...
    @property
    def model_version(self) -> str: ...
    @property
    def graph_version(self) -> str: ...
    @property
    def calibration(self) -> Calibration | None: ...
    @property
    def info(self) -> Mapping[str, Any]: ...
    def score_tails(self, heads: torch.Tensor, relations: torch.Tensor) -> torch.Tensor: ...
    def score_heads(self, relations: torch.Tensor, tails: torch.Tensor) -> torch.Tensor: ...
    def score_relations(self, heads: torch.Tensor, tails: torch.Tensor) -> torch.Tensor: ...
    def score_triples(self, heads: torch.Tensor, relations: torch.Tensor, tails: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class NewFact:
    """A fact of a new entity: the relation, and the entity at its other end as ``head`` or as ``tail``."""

    relation: str
    head: str | None = None
    tail: str | None = None


@dataclass(frozen=True, slots=True)
class NewEntity:
    """An entity that the graph does not have, by what is said of it."""

    name: str
    description: str = ""
    facts: tuple[NewFact, ...] = ()


@dataclass(frozen=True, slots=True)
class Query:
    """Two of head, relation, tail as external id or unique name, or a new entity; the third, None, is what is asked
    for."""

    head: str | NewEntity | None = None
    relation: str | None = None
    tail: str | NewEntity | None = None
    top_k: int = 10
    filter_known: bool = False

    @property
    def missing(self) -> Missing:
        """The part asked for. ValueError unless exactly one is None."""
        absent = [part for part in ("head", "relation", "tail") if getattr(self, part) is None]
        if len(absent) != 1:
            raise ValueError(f"give exactly two of head, relation, tail, not {3 - len(absent)}")
        return absent[0]  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Triple:
    """A triple to score, each part an external id or a unique name."""

    head: str
    relation: str
    tail: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """One candidate: ``rank`` from 1; ``known`` when train, valid or test holds the fact already; ``probability``
    calibrated, of a known fact as if it were not known yet; ``in_set``: whether the answer set holds it."""

    rank: int
    id: str
    name: str
    score: float
    known: bool
    probability: float | None = None
    in_set: bool | None = None


@dataclass(frozen=True, slots=True)
class AnswerSet:
    """The candidates likely enough that, over many queries, a share ``coverage`` of the sets hold the true answer;
    ``size`` of them are not known yet."""

    size: int
    coverage: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """The answer to a `Query`: what was understood, and the candidates by descending score. ``answer_set``, and the
    probabilities of the predictions, are None where the model is not calibrated. Of a query with a new entity, whose
    row has the index -1, ``members`` names the members of the model that could answer."""

    missing: Missing
    head: Named | None
    relation: Named | None
    tail: Named | None
    predictions: tuple[Prediction, ...]
    answer_set: AnswerSet | None = None
    members: tuple[str, ...] | None = None


class NewAnswers(Protocol):
    """Answers queries that name new entities; see :mod:`kgray.serving.newcomers`."""

    def rank(self, query: Query) -> Ranking | QueryError | NonFiniteError: ...


@dataclass(frozen=True, slots=True)
class ScoredTriple:
    """The score of one triple: the mean of its two directions, see ``Bundle.score_triples``."""

    head: Named
    relation: Named
    tail: Named
    score: float
    known: bool


class Predictor:
    """Answers batches of queries from one bundle. Thread-safe: it holds nothing that a query changes."""

    def __init__(self, bundle: Bundle, new: NewAnswers | None = None) -> None:
        """new: what answers for entities the graph does not have; None where the model cannot."""
        self.bundle = bundle
        self.new = new
        self.version = bundle.model_version
        self._answerer = Answerer(bundle)
        self.entities = Names("entity", bundle.entity_ids, bundle.entity_names)
        self.relations = Names("relation", bundle.relation_ids, bundle.relation_names)
        for names in (self.entities, self.relations):
            names.near("")  # no request shall wait until suggestions are made ready

    def predict(self, queries: Sequence[Query]) -> list[Ranking | QueryError | NonFiniteError]:
        """Rank the missing part of each query.

        The answers stand in the order of the queries. A query that cannot be answered gets its error in its
        own place, so that one bad query never costs its neighbours in the batch theirs. ValueError for a
        `Query` with other than two parts or a ``top_k`` below 1, which is the caller's mistake.
        """
        answers: list[Ranking | QueryError | NonFiniteError | None] = [None] * len(queries)
        groups: dict[Missing, list[tuple[int, Query, dict[str, Named]]]] = {}
        for place, query in enumerate(queries):
            if query.top_k < 1:
                raise ValueError(f"top_k must be at least 1, not {query.top_k}")
            missing = query.missing
            if isinstance(query.head, NewEntity) or isinstance(query.tail, NewEntity):
                answers[place] = _no_new_entities(query) if self.new is None else self.new.rank(query)
                continue
            if missing not in self.bundle.tasks:
                answers[place] = _no_task(missing, self.bundle.tasks)
                continue
            try:
                parts = {
                    part: self._find(part, value)
                    for part in ("head", "relation", "tail")
                    if (value := getattr(query, part)) is not None
                }
            except QueryError as error:
                answers[place] = error
                continue
            groups.setdefault(missing, []).append((place, query, parts))
        for missing, members in groups.items():
            ranked = self._rank(missing, [m[1] for m in members], [m[2] for m in members])
            for (place, _, _), answer in zip(members, ranked, strict=True):
                answers[place] = answer
        return [answer for answer in answers if answer is not None]

    def score(self, triples: Sequence[Triple]) -> list[ScoredTriple | QueryError | NonFiniteError]:
        """Score each triple; errors stand in the place of the triple they belong to, as in `predict`."""
        answers: list[ScoredTriple | QueryError | NonFiniteError | None] = [None] * len(triples)
        places: list[int] = []
        found: list[tuple[Named, Named, Named]] = []
        for place, triple in enumerate(triples):
            try:
                parts = (
                    self._find("head", triple.head),
                    self._find("relation", triple.relation),
                    self._find("tail", triple.tail),
                )
            except QueryError as error:
                answers[place] = error
                continue
            places.append(place)
            found.append(parts)
        if found:
            h, r, t = (_indices([parts[i] for parts in found]) for i in range(3))
            with torch.inference_mode():
                scores = self.bundle.score_triples(h, r, t).detach().to("cpu", torch.float32).numpy()
            known = self.bundle.known.contains(h, r, t)
            for place, (head, relation, tail), score, fact in zip(places, found, scores, known, strict=True):
                answers[place] = (
                    ScoredTriple(head, relation, tail, float(score), bool(fact))
                    if np.isfinite(score)
                    else _not_finite(self.version, f"{head.id} {relation.id} {tail.id}")
                )
        return [answer for answer in answers if answer is not None]

    def facts(self, count: int) -> list[Triple]:
        """At most ``count`` known facts, evenly spaced over heads and relations; always the same ones."""
        table = self.bundle.known.by_head_relation
        places = np.unique(np.linspace(0, len(table.keys), count, endpoint=False, dtype=np.int64))
        if not len(table.keys):
            return []
        heads, relations = np.divmod(table.keys[places], self.bundle.num_relations)
        tails = table.values[table.offsets[places]]
        return [
            Triple(self.entities.row(h).id, self.relations.row(r).id, self.entities.row(t).id)
            for h, r, t in zip(heads.tolist(), relations.tolist(), tails.tolist(), strict=True)
        ]

    def about(self) -> dict[str, Any]:
        """``graph_version``, ``counts`` (entities, relations, known_facts) and ``metrics`` of the bundle, and whether
        it answers for ``new_entities``."""
        counts = {
            "entities": self.bundle.num_entities,
            "relations": self.bundle.num_relations,
            "known_facts": self.bundle.known.num_triples,
        }
        metrics = dict(self.bundle.info.get("metrics") or {})
        told = {"graph_version": self.bundle.graph_version, "counts": counts, "metrics": metrics}
        return told | {"new_entities": self.new is not None}

    def _find(self, part: Field, value: str) -> Named:
        return (self.relations if part == "relation" else self.entities).find(part, value)

    def _rank(
        self, missing: Missing, queries: list[Query], parts: list[dict[str, Named]]
    ) -> list[Ranking | NonFiniteError]:
        """Rank queries that ask for the same part."""
        first, second = [name for name in ("head", "relation", "tail") if name != missing]
        found = self._answerer.complete(
            missing,
            _indices([p[first] for p in parts]),
            _indices([p[second] for p in parts]),
            np.array([query.top_k for query in queries], dtype=np.int64),
            np.array([query.filter_known for query in queries], dtype=bool),
        )
        return [
            self._answer(missing, named, found, row)
            if found.finite[row]
            else _not_finite(self.version, f"{named[first].id} {named[second].id}")
            for row, named in enumerate(parts)
        ]

    def _answer(self, missing: Missing, named: dict[str, Named], found: Answers, row: int) -> Ranking:
        table = self.relations if missing == "relation" else self.entities
        calibration = self.bundle.calibration if found.calibrated[row] else None
        predictions = []
        for place in range(int(found.count[row])):
            one = table.row(int(found.ids[row, place]))
            score, known = float(found.scores[row, place]), bool(found.known[row, place])
            probability = None if calibration is None else float(found.probability[row, place])
            inside = None if calibration is None else bool(found.in_set[row, place])
            predictions.append(Prediction(place + 1, one.id, one.name, score, known, probability, inside))
        answer_set = None if calibration is None else AnswerSet(int(found.set_size[row]), calibration.coverage)
        parts = (named.get("head"), named.get("relation"), named.get("tail"))
        return Ranking(missing, *parts, tuple(predictions), answer_set)


def _no_task(missing: Missing, tasks: Sequence[str]) -> QueryError:
    message = f"{missing}: this model cannot tell it, it answers {' and '.join(tasks)} queries"
    return QueryError("no-such-task", missing, "", message)


def _no_new_entities(query: Query) -> QueryError:
    field, one = next((f, v) for f, v in (("head", query.head), ("tail", query.tail)) if isinstance(v, NewEntity))
    message = f"{field}: this model has no member that makes an entity of text and facts; give an id or a name"
    return QueryError("no-new-entities", field, one.name, message)


def _indices(rows: Sequence[Named]) -> torch.Tensor:
    return torch.tensor([row.index for row in rows], dtype=torch.int64)


def _not_finite(version: str, what: str) -> NonFiniteError:
    return NonFiniteError(f"model {version} gives a score that is not a number for {what}")
