"""The artifact answers as the scorer it was written from, and knows training facts only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from kgray.artifact import Artifact, Draft, Recipe, Store
from kgray.errors import ArtifactError
from kgray.evaluation.ranking import filter_splits, rank_triples
from kgray.graph.graph import SPLITS, Graph
from kgray.model.bundle import Bundle
from kgray.reasoning.artifact import write_rules
from kgray.reasoning.config import RulesConfig
from kgray.reasoning.facts import Facts
from kgray.reasoning.mining import mine_rules
from kgray.reasoning.recipe import rules_recipe
from kgray.reasoning.scorer import RuleScorer


def umls_graph(folder: Path) -> Graph:
    rows = {s: [line.split("\t") for line in (folder / f"{s}.tsv").read_text().splitlines()] for s in SPLITS}
    entities = sorted({e for part in rows.values() for h, _, t in part for e in (h, t)})
    relations = sorted({r for part in rows.values() for _, r, _ in part})
    number = {e: i for i, e in enumerate(entities)}, {r: i for i, r in enumerate(relations)}
    triples = {
        s: np.array([(number[0][h], number[1][r], number[0][t]) for h, r, t in part]) for s, part in rows.items()
    }
    return Graph.from_arrays(triples, len(entities), len(relations), entities, relations)


@pytest.fixture(scope="module")
def graph(umls: Path) -> Graph:
    return umls_graph(umls)


def scorer_of(graph: Graph, config: RulesConfig) -> RuleScorer:
    facts = Facts.build(graph.triples["train"], graph.num_entities, graph.num_relations)
    return RuleScorer(mine_rules(facts, config), facts, config.top)


def stored(folder: Path, graph: Graph, config: RulesConfig) -> Artifact:
    rules = scorer_of(graph, config).rules
    recipe = Recipe("model", 1, (), {"rules": "test"})
    return Store(folder).build(recipe, lambda draft: write_rules(draft, config, graph, rules)).artifact


def test_umls_is_ranked_well(graph: Graph):
    scorer = scorer_of(graph, RulesConfig(hops=2))
    known = graph.known(filter_splits("valid"))
    counts = rank_triples(scorer, graph.triples["valid"], known, split="valid", tasks=("tail", "head", "relation"))
    metrics = counts.metrics()
    # Measured .670 and .976.
    assert metrics["valid.both.realistic.filtered.full.mrr"] > 0.65
    assert metrics["valid.both.realistic.filtered.full.hits@10"] > 0.95
    assert metrics["valid.relation.realistic.filtered.full.mrr"] > 0.5


def test_what_is_loaded_is_what_was_written(tmp_path: Path, graph: Graph):
    config = RulesConfig(hops=2, top=3, max_constant_rules=50)
    bundle = Bundle.load(stored(tmp_path, graph, config))
    scorer = scorer_of(graph, config)
    assert bundle.info["family"] == "rules"
    assert bundle.tasks == ("tail", "head", "relation")
    assert (bundle.num_entities, bundle.num_relations) == (graph.num_entities, graph.num_relations)
    h, r, t = (torch.from_numpy(column) for column in graph.triples["test"][:100].T.copy())
    assert torch.equal(bundle.score_tails(h, r), scorer.score_tails(h, r))
    assert torch.equal(bundle.score_heads(r, t), scorer.score_heads(r, t))
    assert torch.equal(bundle.score_relations(h, t), scorer.score_relations(h, t))
    assert torch.equal(bundle.score_triples(h, r, t), scorer.score_triples(h, r, t))
    assert isinstance(bundle.scorer, RuleScorer)
    np.testing.assert_array_equal(bundle.scorer.rules.confidence, scorer.rules.confidence)


def test_held_out_facts_change_nothing(tmp_path: Path, graph: Graph):
    config = RulesConfig(hops=2, max_constant_rules=50)
    draw = np.random.default_rng(0)
    limits = np.array([graph.num_entities, graph.num_relations, graph.num_entities])
    others = {s: draw.integers(0, limits, (500, 3)) for s in ("valid", "test")}
    changed = replace(graph, triples={**graph.triples, **others})
    first, second = stored(tmp_path / "a", graph, config), stored(tmp_path / "b", changed, config)
    for name in ("rules.parquet", "facts.npy"):
        assert first.local_path(name).read_bytes() == second.local_path(name).read_bytes()


def test_the_recipe_hangs_on_graph_and_configuration(tmp_path: Path, graph: Graph):
    artifact = stored(tmp_path, graph, RulesConfig(hops=1))
    recipe = rules_recipe(RulesConfig(), artifact)
    assert recipe.kind == "model"
    assert recipe.version == rules_recipe(RulesConfig(), artifact).version
    assert recipe.version != rules_recipe(RulesConfig(seed=1), artifact).version


def test_mining_a_graph_artifact(tmp_path: Path, graph: Graph):
    config = RulesConfig(hops=1, max_constant_rules=50)

    def write(draft: Draft) -> None:
        for name, ids in (("entities/0.parquet", graph.entity_ids), ("relations.parquet", graph.relation_ids)):
            draft.write_table(name, pa.table({"id": np.arange(len(ids)), "external_id": ids, "name": ids}))
        for split, rows in graph.triples.items():
            columns = zip(("head", "relation", "tail"), rows.T, strict=True)
            draft.write_table(f"triples/{split}/0.parquet", pa.table(dict(columns)))

    def mined(draft: Draft, config: RulesConfig, source: Artifact) -> dict[str, int]:
        loaded = Graph.load(source)
        facts = Facts.build(loaded.triples["train"], loaded.num_entities, loaded.num_relations)
        return write_rules(draft, config, loaded, mine_rules(facts, config))

    store = Store(tmp_path)
    source = store.build(Recipe("graph", 1), write).artifact
    recipe = rules_recipe(config, source)
    built = store.build(recipe, lambda draft: mined(draft, config, source)).artifact
    bundle = Bundle.load(built)
    expected = scorer_of(graph, config)
    assert isinstance(bundle.scorer, RuleScorer)
    assert bundle.scorer.rules.to_table().equals(expected.rules.to_table())
    assert bundle.graph_version == source.version
    hops = expected.rules.is_path.sum()
    assert built.counts["rules"] == len(expected.rules)
    assert built.counts["rules_1_hop"] == hops
    assert built.counts["rules_constant"] == len(expected.rules) - hops


def test_rules_of_another_graph_are_refused(tmp_path: Path, graph: Graph):
    config = RulesConfig(hops=1, max_constant_rules=50)
    rules = scorer_of(graph, config).rules
    rules = replace(rules, constant=np.where(rules.constant >= 0, graph.num_entities, -1))
    recipe = Recipe("model", 1, (), {"rules": "test"})
    artifact = Store(tmp_path).build(recipe, lambda draft: write_rules(draft, config, graph, rules)).artifact
    with pytest.raises(ArtifactError, match=r"a rule names entity 135, the facts have 0\.\.134"):
        Bundle.load(artifact)
