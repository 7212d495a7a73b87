"""The fused model: slots, leaks, and what becomes of it on disk.

python3 -m pytest tests/unit/test_model.py
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from model_graphs import ENTITIES, ONE_VS_ALL, RELATIONS, SMALL, WIDTH, graph, vectors

from kgray.artifact import Artifact, Recipe, Store
from kgray.config import from_dict, to_dict
from kgray.errors import ArtifactError, ConfigError
from kgray.evaluation.ranking import filter_splits, rank_triples
from kgray.graph.graph import SPLITS, Graph
from kgray.graph.resident import ResidentStore
from kgray.model.bundle import Bundle, write_bundle
from kgray.model.config import GnnConfig, ModelConfig, StructureConfig, TextTowerConfig, ablation
from kgray.model.fused import FusedModel
from kgray.model.fusion import FUSIONS
from kgray.model.gnn import GNNS
from kgray.model.objectives import Batch, batch_loss
from kgray.model.states import StateScorer, encode_all, scorer_of
from kgray.training.batches import BatchMaker
from kgray.training.fused_task import build_model


def batches(config: ModelConfig, data: Graph, batch_size: int = 16) -> BatchMaker:
    return BatchMaker(ResidentStore.of(data), config, batch_size, seed=3)


@pytest.mark.parametrize("kind", ["none", *GNNS.names()])
@pytest.mark.parametrize("fusion", FUSIONS.names())
def test_every_slot_trains(kind: str, fusion: str) -> None:
    data = graph()
    config = replace(SMALL, fusion=fusion, gnn=replace(SMALL.gnn, kind=kind))
    model = build_model(data, vectors(), config, seed=0)
    loss, parts = batch_loss(model, batches(config, data).make(0, 0), config.objective)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert set(parts) == {"fused", "fused.relation", "structure", "structure.relation"}
    silent = [n for n, p in model.named_parameters() if p.grad is None]
    assert not silent, "parameters that no loss reaches"


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("model.gnn.kind", replace(SMALL, gnn=replace(SMALL.gnn, kind="gatt"))),
        ("model.fusion", replace(SMALL, fusion="gate")),
        ("model.decoder", replace(SMALL, decoder="complx")),
        ("model.objective.loss", replace(SMALL, objective=replace(SMALL.objective, loss="bse"))),
    ],
)
def test_an_unknown_part_is_answered_with_the_known_ones(key: str, config: ModelConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(graph(), vectors(), config, seed=0)
    assert caught.value.key == key
    assert all(
        known in str(caught.value)
        for known in {
            "model.fusion": ["gated"],
            "model.decoder": ["complex", "rotate"],
            "model.objective.loss": ["bce", "softmax"],
        }.get(key, ["sage"])
    )


def test_contradictory_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"structure\.kind"):
        replace(SMALL, text=TextTowerConfig(kind="none"), structure=StructureConfig(kind="none"))
    with pytest.raises(ConfigError, match="inference_fanouts"):
        GnnConfig(fanouts=(3, 2))
    with pytest.raises(ConfigError, match=r"text\.kind"):
        build_model(graph(), None, SMALL, seed=0)


def test_ablations_remove_one_side_each() -> None:
    data = graph()
    text = build_model(data, vectors(), ablation(SMALL, "text_only"), seed=0)
    structure = build_model(data, None, ablation(SMALL, "graph_only"), seed=0)
    assert text.structure is None and text.gnn is None and text.text is not None
    assert structure.text is None and structure.gnn is not None
    assert structure.fused_view is not None and structure.fused_view.text is None


@pytest.mark.parametrize("kind", ["one_vs_all", "sampled_softmax"])
@pytest.mark.parametrize("decoder", ["complex", "distmult"])
def test_structure_alone_is_the_pure_embedding_model(kind: str, decoder: str) -> None:
    """Without text and messages: two tables, one loss, the decoder's own scores (Lacroix et al. 2018)."""
    data = graph()
    config = replace(alone(kind), decoder=decoder)
    model = build_model(data, None, config, seed=0)
    assert {name for name, _ in model.named_parameters()} == {
        "structure.table.weight",
        "structure_view.relations.weight",
    }
    batch = batches(config, data).make(0, 0)
    _, parts = batch_loss(model, batch, config.objective)
    assert set(parts) == {"structure", "structure.relation", "n3"}
    entities, relations = model.structure.table.weight, model.structure_view.relations.weight  # type: ignore[union-attr]
    seeds = batch.neighbourhood.nodes
    cubes = torch.tensor(0.0)
    for vector in (*entities[seeds[batch.head]], *relations[batch.relation], *entities[seeds[batch.tail]]):
        if decoder == "complex":
            cubes += torch.complex(*vector.chunk(2)).abs().pow(3).sum()
        else:
            cubes += vector.abs().pow(3).sum()
    torch.testing.assert_close(parts["n3"], config.objective.n3 * cubes.detach() / len(batch.head))
    scorer = scorer_of(model, data.message_index())
    h, r, t = data.triples["train"][0].tolist()
    score = scorer.score_tails(torch.tensor([h]), torch.tensor([r]))[0, t]
    vectors = [v.detach() for v in (entities[h], relations[r], entities[t])]
    if decoder == "complex":
        a, b, c = (torch.complex(*v.chunk(2)) for v in vectors)
        expected = (a * b * c.conj()).sum().real
    else:
        expected = (vectors[0] * vectors[1] * vectors[2]).sum()
    assert float(score) == pytest.approx(float(expected), rel=1e-4)


def alone(kind: str) -> ModelConfig:
    return replace(
        SMALL,
        text=TextTowerConfig(kind="none"),
        gnn=replace(SMALL.gnn, kind="none"),
        dropout=0.0,
        objective=replace(SMALL.objective, kind=kind, n3=0.1),
    )


def test_views_add_up_at_their_weight() -> None:
    data = graph()
    model = build_model(data, vectors(), SMALL, seed=0)
    encoded = encode_all(model, data.message_index())
    h, r, _ = (torch.from_numpy(c.copy()) for c in data.triples["test"].T)
    fused, half, whole = (encoded.scorer(w).score_tails(h, r) for w in (0.0, 0.5, 1.0))
    structure = encoded.heads[1], encoded.tails[1], encoded.relations[1], [encoded.decoders[1]]
    structural = StateScorer(*structure).score_tails(h, r)
    torch.testing.assert_close(whole, fused + structural)
    torch.testing.assert_close(half, fused + 0.5 * structural)
    assert not torch.allclose(fused, whole)


def test_configuration_survives_its_way_through_json() -> None:
    assert from_dict(ModelConfig, to_dict(SMALL)) == SMALL


# --- leaks: the rules of the design -------------------------------------------------------------------------------


def message_edges(batch: Batch) -> set[tuple[int, int, int]]:
    """(source, relation, target) of every message of a batch, as entity ids."""
    nodes = batch.neighbourhood.nodes
    edges: set[tuple[int, int, int]] = set()
    for _, source, target, relation in batch.neighbourhood.hops:
        edges |= set(zip(nodes[source].tolist(), relation.tolist(), nodes[target].tolist(), strict=True))
    return edges


def test_target_edges_and_their_reciprocals_are_not_in_the_message_graph() -> None:
    data = graph()
    config = replace(SMALL, gnn=replace(SMALL.gnn, fanouts=(-1, -1), inference_fanouts=(-1, -1)))
    maker = batches(config, data)
    for step in range(maker.steps):
        edges = message_edges(maker.make(0, step))
        assert edges
        for h, r, t in data.triples["train"][maker._positions(0, step)].tolist():
            assert (h, r, t) not in edges and (t, r + RELATIONS, h) not in edges


def test_putting_the_target_edge_back_is_seen() -> None:
    """The test above can fail: without the exclusion it finds the leak."""
    data = graph()
    config = replace(SMALL, gnn=replace(SMALL.gnn, fanouts=(-1,)))
    maker = batches(config, data)
    sample = maker.sampler.sample  # type: ignore[union-attr]
    maker.sampler.sample = lambda seeds, generator, exclude=None: sample(seeds, generator)  # type: ignore
    h, r, t = data.triples["train"][maker._positions(0, 0)][0].tolist()
    assert (h, r, t) in message_edges(maker.make(0, 0))


def test_states_do_not_change_when_valid_and_test_triples_are_deleted() -> None:
    data = graph()
    bare = Graph.from_arrays({"train": data.triples["train"]}, ENTITIES, RELATIONS)
    one = scorer_of(build_model(data, vectors(), SMALL, seed=0), data.message_index())
    two = scorer_of(build_model(bare, vectors(), SMALL, seed=0), bare.message_index())
    assert torch.equal(one.tails, two.tails) and torch.equal(one.heads, two.heads)


def test_negatives_are_filtered_by_training_triples_only() -> None:
    """A test answer is a negative like any other: masking it would tell the model which entities it is not to push."""
    data = graph()
    maker = batches(ONE_VS_ALL, data, batch_size=len(data.triples["train"]))
    batch = maker.make(0, 0)
    masked = set(zip(batch.known_query.tolist(), batch.known_candidate.tolist(), strict=True))
    positions = maker._positions(0, 0)
    train = {tuple(row) for row in data.triples["train"].tolist()}
    count = len(positions)
    for row, (h, r, t) in enumerate(data.triples["train"][positions].tolist()):
        for entity in range(ENTITIES):
            assert ((row, entity) in masked) == ((h, r, entity) in train and entity != t)
            assert ((row + count, entity) in masked) == ((entity, r, t) in train and entity != h)


def test_filters_by_split() -> None:
    assert set(filter_splits("valid")) == {"train", "valid", "support"}
    assert set(filter_splits("test")) == {*SPLITS, "support"}


# --- objectives ---------------------------------------------------------------------------------------------------


def test_inclusion_probabilities_are_what_sampling_does() -> None:
    data = graph()
    maker = batches(SMALL, data)
    seen = np.zeros(ENTITIES)
    rounds = 400
    for epoch in range(rounds // maker.steps + 1):
        for step in range(maker.steps - 1):
            batch = maker.make(epoch, step)
            seen[batch.neighbourhood.nodes[: batch.neighbourhood.hops[-1][0]].numpy()] += 1
    share = seen / ((rounds // maker.steps + 1) * (maker.steps - 1))
    expected = np.exp(maker._inclusion(1).numpy())
    # Negatives are drawn with replacement and a batch without: a few percent between the two is in the approximation.
    assert np.abs(share - expected).max() < 0.12
    assert abs(share.mean() - expected.mean()) < 0.05


# --- on disk ------------------------------------------------------------------------------------------------------


def stored(tmp_path: Path, model: FusedModel, data: Graph) -> Artifact:
    def make(draft: object) -> dict[str, int]:
        scorer = scorer_of(model, data.message_index())
        write_bundle(draft.local_dir(), model, scorer, data, [{"epoch": 0.0}], {"best_epoch": 1})  # type: ignore
        return {}

    return Store(str(tmp_path)).build(Recipe("model", 1, (), {}), make).artifact


def test_a_bundle_gives_the_scores_it_was_made_from(tmp_path: Path) -> None:
    data = graph()
    model = build_model(data, vectors(), SMALL, seed=0)
    scorer = scorer_of(model, data.message_index())
    bundle = Bundle.load(stored(tmp_path, model, data))
    h, r, t = (torch.from_numpy(c.copy()) for c in data.triples["test"].T)
    assert torch.equal(bundle.score_tails(h, r), scorer.score_tails(h, r))
    assert torch.equal(bundle.score_heads(r, t), scorer.score_heads(r, t))
    assert torch.equal(bundle.score_relations(h, t), scorer.score_relations(h, t))
    assert torch.equal(bundle.score_triples(h, r, t), scorer.score_triples(h, r, t))
    assert bundle.entity_ids == [f"e{i}" for i in range(ENTITIES)]
    assert bundle.known.tails([data.triples["test"][0, 0]], [data.triples["test"][0, 1]])[1].tolist()
    counts = rank_triples(bundle, data.triples["test"], data.known(SPLITS), split="test")
    assert 0 < counts.metrics()["test.both.realistic.filtered.full.mrr"] <= 1


def test_the_trained_model_can_be_restored(tmp_path: Path) -> None:
    data, text = graph(), vectors()
    model = build_model(data, text, SMALL, seed=0)
    bundle = Bundle.load(stored(tmp_path, model, data))
    index = data.message_index()
    again = bundle.restore(
        torch.from_numpy(index.degrees > 0), torch.from_numpy(text.entities), torch.from_numpy(text.relations)
    )
    assert torch.equal(scorer_of(again, index).tails, bundle.scorer.tails)


def test_a_bundle_of_another_kind_is_refused(tmp_path: Path) -> None:
    other = Store(str(tmp_path)).build(Recipe("report", 1, (), {}), lambda draft: {}).artifact
    with pytest.raises(ArtifactError, match="not a model"):
        Bundle.load(other)


def test_no_text_becomes_the_learned_vector_and_no_structure_the_text() -> None:
    data = graph()
    model = build_model(data, vectors(), SMALL, seed=0).eval()
    assert model.text is not None and model.fusion is not None
    text = model.text(torch.tensor([7, 8]))
    assert torch.equal(text[0], model.text.missing) and not torch.equal(text[1], model.text.missing)
    absent = torch.zeros(2, 1, dtype=torch.bool)
    for name in FUSIONS.names():
        fusion = FUSIONS.get(name)(16)
        fused = [fusion(text, torch.full((2, 16), v) * absent, absent) for v in (0.0, 5.0)]
        assert torch.equal(*fused), f"{name} reads a structural vector that is not there"
    assert vectors().entities.shape == (ENTITIES, WIDTH)
