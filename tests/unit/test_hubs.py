"""An entity with a very great many edges: nothing is made of its neighbours times the queries that name it.

python3 -m pytest tests/unit/test_hubs.py
"""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from model_graphs import SMALL

from kgray.graph.graph import Graph
from kgray.graph.members import Members
from kgray.graph.resident import ResidentStore
from kgray.model.features import CandidateFeatures
from kgray.model.pair_features import PairIndex
from kgray.reasoning.config import RulesConfig
from kgray.reasoning.facts import Facts
from kgray.reasoning.mining import mine_rules
from kgray.training.batches import BatchMaker

LEAVES = 200_000
QUERIES = 1024


@pytest.fixture(scope="module")
def star() -> Graph:
    """Everybody follows entity 0, and nobody else."""
    leaves = np.arange(1, LEAVES + 1)
    triples = np.stack([leaves, np.zeros_like(leaves), np.zeros_like(leaves)], axis=1)
    return Graph.from_arrays({"train": triples}, LEAVES + 1, 1)


def megabytes(call: Callable[[], object]) -> float:
    """Most memory that a call holds at once."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


# Neighbours times queries, 200,000 x 1,024 numbers of eight bytes, would be 1,600 MB.


def test_a_training_step(star: Graph) -> None:
    maker = BatchMaker(ResidentStore.of(star), SMALL, QUERIES, seed=0)
    assert megabytes(lambda: maker.make(0, 0)) < 100


def test_features_of_candidates(star: Graph) -> None:
    features = CandidateFeatures.of(star, [""] * star.num_entities, [""] * star.num_entities)
    anchors, relations = np.zeros(QUERIES, dtype=np.int64), np.zeros(QUERIES, dtype=np.int64)
    candidates = np.random.default_rng(0).integers(0, LEAVES, (QUERIES, 20))
    assert megabytes(lambda: features(anchors, relations, candidates, tails=False)) < 100


def test_rules_and_paths(star: Graph) -> None:
    facts = Facts.build(star.triples["train"], star.num_entities, 1)
    assert megabytes(lambda: mine_rules(facts, RulesConfig())) < 500
    index = PairIndex.build(star.triples["train"], facts, hops=3, bodies=100, remove="edge", seed=0)
    heads, relations, tails = (np.ascontiguousarray(c) for c in star.triples["train"][:QUERIES].T)
    assert megabytes(lambda: index.paths(heads, tails, relations)) < 100
    assert megabytes(lambda: index.context(heads, tails, relations, heads=True)) < 100


def test_other_answers_are_those_of_the_index() -> None:
    """The slow way: every query by itself."""
    generator = np.random.default_rng(0)
    triples = np.stack([generator.integers(0, n, 300) for n in (12, 3, 12)], axis=1)
    graph = Graph.from_arrays({"train": triples}, 12, 3)
    maker = BatchMaker(ResidentStore.of(graph), SMALL, 50, seed=0)
    heads, relations, tails = (np.ascontiguousarray(c) for c in triples[:50].T)
    among = generator.random(12) < 0.5
    facts = {tuple(t) for t in triples.tolist()}
    for chosen in (None, among):
        wanted = np.ones(12, dtype=bool) if chosen is None else chosen
        expected = [
            *((i, e) for i, (h, r, t) in enumerate(triples[:50].tolist()) for e in range(12)
              if (h, r, e) in facts and e != t and wanted[e]),
            *((50 + i, e) for i, (h, r, t) in enumerate(triples[:50].tolist()) for e in range(12)
              if (e, r, t) in facts and e != h and wanted[e]),
        ]  # fmt: skip
        members = None if chosen is None else Members(np.flatnonzero(chosen))
        rows, entities = maker.other_answers(heads, relations, tails, members)
        assert list(zip(rows.tolist(), entities.tolist(), strict=True)) == expected
