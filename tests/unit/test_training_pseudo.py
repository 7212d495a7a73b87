"""Pseudo-labels: which they are, and that they are targets and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from model_graphs import ENTITIES, ONE_VS_ALL, RELATIONS, SMALL, TRAIN, graph, vectors

from kgray.errors import ConfigError
from kgray.graph.graph import Graph
from kgray.model.config import StructureConfig, TextTowerConfig
from kgray.training.config import PseudoConfig
from kgray.training.fused_task import FusedTask
from kgray.training.loop import fit
from kgray.training.pseudo import pseudo_labels
from kgray.training.worker import Worker

STRUCTURE = replace(ONE_VS_ALL, text=TextTowerConfig(kind="none"), structure=StructureConfig(drop=0.0, init_scale=0.5))


class Teacher:
    """Fixed scores of every triple."""

    num_entities, num_relations = ENTITIES, RELATIONS
    tasks = ("tail", "head")

    def __init__(self) -> None:
        self.scores = torch.randn((RELATIONS, ENTITIES, ENTITIES), generator=torch.Generator().manual_seed(3)) * 3

    def score_tails(self, heads: torch.Tensor, relations: torch.Tensor) -> torch.Tensor:
        return self.scores[relations, heads].clone()

    def score_heads(self, relations: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        return self.scores[relations, :, tails].clone()

    def surest(self, train: set[tuple[int, int, int]]) -> dict[tuple[int, int, int], float]:
        """The best new answer of every query with its probability, the higher one where both ends name it."""
        found: dict[tuple[int, int, int], float] = {}
        for r in range(RELATIONS):
            for e in range(ENTITIES):
                for back in (False, True):
                    row = self.scores[r, :, e] if back else self.scores[r, e]
                    triples = [(c, r, e) if back else (e, r, c) for c in range(ENTITIES)]
                    open_ = [(float(s), t) for s, t in zip(row, triples, strict=True) if t not in train]
                    score, best = max(open_)
                    p = np.exp(score) / sum(np.exp(s) for s, _ in open_)
                    found[best] = max(p, found.get(best, 0.0))
        return found


def test_they_are_the_surest_new_answers() -> None:
    teacher, facts = Teacher(), graph()
    train = {tuple(map(int, t)) for t in facts.triples["train"]}
    got = pseudo_labels(teacher, facts, PseudoConfig(share=0.2, queries=20_000))  # type: ignore[arg-type]
    expected = sorted(teacher.surest(train).items(), key=lambda item: -item[1])[: len(got)]
    assert len(got) == int(0.2 * len(train))
    assert [tuple(map(int, t)) for t in got] == [triple for triple, _ in expected]


@pytest.mark.parametrize("support", [0, 4])
def test_entities_held_out_of_training_are_no_answers(support: int) -> None:
    facts = graph().triples["train"]
    held = np.isin(facts[:, [0, 2]], [30, 31, 32]).any(axis=1)
    parts = {"train": facts[~held], "support": facts[held][:support]}
    divided = Graph.from_arrays(parts, ENTITIES, RELATIONS)
    got = pseudo_labels(Teacher(), divided, PseudoConfig(share=0.9, queries=5_000))  # type: ignore[arg-type]
    trained = divided.trained_entities()
    assert trained is not None and len(got) and np.isin(got[:, [0, 2]], trained).all()


def test_a_query_with_no_answer_left_teaches_nothing() -> None:
    facts = Graph.from_arrays({"train": np.array([[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]])}, 2, 1)
    teacher = Teacher()
    teacher.scores = teacher.scores[:1, :2, :2]
    assert not len(pseudo_labels(teacher, facts, PseudoConfig(share=0.9, queries=50)))  # type: ignore[arg-type]


def test_the_same_seed_draws_the_same_and_fewer_queries_find_fewer() -> None:
    teacher, facts = Teacher(), graph()
    few = PseudoConfig(share=0.9, queries=5, seed=1)
    assert np.array_equal(pseudo_labels(teacher, facts, few), pseudo_labels(teacher, facts, few))  # type: ignore[arg-type]
    assert 0 < len(pseudo_labels(teacher, facts, few)) <= 5  # type: ignore[arg-type]


def test_they_are_asked_for_and_carry_no_message_and_filter_no_rank() -> None:
    facts = graph()
    labels = np.array([[0, 0, 20], [5, 1, 30]])
    labelled = facts.with_pseudo(labels)
    task = FusedTask.make(labelled, vectors(), SMALL, TRAIN, Worker("cpu"))
    asked = [task.batches.triples[task.batches._positions(0, step)] for step in range(task.batches.steps)]
    everything = {tuple(map(int, t)) for part in asked for t in part}
    assert everything == {tuple(map(int, t)) for t in [*facts.triples["train"], *labels]}
    assert task.index.num_triples == len(facts.triples["train"])
    rows, _ = labelled.known(["train", "valid"]).tails(np.array([0]), np.array([0]))
    assert len(rows) == len(facts.known(["train", "valid"]).tails(np.array([0]), np.array([0]))[0])


def test_right_ones_teach_what_is_missing() -> None:
    """The held-out facts themselves, as labels: their ranks must rise."""
    facts, train = graph(), replace(TRAIN, epochs=15)
    plain = fit(facts, None, STRUCTURE, train, Worker("cpu")).best
    taught = fit(facts.with_pseudo(facts.triples["valid"]), None, STRUCTURE, train, Worker("cpu")).best
    assert taught > plain + 0.05


@pytest.mark.parametrize("key", ["share", "queries"])
def test_nothing_to_label_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        PseudoConfig(**{key: 0})
