"""The path model against a slow and obvious one, its pruning, its leaks, its answers and explanations.

python3 -m pytest tests/unit/test_model_paths.py
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from model_graphs import ENTITIES, RELATIONS, graph

from kgray.artifact import Draft, Recipe, Store
from kgray.config import from_dict
from kgray.errors import ArtifactError, ConfigError
from kgray.evaluation.ranking import rank_triples
from kgray.graph.graph import Graph
from kgray.model import path_dense
from kgray.model.bundle import Bundle
from kgray.model.path_explain import PathStep, best_paths
from kgray.model.path_graph import Frontier, Removal, strongest, take_hop
from kgray.model.path_scorer import PathScorer, write_paths
from kgray.model.paths import PathBatch, PathModel, Reached, entity_loss, path_loss
from kgray.model.paths_config import PathsConfig

TINY = PathsConfig(layers=3, dim=8, patterns=2, keep=None, dropout=0.0)
NONE = torch.empty(0, dtype=torch.int64)


def loops_and_twins() -> Graph:
    """Random facts with loops, doubled pairs, a doubled fact, and entities 18 and 19 without any."""
    generator = np.random.default_rng(4)
    facts = generator.integers(0, [18, RELATIONS, 18], (50, 3))
    twins = np.array([[1, 0, 2], [1, 1, 2], [2, 2, 1], [3, 0, 3], [5, 1, 6], [5, 1, 6]])
    return Graph.from_arrays({"train": np.concatenate([twins, facts]), "valid": facts[:3]}, 20, RELATIONS)


def model_of(data: Graph, config: PathsConfig, seed: int = 0) -> PathModel:
    torch.manual_seed(seed)
    return PathModel(config, data.message_index(), data.num_relations)


def batch_of(data: Graph, positions: list[int], withheld: torch.Tensor | None = None) -> PathBatch:
    place = torch.tensor(positions)
    heads, relations, tails = torch.from_numpy(data.triples["train"])[place].T
    return PathBatch(
        head=torch.cat([heads, tails]),
        relation=torch.cat([relations, relations + data.num_relations]),
        tail=torch.cat([tails, heads]),
        triple=torch.cat([place, place]),
        known_query=NONE,
        known_entity=NONE,
        withheld=withheld,
    )


def removal_of(batch: PathBatch, *, pair: bool) -> Removal:
    return Removal(batch.head, batch.tail, batch.triple, pair, batch.withheld)


def oracle(model: PathModel, triples: np.ndarray, head: int, relation: int) -> torch.Tensor:
    """(N,) scores of one query, edge by edge, nothing pruned."""
    r, n = model.num_relations, model.num_entities
    edges = [(h, k, t) for h, k, t in triples.tolist()] + [(t, k + r, h) for h, k, t in triples.tolist()]
    query = model.queries.weight[relation]
    hidden = {head: query}
    for number, layer in enumerate(model.layers):
        incoming = {e: torch.zeros_like(query) for e in {*hidden, *(t for h, _, t in edges if h in hidden)}}
        incoming[head] = incoming[head] + query
        for h, k, t in edges:
            if h in hidden:
                message = hidden[h] * layer.relations[k]
                if layer.patterns:
                    gates = torch.sigmoid(layer.gate(hidden[h]) + layer.gate_query(query))
                    message = message * (gates @ layer.speech[k])
                incoming[t] = incoming[t] + message
        after = {}
        for e, total in incoming.items():
            former = hidden.get(e, torch.zeros_like(query))
            update = torch.relu(layer.norm(layer.incoming(total) + layer.own(former)))
            after[e] = former + update
            if number < len(model.layers) - 1:
                after[e] = after[e] * torch.sigmoid(layer.priority.own(after[e]) + layer.priority.query(query))
        hidden = after
    rows = torch.stack([hidden.get(e, torch.zeros_like(query)) for e in range(n)])
    return model.out(torch.relu(model.hidden(rows) + model.hidden_query(query))).squeeze(1)


@pytest.mark.parametrize("patterns", [0, 2])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("data", [graph(), loops_and_twins()], ids=["ring", "loops"])
def test_scores_are_those_of_the_oracle(data: Graph, patterns: int, sparse: bool) -> None:
    model = model_of(data, replace(TINY, patterns=patterns))
    heads, relations = torch.tensor([0, 7, 7, 2]), torch.tensor([0, 1, 4, 5])
    scores = model(heads, relations, sparse=sparse).matrix()
    for row, h, r in zip(scores, heads.tolist(), relations.tolist(), strict=True):
        torch.testing.assert_close(row, oracle(model, data.triples["train"], h, r), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("pair", [True, False])
@pytest.mark.parametrize("drop", [True, False])
def test_what_a_query_may_not_use_it_does_not_use(sparse: bool, pair: bool, drop: bool) -> None:
    """Each query of a batch answers as the oracle does over a graph from which the triples were taken."""
    data = loops_and_twins()
    triples, positions = data.triples["train"], [0, 3, 4, 9, 20]
    withheld = torch.zeros(len(triples), dtype=torch.bool)
    withheld[[0, 7, 30]] = True
    batch = batch_of(data, positions, withheld if drop else None)
    model = model_of(data, TINY)
    scores = model(batch.head, batch.relation, removal_of(batch, pair=pair), sparse=sparse).matrix()
    for row, h, r, t, position in zip(
        scores, *(x.tolist() for x in (batch.head, batch.relation, batch.tail, batch.triple)), strict=True
    ):
        gone = np.arange(len(triples)) == position
        if pair:
            gone = np.isin(triples[:, 0], [h, t]) & np.isin(triples[:, 2], [h, t])
            gone &= (triples[:, 0] != triples[:, 2]) | (h == t)
        if drop:
            gone |= withheld.numpy()
        torch.testing.assert_close(row, oracle(model, triples[~gone], h, r), atol=1e-5, rtol=1e-4)


def test_both_ways_of_computing_have_the_same_gradient() -> None:
    data = loops_and_twins()
    batch = batch_of(data, [0, 3, 9, 20])
    gradients = []
    for sparse in (True, False):
        model = model_of(data, TINY)
        entity_loss(model(batch.head, batch.relation, removal_of(batch, pair=False), sparse=sparse), batch).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, f"{name}: no loss reaches it"
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


def test_the_quicker_way_is_taken_only_where_it_is_the_same() -> None:
    data = graph()
    assert path_dense.fits(model_of(data, TINY))
    assert path_dense.fits(model_of(data, replace(TINY, keep=ENTITIES)))
    assert not path_dense.fits(model_of(data, replace(TINY, keep=ENTITIES - 1)))
    assert not path_dense.fits(model_of(Graph.from_arrays(data.triples, 3000, RELATIONS), TINY))


def test_a_leaked_answer_would_be_found() -> None:
    """The loss with the target edges in place falls where nothing can be learned: random facts, each asked once."""
    facts = np.random.default_rng(0).integers(0, [60, 4, 60], (240, 3))
    data = Graph.from_arrays({"train": facts, "valid": facts[:1]}, 60, 4)
    losses = {}
    for leak in (False, True):
        model = model_of(data, replace(TINY, layers=2, dim=16))
        optimiser = torch.optim.Adam(model.parameters(), 0.01)
        for step in range(60):
            batch = batch_of(data, list(range(step * 40 % 240, step * 40 % 240 + 40)))
            loss = entity_loss(model(batch.head, batch.relation), batch) if leak else path_loss(model, batch)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        losses[leak] = loss.item()
    assert losses[True] < 1.0
    assert losses[False] > 3.0, "a fact that nothing else tells of was known: its own edge spoke"


@pytest.mark.parametrize("remove", ["edge", "pair"])
def test_the_loss_ignores_the_edge_it_asks_for(remove: str) -> None:
    """Taking the target triple out of the graph altogether changes nothing."""
    data = graph()
    triples = data.triples["train"]
    batch = batch_of(data, [5])
    whole = model_of(data, replace(TINY, remove=remove))  # type: ignore[arg-type]
    less = Graph.from_arrays({"train": np.delete(triples, 5, 0), "valid": triples[:1]}, ENTITIES, RELATIONS)
    bare = model_of(less, TINY)
    h, r = batch.head, batch.relation
    leaked = entity_loss(whole(h, r), batch)
    if remove == "edge":
        torch.testing.assert_close(path_loss(whole, batch), entity_loss(bare(h, r), batch))
    assert not torch.isclose(path_loss(whole, batch), leaked)


def test_the_loss_is_the_softmax_over_all_entities() -> None:
    data = loops_and_twins()
    model = model_of(data, replace(TINY, layers=1))
    batch = batch_of(data, [0, 3, 10, 20])
    known = torch.tensor([0, 0, 2, 5, 7]), torch.tensor([4, 19, 18, 4, 0])
    batch = replace(batch, known_query=known[0], known_entity=known[1])
    batch.tail[1] = 18  # an entity no path reaches
    assert not bool(((known[1] == batch.tail[known[0]])).any())
    reached = model(batch.head, batch.relation, sparse=True)
    scores = reached.matrix()
    assert len(reached.query) < scores.numel()
    slow = torch.nn.functional.cross_entropy(scores.index_put(known, torch.tensor(float("-inf"))), batch.tail)
    torch.testing.assert_close(entity_loss(reached, batch), slow)


@pytest.mark.parametrize("keep", [ENTITIES, 10**6])
def test_pruning_that_keeps_all_changes_nothing(keep: int) -> None:
    data = graph()
    one, two = (model_of(data, replace(TINY, keep=k)) for k in (None, keep))
    h, r = torch.arange(6), torch.arange(6)
    assert torch.equal(one(h, r, sparse=True).matrix(), two(h, r, sparse=True).matrix())


def test_pruning_keeps_the_strongest_the_source_and_lower_ids() -> None:
    at = Frontier(torch.tensor([0, 0, 0, 0, 0, 1, 1]), torch.tensor([1, 3, 4, 6, 8, 0, 2]), torch.tensor([4, 5]))
    kept = strongest(torch.tensor([0.5, 2.0, 0.5, 0.5, -9.0, 1.0, 7.0]), at, 3, 2)
    assert kept.tolist() == [0, 1, 4, 5, 6]
    after = at.take(kept)
    assert after.entity.tolist() == [1, 3, 8, 0, 2] and after.source.tolist() == [2, 3]


def test_a_pruned_query_does_not_depend_on_its_batch() -> None:
    data = graph()
    model = model_of(data, replace(TINY, keep=4)).eval()
    heads, relations = torch.arange(30), torch.arange(30) % 6
    together = model(heads, relations).matrix()
    alone = torch.cat([model(heads[i : i + 1], relations[i : i + 1]).matrix() for i in range(30)])
    torch.testing.assert_close(together, alone)
    assert torch.equal(together, model(heads, relations).matrix())


def test_hops_reach_what_a_breadth_first_search_does() -> None:
    data = loops_and_twins()
    model = model_of(data, TINY)
    at = Frontier(torch.arange(3), torch.tensor([1, 18, 5]), torch.arange(3))
    reach = [{1}, {18}, {5}]
    pairs = [(h, t) for h, _, t in data.triples["train"].tolist()]
    for _ in range(3):
        at = take_hop(model.graph, at, None).after
        reach = [s | {t for h, t in pairs if h in s} | {h for h, t in pairs if t in s} for s in reach]
        found = [set(at.entity[at.query == q].tolist()) for q in range(3)]
        assert found == reach
        assert at.entity[at.source].tolist() == [1, 18, 5]


# --- what it answers ---------------------------------------------------------------------------------------------


def test_unreached_candidates_tie_and_rank_realistically() -> None:
    data = loops_and_twins()
    scorer = PathScorer(model_of(data, replace(TINY, layers=1)))
    scores = scorer.score_tails(torch.tensor([18]), torch.tensor([0]))[0]
    assert len(scores[:18].unique()) == 1 and scores[19] == scores[0]
    counts = rank_triples(scorer, np.array([[18, 0, 3]]), None, split="test", tasks=("tail",))
    # 19 entities share a score; entity 18 itself lies above or below them.
    expected = (19 + 1) / 2 + float(scores[18] > scores[0])
    assert counts.metrics()["test.tail.realistic.raw.full.mrr"] == pytest.approx(1 / expected)


def test_directions_agree_with_single_triples() -> None:
    data = graph()
    for keep in (None, 5):
        scorer = PathScorer(model_of(data, replace(TINY, keep=keep)))
        h, r, t = (torch.from_numpy(c.copy()) for c in data.triples["test"].T)
        forward = scorer.score_tails(h, r).gather(1, t[:, None]).squeeze(1)
        backward = scorer.score_heads(r, t).gather(1, h[:, None]).squeeze(1)
        torch.testing.assert_close(scorer.score_triples(h, r, t), (forward + backward) / 2)
        torch.testing.assert_close(scorer.score_tails(h, r).exp().sum(1), torch.ones(len(h)))
    with pytest.raises(ValueError, match="not relations"):
        scorer.score_relations(h, t)


def test_edge_weights_of_one_are_no_weights() -> None:
    data = loops_and_twins()
    model = model_of(data, TINY)
    at, hidden, queries = model.start(torch.tensor([1, 5]), torch.tensor([0, 4]))
    hop = take_hop(model.graph, at, None)
    layer = model.layers[0]
    torch.testing.assert_close(
        layer(hidden, queries, at, hop), layer(hidden, queries, at, hop, torch.ones(len(hop.edge)))
    )


def test_paths_lead_from_head_to_tail_over_facts() -> None:
    data = graph()
    facts = {tuple(row) for row in data.triples["train"].tolist()}
    for keep in (None, 8):
        model = model_of(data, replace(TINY, keep=keep))
        paths = best_paths(model, 0, 2, 2, limit=4)
        assert 0 < len(paths) <= 4
        assert [p.weight for p in paths] == sorted((p.weight for p in paths), reverse=True)
        assert len({p.steps for p in paths}) == len(paths)
        for path in paths:
            place = 0
            for step in path.steps:
                assert (step.head, step.relation, step.tail) in facts
                assert place == (step.head if step.forward else step.tail)
                place = step.tail if step.forward else step.head
            assert place == 2 and len(path.steps) <= 3


def test_no_path_is_said_as_none_and_wrong_ids_as_an_error() -> None:
    model = model_of(loops_and_twins(), TINY)
    assert best_paths(model, 0, 0, 19, limit=3) == []
    with pytest.raises(ValueError, match="entity id 20"):
        best_paths(model, 0, 0, 20, limit=3)
    with pytest.raises(ValueError, match="relation id 6"):
        best_paths(model, 0, 2 * RELATIONS, 1, limit=3)


def test_a_step_is_told_as_the_fact_it_runs_over() -> None:
    data = Graph.from_arrays({"train": np.array([[0, 0, 1], [2, 1, 1]])}, 3, 2)
    (path,) = best_paths(model_of(data, replace(TINY, layers=2)), 0, 1, 2, limit=5)
    assert path.steps == (PathStep(0, 0, 1, forward=True), PathStep(2, 1, 1, forward=False))


# --- configuration and disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("layers", 0), ("dim", 0), ("patterns", -1), ("keep", 0), ("dropout", 1.0), ("edge_drop", -0.1)],
)
def test_senseless_settings_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        replace(TINY, **{key: value})


def test_an_artifact_answers_as_the_model_did(tmp_path: Path) -> None:
    data = graph()
    model = model_of(data, replace(TINY, keep=6))

    def make(draft: Draft) -> dict[str, object]:
        write_paths(draft.local_dir(), model, data, [{"epoch": 0.0}], {"train": {}})
        draft.upload_local()
        return {}

    artifact = Store(str(tmp_path)).build(Recipe("model", 1, (), {}), make).artifact
    bundle = Bundle.load(artifact)
    assert from_dict(PathsConfig, bundle.info["paths"]) == model.config
    assert tuple(bundle.tasks) == ("tail", "head")
    h, r = torch.arange(6), torch.arange(6) % RELATIONS
    assert torch.equal(bundle.score_tails(h, r), PathScorer(model).score_tails(h, r))
    assert bundle.scorer.paths(0, 2, 2) == PathScorer(model).paths(0, 2, 2)  # type: ignore[attr-defined]
    np.save(bundle.folder / "triples.npy", np.full_like(np.load(bundle.folder / "triples.npy"), ENTITIES))
    with pytest.raises(ArtifactError, match="do not fit together"):
        Bundle.load(artifact)


def test_reached_finds_pairs_and_only_those_there() -> None:
    reached = Reached(torch.tensor([0, 0, 1]), torch.tensor([1, 4, 0]), torch.zeros(3), torch.zeros(2), 5)
    place, there = reached.find(torch.tensor([0, 0, 1, 1]), torch.tensor([4, 2, 0, 4]))
    assert there.tolist() == [True, False, True, False] and place[there].tolist() == [1, 2]
