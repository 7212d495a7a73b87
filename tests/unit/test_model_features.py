"""Features of candidate answers equal what a reader of the facts and texts would count."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kgray.graph.graph import Graph
from kgray.model.bags import Bags, TextBags, overlap, words
from kgray.model.features import FACTS, WORDS, CandidateFeatures

NAMES = ["sea dog", "dog", "cat", "", "Sea_Dog"]
TEXTS = ["an old sailor of the sea", "a domestic animal that barks", "a small animal", "", "sailor"]


def random_bags(rng: np.random.Generator, rows: int, items: int, entries: int) -> Bags:
    weights = rng.random(items).astype(np.float32)
    given = rng.integers(0, rows, entries), rng.integers(0, items, entries), rng.random(entries).astype(np.float32)
    return Bags.build(*given, rows, weights)


def dense(bags: Bags) -> np.ndarray:
    table = np.zeros((len(bags.offsets) - 1, len(bags.weights)))
    for row in range(len(table)):
        for at in range(bags.offsets[row], bags.offsets[row + 1]):
            table[row, bags.items[at]] = bags.values[at]
    return table


def test_overlap_is_the_weighted_product_of_the_bags() -> None:
    rng = np.random.default_rng(0)
    left, right = random_bags(rng, 7, 12, 40), random_bags(rng, 9, 12, 60)
    anchors, candidates = rng.integers(0, 7, 5), rng.integers(0, 9, (5, 4))
    expected = np.einsum("bi,i,bki->bk", dense(left)[anchors], left.weights, dense(right)[candidates])
    np.testing.assert_allclose(overlap(left, anchors, right, candidates), expected, rtol=1e-5)


def test_bags_keep_the_greater_value_of_an_item_and_survive_their_arrays() -> None:
    bags = Bags.build(
        np.array([1, 1, 0]), np.array([2, 2, 0]), np.array([0.5, 0.9, 1.0], dtype=np.float32), 3, np.ones(3, np.float32)
    )
    np.testing.assert_allclose(dense(bags), [[1, 0, 0], [0, 0, 0.9], [0, 0, 0]], rtol=1e-6)
    again = Bags.from_arrays("x", bags.to_arrays("x"))
    assert np.array_equal(dense(again), dense(bags))
    assert bags.totals().tolist() == [1.0, 1.0, 0.0]


def test_empty_bags_overlap_with_nothing() -> None:
    bags = TextBags.build(["", ""], ["", "word"])
    assert overlap(bags.texts, np.array([0]), bags.texts, np.array([[0, 1]])).tolist() == [[0.0, 0.0]]


def test_words_of_identifiers_and_texts() -> None:
    assert words("Sea_Dog's 2nd Été") == ["sea", "dog", "s", "2nd", "été"]


def column(
    features: CandidateFeatures, name: str, anchor: int, candidates: list[int], *, tails: bool = True
) -> list[float]:
    found = features(np.array([anchor]), np.array([0]), np.array([candidates]), tails=tails)
    values: list[float] = found[0, :, features.names.index(name)].tolist()
    return values


@pytest.fixture
def features() -> CandidateFeatures:
    train = np.array([[0, 0, 1], [2, 0, 1], [0, 1, 2], [3, 1, 4]])
    graph = Graph.from_arrays({"train": train, "test": np.array([[1, 0, 3]])}, 5, 2)
    return CandidateFeatures.of(graph, NAMES, TEXTS)


def test_facts_are_counted_from_training(features: CandidateFeatures) -> None:
    log1p = math.log1p
    assert column(features, FACTS[0], 0, [1, 3]) == pytest.approx([log1p(2), log1p(1)])
    # Entity 1 is the tail of relation 0 twice in training; as a head only in the test split, which must not count.
    assert column(features, FACTS[1], 3, [1, 2]) == pytest.approx([log1p(2), 0.0])
    assert column(features, FACTS[2], 3, [2, 1]) == pytest.approx([log1p(1), 0.0])
    assert column(features, FACTS[1], 3, [2, 1], tails=False) == pytest.approx([log1p(1), 0.0])
    assert column(features, FACTS[3], 0, [1, 2, 3]) == pytest.approx([log1p(1), log1p(1), 0.0])
    assert column(features, FACTS[4], 0, [2, 4]) == pytest.approx([log1p(1), 0.0])


def test_words_say_who_is_named_where(features: CandidateFeatures) -> None:
    same, letters, in_anchor, early, in_candidate, _, shared = WORDS
    assert column(features, same, 0, [4, 1, 3]) == [1.0, 0.0, 0.0]
    alike = column(features, letters, 0, [4, 1, 2])
    assert alike[0] == pytest.approx(1.0) and 0 < alike[1] < 1 and alike[2] == 0
    # "sea" of the name "sea dog" stands in the text of entity 0, "dog" does not.
    assert 0 < column(features, in_candidate, 0, [0])[0] < 1
    assert column(features, in_anchor, 0, [1, 3]) == [0.0, 0.0]
    assert 0 < column(features, early, 0, [0])[0] < column(features, in_anchor, 0, [0])[0]
    assert column(features, shared, 0, [4])[0] == pytest.approx(1.0)
    assert column(features, shared, 1, [2])[0] > column(features, shared, 1, [4])[0]


def test_features_survive_their_arrays(features: CandidateFeatures) -> None:
    again = CandidateFeatures.from_arrays(features.to_arrays())
    given = (np.array([0, 1]), np.array([0, 1]), np.array([[1, 2], [3, 4]]))
    assert again.names == features.names
    np.testing.assert_array_equal(again(*given, tails=True), features(*given, tails=True))


def test_without_texts_only_facts_are_told() -> None:
    graph = Graph.from_arrays({"train": np.array([[0, 0, 1]])}, 2, 1)
    features = CandidateFeatures.of(graph, ["", ""], ["", ""])
    assert features.names == FACTS
    assert features(np.array([0]), np.array([0]), np.array([[0, 1]]), tails=True).shape == (1, 2, len(FACTS))
    assert CandidateFeatures.from_arrays(features.to_arrays()).texts is None
