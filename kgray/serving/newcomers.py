"""Queries that name entities the graph does not have: from the user's words to ids, and to a ranked answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

import numpy as np

from kgray.artifact import Artifact
from kgray.errors import ArtifactError, EncoderError, NonFiniteError
from kgray.evaluation.answers import top_k
from kgray.graph.neighbours import Int64
from kgray.model.bundle import Bundle
from kgray.model.ensemble import EnsembleScorer
from kgray.model.newcomer import NEW, Newcomer, Part, answers_given
from kgray.model.newcomer_mix import NewAnswer, Newcomers, NoNewcomersError
from kgray.model.states import StateScorer
from kgray.serving.names import Named, Names, QueryError
from kgray.serving.predictor import NewEntity, Prediction, Predictor, Query, Ranking

log = logging.getLogger(__name__)


def predictor_of(artifact: Artifact, bundle: Bundle) -> Predictor:
    """The predictor of a model artifact, with what it takes to answer for new entities where it has a fused member."""
    predictor = Predictor(bundle)
    scorer = bundle.scorer
    members = list(scorer.members.values()) if isinstance(scorer, EnsembleScorer) else [scorer]
    if any(isinstance(member, StateScorer) for member in members):
        opened = partial(Newcomers.open, artifact, bundle)
        predictor.new = NewEntities(opened, predictor.entities, predictor.relations, predictor.version)
    return predictor


class NewEntities:
    """Implements ``NewAnswers``. Thread-safe.

    open: reads weights and text vectors; called once, at the first query, as most services are never asked one.
    """

    def __init__(self, open: Callable[[], Newcomers], entities: Names, relations: Names, version: str) -> None:
        self._open = open
        self._opened: Newcomers | None = None
        self._lock = threading.Lock()
        self.entities, self.relations, self.version = entities, relations, version

    def rank(self, query: Query) -> Ranking | QueryError | NonFiniteError:
        """The answer, uncalibrated: what calibration knows it learned from entities of the graph."""
        try:
            parts = self.understand(query)
            first, second = (part for name, part in parts.items() if name != query.missing)
            answer = self.answer(query, first, second)
        except QueryError as error:
            return error
        scores = answer.scores.numpy()
        if not np.isfinite(scores).all():
            return NonFiniteError(f"model {self.version} gives a score that is not a number for a new entity")
        known = answers_given(query.missing, (first, second))
        order = top_k(scores, query.top_k, without=known if query.filter_known else None)
        table = self.relations if query.missing == "relation" else self.entities
        facts = set(known.tolist())
        predictions = []
        for place, index in enumerate(order.tolist()):
            row = table.row(index)
            predictions.append(Prediction(place + 1, row.id, row.name, float(scores[index]), index in facts))
        return Ranking(query.missing, *self._named(query), tuple(predictions), None, tuple(answer.addends))

    def understand(self, query: Query) -> dict[str, Part]:
        """Head, relation, tail, those given; QueryError for a name that the graph does not have."""
        found: dict[str, Part] = {}
        for field in ("head", "relation", "tail"):
            value = getattr(query, field)
            if isinstance(value, NewEntity):
                found[field] = self.newcomer(field, value)
            elif value is not None:
                found[field] = (self.relations if field == "relation" else self.entities).find(field, value).index
        return found

    def newcomer(self, field: str, entity: NewEntity) -> Newcomer:
        """An entity with its facts as ids. ValueError unless each fact has one other end, the caller's mistake."""
        facts: Int64 = np.full((len(entity.facts), 3), NEW, dtype=np.int64)
        for number, fact in enumerate(entity.facts):
            if (fact.head is None) == (fact.tail is None):
                raise ValueError("a fact of a new entity has one other end")
            place = f"{field}.facts.{number}"
            facts[number, 1] = self.relations.find(f"{place}.relation", fact.relation).index
            if fact.head is not None:
                facts[number, 0] = self.entities.find(f"{place}.head", fact.head).index
            if fact.tail is not None:
                facts[number, 2] = self.entities.find(f"{place}.tail", fact.tail).index
        return Newcomer(entity.name, entity.description, facts)

    def answer(self, query: Query, first: Part, second: Part) -> NewAnswer:
        """Scores of the candidates; QueryError where no member can answer, or the text cannot be read here."""
        given = (("head", query.head), ("tail", query.tail))
        field, name = next((f, v.name) for f, v in given if isinstance(v, NewEntity))
        try:
            return self._newcomers().answer(query.missing, first, second)
        except NoNewcomersError as error:
            raise QueryError("no-new-entities", field, name, f"{field}: {error}") from None
        except (EncoderError, ArtifactError) as error:
            log.warning("new entity: %s", error)  # it speaks of paths, which are nobody's business outside
            message = f"{field}: the encoder and vectors of the graph's texts, which it needs, are not at hand"
            raise QueryError("no-encoder", field, name, message) from error

    def _newcomers(self) -> Newcomers:
        with self._lock:
            if self._opened is None:
                self._opened = self._open()
            return self._opened

    def _named(self, query: Query) -> tuple[Named | None, Named | None, Named | None]:
        def named(field: str) -> Named | None:
            value = getattr(query, field)
            if isinstance(value, NewEntity):
                return Named(NEW, "", value.name)
            table = self.relations if field == "relation" else self.entities
            return None if value is None else table.find(field, value)

        return named("head"), named("relation"), named("tail")
