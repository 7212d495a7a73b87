"""The predictor against a full sort, and what it says about names it cannot resolve."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from serving_bundle import TableBundle

from kgray.errors import NonFiniteError
from kgray.evaluation.answers import Answerer, top_k
from kgray.serving.names import Names, QueryError
from kgray.serving.predictor import Predictor, Query, Ranking, ScoredTriple, Triple


def full_sort(scores: np.ndarray, count: int, without: set[int]) -> list[int]:
    """The oracle: sort everything by (score descending, index ascending)."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [i for i in order if i not in without][:count]


@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("count", [1, 7, 39, 40, 41, 1000])
def test_top_k_equals_full_sort(levels: int, count: int) -> None:
    rng = np.random.default_rng(levels)
    for _ in range(20):
        scores = (rng.integers(0, levels, 40) if levels else rng.normal(size=40)).astype(np.float32)
        without = np.flatnonzero(rng.random(40) < 0.3)
        assert top_k(scores, count).tolist() == full_sort(scores, count, set())
        assert top_k(scores, count, without).tolist() == full_sort(scores, count, set(without.tolist()))


@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize("filter_known", [False, True])
@pytest.mark.parametrize("cells", [1, 500, 1 << 25])
def test_predict_equals_oracle_in_a_mixed_batch(levels: int, filter_known: bool, cells: int) -> None:
    bundle = TableBundle(levels=levels)
    facts = {tuple(row) for row in bundle.triples.tolist()}
    queries, expected = [], []
    for h, r, t in bundle.triples[:10].tolist():
        he, re, te = bundle.entity_ids[h], bundle.relation_ids[r], bundle.entity_ids[t]
        for missing, scores, fact in (
            ("tail", bundle.forward[h, r], lambda i, h=h, r=r: (h, r, i) in facts),
            ("head", bundle.backward[:, r, t], lambda i, r=r, t=t: (i, r, t) in facts),
            (
                "relation",
                bundle.score_relations(torch.tensor([h]), torch.tensor([t]))[0],
                lambda i, h=h, t=t: (h, i, t) in facts,
            ),
        ):
            parts = {"head": he, "relation": re, "tail": te, missing: None}
            queries.append(Query(**parts, top_k=12, filter_known=filter_known))
            known = {i for i in range(len(scores)) if fact(i)}
            ids = bundle.relation_ids if missing == "relation" else bundle.entity_ids
            order = full_sort(scores.numpy(), 12, known if filter_known else set())
            expected.append([(ids[i], scores[i].item(), i in known) for i in order])
    predictor = Predictor(bundle)
    predictor._answerer = Answerer(bundle, cells)
    for answer, want in zip(predictor.predict(queries), expected, strict=True):
        assert isinstance(answer, Ranking)
        assert [(p.id, p.score, p.known) for p in answer.predictions] == want
        assert [p.rank for p in answer.predictions] == list(range(1, len(want) + 1))


def test_filtering_may_leave_fewer_than_asked() -> None:
    bundle = TableBundle(entities=6, relations=1)
    (answer,) = Predictor(bundle).predict([Query("e00", "r0", None, top_k=50, filter_known=True)])
    assert isinstance(answer, Ranking)
    left = 6 - len(set(bundle.triples[bundle.triples[:, 0] == 0][:, 2].tolist()))
    assert len(answer.predictions) == left


def test_a_query_is_told_back_as_understood() -> None:
    (answer,) = Predictor(TableBundle()).predict([Query("entity 1", "relation_2", None)])
    assert isinstance(answer, Ranking)
    assert (answer.head.id, answer.head.name) == ("e01", "entity 1")
    assert (answer.relation.id, answer.tail, answer.missing) == ("r2", None, "tail")


def test_the_external_id_wins_over_a_name() -> None:
    (answer,) = Predictor(TableBundle()).predict([Query("e06", "r0", None)])
    assert isinstance(answer, Ranking)
    assert answer.head.index == 6


def test_one_bad_query_leaves_its_neighbours_alone() -> None:
    good = Query("e01", "r0", None)
    queries = [good, Query("nobody", "r0", None), Query("twin", "r0", None), Query("e01", "rX", None), good]
    answers = Predictor(TableBundle()).predict(queries)
    assert answers[0] == answers[4]
    assert isinstance(answers[0], Ranking)
    errors = [a for a in answers[1:4] if isinstance(a, QueryError)]
    assert [(e.code, e.field, e.value) for e in errors] == [
        ("unknown-entity", "head", "nobody"),
        ("ambiguous-entity", "head", "twin"),
        ("unknown-relation", "relation", "rX"),
    ]
    assert errors[1].near == ("e03", "e04")
    assert "e03, e04" in str(errors[1])


def test_a_non_finite_score_is_an_error_of_its_own_row() -> None:
    bundle = TableBundle()
    bundle.forward[2, 0, 7] = float("nan")
    bundle.forward[3, 0, 7] = float("inf")
    predictor = Predictor(bundle)
    answers = predictor.predict([Query(f"e0{i}", "r0", None) for i in (1, 2, 3)])
    assert [type(a) for a in answers] == [Ranking, NonFiniteError, NonFiniteError]
    scored = predictor.score([Triple("e01", "r0", "e07"), Triple("e02", "r0", "e07")])
    assert [type(a) for a in scored] == [ScoredTriple, NonFiniteError]


def test_score_is_the_bundles_own_and_marks_known_facts() -> None:
    bundle = TableBundle()
    h, r, t = bundle.triples[0].tolist()
    unknown = next(i for i in range(40) if not bundle.known.contains([h], [r], [i])[0])
    one, bad, two = Predictor(bundle).score(
        [
            Triple(f"e{h:02d}", f"r{r}", f"e{t:02d}"),
            Triple("x", "y", "z"),
            Triple(f"e{h:02d}", f"r{r}", f"e{unknown:02d}"),
        ]
    )
    assert isinstance(one, ScoredTriple) and isinstance(two, ScoredTriple) and isinstance(bad, QueryError)
    want = bundle.score_triples(*(torch.tensor([i]) for i in (h, r, t))).item()
    assert (one.score, one.known, two.known) == (want, True, False)


def test_facts_are_facts_and_few() -> None:
    bundle = TableBundle()
    predictor = Predictor(bundle)
    facts = predictor.facts(4)
    assert len(facts) == 4 and facts == predictor.facts(4)
    assert len({f.head for f in facts}) > 1
    for answer in predictor.score(facts):
        assert isinstance(answer, ScoredTriple) and answer.known
    assert len(predictor.facts(10**6)) == len(bundle.known.by_head_relation.keys)


def test_a_graph_without_facts_has_no_examples() -> None:
    bundle = TableBundle()
    bundle.known = type(bundle.known).build(np.zeros((0, 3), dtype=np.int64), 40, 5)
    assert Predictor(bundle).facts(3) == []


def test_the_caller_must_leave_out_exactly_one_part() -> None:
    predictor = Predictor(TableBundle())
    for query in (Query("e01"), Query("e01", "r0", "e02"), Query("e01", "r0", None, top_k=0)):
        with pytest.raises(ValueError):
            predictor.predict([query])


@pytest.mark.parametrize("size", [50, 30000])
def test_suggestions_in_small_and_large_tables(size: int) -> None:
    names = Names("entity", [f"item_{i:05d}" for i in range(size)], [f"Thing {i}" for i in range(size)])
    assert names.near("Item 00007")[0] == "item_00007"
    assert "item_00009" in names.near("thing 9")
    assert names.near("qqqqqqqq") == []
    with pytest.raises(QueryError, match="did you mean 'item_00012'"):
        names.find("head", "item-00012")


def test_what_the_model_cannot_tell_is_refused_and_costs_the_others_nothing() -> None:
    bundle = TableBundle()
    bundle.tasks = ("tail", "head")
    refused, answered = Predictor(bundle).predict([Query("e00", None, "e01"), Query("e00", "r0", None)])
    assert isinstance(refused, QueryError) and (refused.code, refused.field) == ("no-such-task", "relation")
    assert isinstance(answered, Ranking)
