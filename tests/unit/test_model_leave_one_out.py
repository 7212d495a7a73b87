"""Facts left out one at a time, against encoding again over a graph that never had them.

python3 -m pytest tests/unit/test_model_leave_one_out.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_graphs import ENTITIES, RELATIONS, SMALL, graph, vectors

from kgray.graph.graph import Graph
from kgray.graph.neighbours import NeighbourIndex
from kgray.graph.sampler import Block, NeighbourSampler, step_generator
from kgray.model import leave_one_out as module
from kgray.model.bundle import Bundle, write_bundle
from kgray.model.config import GnnConfig, ModelConfig, ablation
from kgray.model.ensemble import score
from kgray.model.fused import FusedModel, Neighbourhood
from kgray.model.leave_one_out import LeaveOneOut, NotExplainableError
from kgray.model.states import INFERENCE_SEED, encode_all, scorer_of
from kgray.training.fused_task import build_model

TWO_HOPS = replace(SMALL, gnn=GnnConfig(fanouts=(3, 3), inference_fanouts=(-1, -1), heads=2))


def model_of(config: ModelConfig, data: Graph) -> FusedModel:
    """Seeded weights, large enough that neighbours matter."""
    model = build_model(data, vectors(), config, seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def stretched(data: Graph) -> Graph:
    """With a hub (entity 3), a loop, and a pair with two relations."""
    more = [(3, 2, i) for i in range(8, 20)] + [(3, 0, 3), (5, 1, 3), (5, 2, 3)]
    train = np.unique(np.concatenate([data.triples["train"], np.array(more)]), axis=0)
    return Graph.from_arrays({**data.triples, "train": train}, ENTITIES, RELATIONS)


@pytest.mark.parametrize("task", ["tail", "head", "relation"])
@pytest.mark.parametrize("kind", ["attention", "gcn", "rgcn"])
def test_each_change_is_that_of_encoding_again_without_the_fact(
    task: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_EDGES", 700)  # several portions
    data = stretched(graph())
    model = model_of(replace(TWO_HOPS, gnn=replace(TWO_HOPS.gnn, kind=kind)), data)
    index = data.message_index()
    full = scorer_of(model, index)
    first, second = {"tail": (3, 1), "head": (0, 3), "relation": (3, 5)}[task]
    wanted = [0, 1, 2]
    found = LeaveOneOut(model, full, data).effects(task, first, second, wanted)
    given = torch.tensor([first]), torch.tensor([second])
    torch.testing.assert_close(found.scores, score(full, task, *given)[0, wanted], rtol=1e-4, atol=1e-4)
    entities = {"tail": {3}, "head": {3}, "relation": {3, 5}}[task]
    train = data.triples["train"]
    beside = [tuple(row) for row in train.tolist() if {row[0], row[2]} & entities]
    assert [tuple(row) for row in found.facts.tolist()] == sorted(beside)
    for fact, change in zip(found.facts.tolist(), found.changes, strict=True):
        rest = train[(train != fact).any(axis=1)]
        again = encode_all(model, NeighbourIndex.build(rest, ENTITIES, RELATIONS)).scorer(float(model.structure_weight))
        # Only the query's entities are encoded again, and only in their place in the query.
        heads, tails = full.heads.clone(), full.tails.clone()
        for entity in entities:
            heads[entity] = again.heads[entity]
            if task == "relation":
                tails[entity] = again.tails[entity]
        less = replace_states(full, heads, tails)
        want = found.scores - score(less, task, *given)[0, wanted]
        torch.testing.assert_close(change, want, rtol=1e-3, atol=2e-4)
    assert found.changes.abs().max() > 1e-2


def replace_states(scorer, heads, tails):
    return type(scorer)(heads, tails, scorer.relations, scorer.decoders)


def without(block: Block, head: int, relation: int, tail: int) -> Block:
    edges = zip(block.nodes[block.source], block.relation, block.nodes[block.target], strict=True)
    gone = {(head, relation, tail), (tail, relation + RELATIONS, head)}
    keep = np.array([tuple(int(i) for i in edge) not in gone for edge in edges])
    return Block(block.nodes, block.num_targets, block.source[keep], block.target[keep], block.relation[keep])


@pytest.mark.parametrize("seed_entity", [3, 9])
def test_hubs_keep_the_neighbours_they_were_encoded_with(seed_entity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENCODED_AT_ONCE", 8)
    data = stretched(graph())
    config = replace(TWO_HOPS, gnn=replace(TWO_HOPS.gnn, inference_fanouts=(3, 2)))
    model = model_of(config, data)
    index = data.message_index()
    full = encode_all(model, index, batch_size=8).scorer(float(model.structure_weight))
    found = LeaveOneOut(model, full, data).effects("tail", seed_entity, 1, [0, 4])
    stored = score(full, "tail", torch.tensor([seed_entity]), torch.tensor([1]))[0, [0, 4]]
    torch.testing.assert_close(found.scores, stored, rtol=1e-4, atol=1e-4)
    # The same draw of the whole batch, less the edges of a fact.
    start = seed_entity // 8 * 8
    seeds = np.arange(start, start + 8)
    drawn = NeighbourSampler(index, (3, 2)).sample(seeds, step_generator(INFERENCE_SEED, 0, start, 0))
    assert len(found.facts)
    for fact, change in zip(found.facts.tolist(), found.changes, strict=True):
        blocks = [without(block, *fact) for block in drawn]
        with torch.no_grad():
            views = model.encode(Neighbourhood.of(torch.from_numpy(seeds), blocks))
        heads = full.heads.clone()
        heads[seed_entity] = module.join([states.head for _, states in views])[seed_entity - start]
        less = score(replace_states(full, heads, full.tails), "tail", torch.tensor([seed_entity]), torch.tensor([1]))
        torch.testing.assert_close(change, found.scores - less[0, [0, 4]], rtol=1e-3, atol=2e-4)
    pair = LeaveOneOut(model, full, data).effects("relation", seed_entity, 20, [0, 1])
    stored = score(full, "relation", torch.tensor([seed_entity]), torch.tensor([20]))[0, :2]
    torch.testing.assert_close(pair.scores, stored, rtol=1e-4, atol=1e-4)


def test_an_entity_without_facts_has_none_to_leave_out() -> None:
    data = Graph.from_arrays({"train": np.array([[1, 0, 2]])}, ENTITIES, RELATIONS)
    model = model_of(TWO_HOPS, data)
    found = LeaveOneOut(model, scorer_of(model, data.message_index()), data).effects("tail", 7, 0, [1, 2])
    assert found.facts.shape == (0, 3) and found.changes.shape == (0, 2) and torch.isfinite(found.scores).all()


def test_from_a_written_model_or_the_reason_why_not(tmp_path: Path) -> None:
    data = graph()

    def written(config: ModelConfig, text: str | None) -> Bundle:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        model = model_of(config, data)
        write_bundle(folder, model, scorer_of(model, data.message_index()), data, [], {"vectors": text})
        artifact = SimpleNamespace(kind="model", uri="x", version="v", local_path=lambda _: folder)
        return Bundle.load(artifact)  # type: ignore[arg-type]

    bundle = written(SMALL, "0123")
    found = LeaveOneOut.of(bundle, data, vectors()).effects("tail", 3, 0, [4])
    stored = bundle.score_tails(torch.tensor([3]), torch.tensor([0]))[0, 4]
    torch.testing.assert_close(found.scores[0], stored, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotExplainableError, match="0123 it was trained on are not there"):
        LeaveOneOut.of(bundle, data, None)
    with pytest.raises(NotExplainableError, match="graph other is not"):
        LeaveOneOut.of(bundle, replace(data, version="other"), vectors())
    with pytest.raises(NotExplainableError, match="reads no neighbours"):
        LeaveOneOut.of(written(ablation(SMALL, "text_only"), "0123"), data, vectors())
