"""The path model in the one training loop: it learns, resumes to the bit, shares its steps out.

python3 -m pytest tests/unit/test_training_paths.py
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from model_graphs import SMALL, graph, vectors
from test_training import Keeping, StopError

from kgray.artifact import Source
from kgray.errors import ConfigError
from kgray.evaluation.ranking import filter_splits, rank_triples
from kgray.graph.graph import Graph
from kgray.model.path_explain import PathStep
from kgray.model.path_scorer import PathScorer
from kgray.model.paths_config import PathsConfig
from kgray.training.config import OptimiserConfig, TrainConfig
from kgray.training.loop import Fit, fit
from kgray.training.paths_task import PathBatchMaker

TINY = PathsConfig(layers=2, dim=8, patterns=2, keep=20, dropout=0.2, edge_drop=0.1)
TRAIN = TrainConfig(epochs=3, batch_size=16, precision="float32", patience=10)


def composed(entities: int = 60) -> tuple[Graph, dict[int, int]]:
    """Relation 2 is relation 0, then 1; relation 3 is noise. The middle of each pair (head -> middle) besides."""
    generator = np.random.default_rng(0)
    n = np.arange(entities)
    first, second = generator.permutation(entities), generator.permutation(entities)
    facts = [
        np.stack([n, np.full(entities, relation), tails], 1)
        for relation, tails in enumerate(
            (first, second, second[first], generator.integers(0, entities, entities)),
        )
    ]
    both = generator.permutation(facts[2])
    train = np.concatenate([facts[0], facts[1], both[20:], facts[3]])
    data = Graph.from_arrays({"train": train, "valid": both[:10], "test": both[10:20]}, entities, 4)
    return data, dict(zip(n.tolist(), first.tolist(), strict=True))


def same(one: Fit, two: Fit) -> bool:
    weights = one.model.state_dict(), two.model.state_dict()
    return one.history == two.history and all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.parametrize("keep", [None, 12])
def test_a_composition_is_learned_and_explained(keep: int | None) -> None:
    data, middle = composed()
    config = PathsConfig(layers=3, dim=16, patterns=2, keep=keep, dropout=0.0)
    train = replace(TRAIN, epochs=12, optimiser=OptimiserConfig(lr=0.01))
    done = fit(data, None, config, train)
    assert done.best > 0.9
    test = data.triples["test"]
    counts = rank_triples(done.scorer, test, data.known(filter_splits("test")), split="test", tasks=("tail", "head"))
    assert counts.metrics()["test.both.realistic.filtered.full.mrr"] > 0.9
    assert isinstance(done.scorer, PathScorer)
    right = 0
    for h, _, t in test.tolist():
        best = done.scorer.paths(h, 2, t, limit=1)[0]
        back = done.scorer.paths(t, 2 + 4, h, limit=1)[0]
        steps = PathStep(h, 0, middle[h], forward=True), PathStep(middle[h], 1, t, forward=True)
        right += best.steps == steps
        right += back.steps == tuple(replace(step, forward=False) for step in reversed(steps))
    assert right >= 18, f"{right} of 20 explained by the two facts they follow from"


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    runs = [fit(graph(), None, TINY, replace(TRAIN, seed=seed)) for seed in (0, 0, 1)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.parametrize("keep", [None, 20])
@pytest.mark.parametrize("died_after", [1, 3])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, died_after: int, keep: int | None) -> None:
    config, model = replace(TRAIN, checkpoint_steps=2, accumulate=2), replace(TINY, keep=keep)
    undisturbed = fit(graph(), None, model, config, Keeping(tmp_path / "a"))
    victim = Keeping(tmp_path / "b", last=died_after)
    with pytest.raises(StopError):
        fit(graph(), None, model, config, victim)
    torch.manual_seed(99)
    assert same(undisturbed, fit(graph(), None, model, config, Keeping(tmp_path / "c"), resume=victim.kept[-1]))


def test_several_threads_add_up_in_the_same_order() -> None:
    generator = np.random.default_rng(0)
    facts = generator.integers(0, [400, 5, 400], (3000, 3))
    data = Graph.from_arrays({"train": facts[100:], "valid": facts[:100]}, 400, 5)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        runs = [fit(data, None, TINY, replace(TRAIN, epochs=1, batch_size=256)) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    assert same(runs[0], runs[1])


def test_bfloat16_trains_where_products_are_large() -> None:
    data, _ = composed()
    config = PathsConfig(layers=3, dim=16, patterns=2, keep=None, dropout=0.0)
    train = replace(TRAIN, epochs=12, precision="bfloat16", optimiser=OptimiserConfig(lr=0.01))
    assert fit(data, None, config, train).best > 0.9


@pytest.mark.parametrize("world", [1, 3])
def test_workers_share_the_triples_and_withhold_what_is_asked_for(world: int) -> None:
    data = graph()
    train, seen = data.triples["train"], []
    config = replace(TINY, remove_batch=True, edge_drop=0.0)
    for rank in range(world):
        maker = PathBatchMaker(train, data.known(["train"]), config, 16, 0, rank, world)
        for step in range(maker.steps):
            batch = maker.make(1, step)
            positions = batch.triple[: len(batch.triple) // 2]
            seen += positions.tolist()
            assert batch.withheld is not None
            assert batch.withheld.nonzero().squeeze(1).tolist() == sorted(positions.tolist())
            assert not (batch.known_entity == batch.tail[batch.known_query]).any(), "the gold answer was masked"
    assert sorted(seen) == list(range(len(train)))


def test_dropped_edges_differ_by_step_and_are_those_of_the_step_again() -> None:
    data = graph()
    maker = PathBatchMaker(data.triples["train"], data.known(["train"]), replace(TINY, edge_drop=0.3), 16, 0)
    one, two, again = (maker.make(0, step).withheld for step in (0, 1, 0))
    assert one is not None and two is not None and again is not None
    assert torch.equal(one, again) and not torch.equal(one, two)
    assert 0.1 < one.float().mean() < 0.5


def test_the_path_model_reads_no_text() -> None:
    with pytest.raises(ConfigError, match="the graph alone"):
        fit(graph(), vectors(), TINY, TRAIN)


def test_a_recipe_tells_families_apart_and_fused_ones_keep_their_version() -> None:
    from kgray.artifact import Recipe
    from kgray.config import to_dict
    from kgray.training.distributed import FORMAT, train_recipe

    class Input:
        source = Source("graph", "0123", "/nowhere")

    recipes = [train_recipe(None, model, TRAIN, Input(), None) for model in (SMALL, TINY)]  # type: ignore[arg-type]
    left_out = ("device", "cpus_per_worker", "max_failures", "checkpoint_steps", "least_workers", "preflight")
    how = {k: v for k, v in to_dict(TRAIN).items() if k not in left_out}
    old = Recipe("model", FORMAT, (Input.source,), {"model": to_dict(SMALL), "train": how})
    assert recipes[0].version == old.version != recipes[1].version
