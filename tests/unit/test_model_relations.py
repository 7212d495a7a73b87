"""The relation classifier: what it sees of a pair, that the asked fact is no part of it, that it learns.

python3 -m pytest tests/unit/test_model_relations.py
"""

from __future__ import annotations

import sys
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from model_graphs import graph as ring
from model_graphs import vectors
from test_training_paths import composed

from kgray.artifact import Draft, Recipe, Store
from kgray.errors import ArtifactError, ConfigError
from kgray.evaluation.ranking import filter_splits, rank_triples
from kgray.graph.graph import Graph
from kgray.model import pair_features
from kgray.model.bundle import Bundle
from kgray.model.pair_features import PairIndex
from kgray.model.relation_scorer import RelationScorer
from kgray.model.relations_config import RelationsConfig
from kgray.reasoning.facts import Facts
from kgray.reasoning.rules import unpack
from kgray.training.config import OptimiserConfig, TrainConfig
from kgray.training.loop import Fit, fit

N, R = 9, 3
SMALL = RelationsConfig(dim=16, hidden=32, text=False, dropout=0.0, drop=0.0)
TRAIN = TrainConfig(epochs=8, batch_size=16, precision="float32", optimiser=OptimiserConfig(lr=0.01))


def random_triples(seed: int, count: int = 25) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.stack([generator.integers(0, high, count) for high in (N, R, N)], axis=1)


def index_of(triples: np.ndarray, remove: str = "edge", hops: int = 3) -> PairIndex:
    facts = Facts.build(triples, N, R)
    return PairIndex.build(triples, facts, hops=hops, bodies=10_000, remove=remove, seed=0)


def edges_of(triples: np.ndarray) -> set[tuple[int, int, int]]:
    """Both directions, loops left out."""
    plain = {tuple(t) for t in triples.tolist() if t[0] != t[2]}
    return plain | {(t, r + R, h) for h, r, t in plain}


def slow_paths(edges: set[tuple[int, int, int]], head: int, tail: int, hops: int) -> set[tuple[int, ...]]:
    """Every sequence of relations along a path of different entities, by trying all."""
    if head == tail:
        return set()
    found: set[tuple[int, ...]] = set()
    between: dict[tuple[int, int], list[int]] = {}
    for h, r, t in edges:
        between.setdefault((h, t), []).append(r)
    for length in range(1, hops + 1):
        for middle in permutations(sorted(set(range(N)) - {head, tail}), length - 1):
            nodes = [head, *middle, tail]
            bodies: list[tuple[int, ...]] = [()]
            for step in pairwise(nodes):
                bodies = [(*body, r) for body in bodies for r in between.get(step, ())]
            found |= set(bodies)
    return found


def spelled(index: PairIndex, items: np.ndarray) -> set[tuple[int, ...]]:
    bodies = [tuple(body) for length, keys in index.bodies.items() for body in unpack(R, keys, length).tolist()]
    return {bodies[item] for item in items}


@pytest.mark.parametrize("seed", range(3))
def test_context_and_paths_are_those_found_by_trying_all(seed: int) -> None:
    triples = random_triples(seed)
    index, edges = index_of(triples), edges_of(triples)
    heads, tails = (part.ravel() for part in np.meshgrid(np.arange(N), np.arange(N)))
    bag = index.paths(heads, tails)
    around = index.context(heads, tails, None, heads=True)
    told = {body for length in index.bodies for body in map(tuple, unpack(R, index.bodies[length], length).tolist())}
    for i, (head, tail) in enumerate(zip(heads.tolist(), tails.tolist(), strict=True)):
        mine = bag.items[bag.offsets[i] : bag.offsets[i + 1]]
        assert spelled(index, mine) == slow_paths(edges, head, tail, 3) & told
        counts = [sum(1 for h, r, _ in edges if h == head and r == relation) for relation in range(2 * R)]
        np.testing.assert_allclose(np.expm1(around[i]), counts, atol=1e-5)


@pytest.mark.parametrize("remove", ["edge", "pair"])
def test_the_asked_fact_is_no_part_of_what_is_seen(remove: str) -> None:
    """As if it, or with it every fact of its pair, had never been among the facts."""
    triples = np.unique(random_triples(4, 40), axis=0)
    index = index_of(triples, remove)
    heads, relations, tails = (np.ascontiguousarray(column) for column in triples.T)
    seen = index.paths(heads, tails, relations)
    for i, (head, relation, tail) in enumerate(triples.tolist()):
        gone = (triples == [head, relation, tail]).all(axis=1)
        if remove == "pair":
            gone = np.isin(heads * N + tails, [head * N + tail, tail * N + head])
        without = PairIndex(Facts.build(triples[~gone], N, R), index.bodies, remove)
        one = (np.array([head]), np.array([tail]))
        assert seen.items[seen.offsets[i] : seen.offsets[i + 1]].tolist() == without.paths(*one).items.tolist()
        for end, other, is_head in ((*one, True), (*one[::-1], False)):
            given = index.context(end, other, np.array([relation]), heads=is_head)
            np.testing.assert_array_equal(given, without.context(end, other, None, heads=is_head))


def test_hubs_have_no_paths_that_would_cost_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    triples = random_triples(1, 40)
    index = index_of(triples)
    monkeypatch.setattr(pair_features, "_MOST_STEPS", 0)
    assert not len(index.paths(triples[:, 0], triples[:, 2]).items)


def data() -> Graph:
    """The relation of a pair follows from the path between its ends; both ends have all relations around them."""
    return composed(120)[0]


def write(draft: Draft, done: Fit, graph: Graph, facts: np.ndarray | None = None) -> dict[str, int]:
    folder = draft.local_dir()
    done.task.write(folder, done.scorer, graph, done.history, {})
    if facts is not None:
        np.save(folder / "facts.npy", facts)
    draft.upload_local()
    draft.drop_local()
    return {}


@pytest.mark.parametrize("remove", ["edge", "pair"])
def test_paths_looked_up_in_pieces_are_those_looked_up_at_once(remove: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense graph has more paths between its pairs than memory holds."""
    triples = random_triples(5, 60)
    whole = index_of(triples, remove)
    at_once = whole.paths(*triples[:, [0, 2, 1]].T)
    monkeypatch.setattr(pair_features, "_STEPS", 7)
    pieces = index_of(triples, remove)
    assert sum(1 for _ in pieces._packed(*triples[:, [0, 2]].T, 3, None)) > 10
    assert all(np.array_equal(pieces.bodies[length], whole.bodies[length]) for length in whole.bodies)
    in_pieces = pieces.paths(*triples[:, [0, 2, 1]].T)
    assert np.array_equal(in_pieces.items, at_once.items) and np.array_equal(in_pieces.offsets, at_once.offsets)


def test_it_learns_what_paths_say_is_written_and_read_back(tmp_path: Path) -> None:
    graph = data()
    done = fit(graph, None, SMALL, TRAIN)
    assert done.metric == "valid.relation.realistic.filtered.full.mrr"
    assert done.best > 0.9
    assert {key for row in done.history for key in row} >= {"train.loss", done.metric}
    recipe = Recipe("model", 1, (), {"relations": "test"})
    built = Store(tmp_path).build(recipe, lambda draft: write(draft, done, graph)).artifact
    bundle = Bundle.load(built)
    assert bundle.tasks == ("relation",)
    heads, relations, tails = (torch.from_numpy(column) for column in graph.triples["test"].T.copy())
    scores = bundle.score_relations(heads, tails)
    torch.testing.assert_close(scores, done.scorer.score_relations(heads, tails))
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(len(scores)))
    assert torch.equal(bundle.score_triples(heads, relations, tails), scores.gather(1, relations[:, None])[:, 0])
    with pytest.raises(ValueError, match="not tails"):
        bundle.score_tails(heads, relations)
    counts = rank_triples(
        done.scorer, graph.triples["test"], graph.known(filter_splits("test")), split="test", tasks=("relation",)
    )
    assert counts.metrics()["test.relation.realistic.filtered.full.hits@1"] > 0.8


def test_no_batch_shows_a_fact_to_itself() -> None:
    """With all that a pair's own facts leave out, a graph of single edges says nothing: the loss stays at chance."""
    generator = np.random.default_rng(0)
    triples = np.stack([np.arange(0, 200, 2), generator.integers(0, 2, 100), np.arange(1, 200, 2)], axis=1)
    graph = Graph.from_arrays({"train": triples, "valid": triples[:20]}, 200, 2)
    config = RelationsConfig(dim=8, hidden=16, text=False, identity=False, dropout=0.0)
    done = fit(graph, None, config, TrainConfig(epochs=3, batch_size=100, precision="float32"))
    assert done.history[-1]["train.loss"] > 0.6


@pytest.mark.parametrize("remove", ["edge", "pair"])
def test_texts_are_read_where_there_are_any(remove: str) -> None:
    graph = ring()
    config = RelationsConfig(dim=16, hidden=32, dropout=0.0, identity=False, hops=0, remove=remove)
    done = fit(graph, vectors(), config, TRAIN)
    assert isinstance(done.scorer, RelationScorer)
    heads, tails = (torch.from_numpy(graph.triples["test"][:, column]) for column in (0, 2))
    scores = done.scorer.score_relations(heads, tails)
    done.scorer.texts = np.zeros_like(done.scorer.texts)
    assert not torch.allclose(scores, done.scorer.score_relations(heads, tails))
    with pytest.raises(ConfigError, match="text"):
        fit(graph, None, config, TRAIN)


def test_files_that_contradict_each_other_are_told(tmp_path: Path) -> None:
    done = fit(data(), None, SMALL, TrainConfig(epochs=1, batch_size=64))
    recipe = Recipe("model", 1, (), {"relations": "broken"})
    wrong = np.array([[0, 99, 0]])
    artifact = Store(tmp_path).build(recipe, lambda draft: write(draft, done, data(), wrong)).artifact
    with pytest.raises(ArtifactError, match="do not fit together"):
        Bundle.load(artifact)


@pytest.mark.parametrize(("key", "value"), [("hops", 4), ("dim", 0), ("bodies", 0), ("dropout", 1.0), ("drop", -0.1)])
def test_what_cannot_be_is_told_by_key(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        RelationsConfig(**{key: value})
