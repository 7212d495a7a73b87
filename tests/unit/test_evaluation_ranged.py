"""Candidates in ranges against the whole row: the same answers for every number of ranges, equal scores included.

python3 -m pytest tests/unit/test_evaluation_ranged.py
"""

from __future__ import annotations

from functools import reduce
from operator import add
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ensemble_members import ENTITIES, RELATIONS, TableScorer, table, triples
from test_evaluation_answers import calibration
from test_model_ensemble import random_gate
from torch import Tensor

from kgray.evaluation.answers import Answerer, Answers, Judged, top_k
from kgray.evaluation.counts import Strata
from kgray.evaluation.merging import LogSum, Moments, Rivals, Top, known_in
from kgray.evaluation.ranged import Blocks, RangedAnswerer, can_range, sizes
from kgray.evaluation.ranged_ranking import rank_ranged
from kgray.evaluation.ranking import Ranks, Scored, rank_scores, rank_triples
from kgray.evaluation.reliability import Reliability
from kgray.graph.filter_index import FilterIndex
from kgray.graph.graph import Graph
from kgray.model.ensemble import EnsembleScorer
from kgray.model.features import CandidateFeatures
from kgray.model.gate import Gate, TrainingFacts, row_features
from kgray.model.reranking import Pairwise, Reranker

FACTS = triples(5)
TRAIN = FACTS[::2]
SIZES = (7, 59, 60)
"""Candidates a range of 60."""


class RangedTable(TableScorer):
    """A member whose candidates can be scored by range."""

    def score_range(self, task: str, first: Tensor, second: Tensor, start: int, stop: int) -> Tensor:
        whole = self.score_tails(first, second) if task == "tail" else self.score_heads(first, second)
        return whole[:, start:stop].clone()


def ranged(member: TableScorer) -> RangedTable:
    return RangedTable(member.forward.numpy(), member.backward.numpy())


def levels(seed: int, count: int = 3) -> TableScorer:
    """Few different scores, so that many are equal."""
    rng = np.random.default_rng(seed)
    return TableScorer(rng.integers(0, count, (2, ENTITIES, RELATIONS, ENTITIES))[0])


def parts(size: int) -> list[tuple[int, int]]:
    return [(low, min(low + size, ENTITIES)) for low in range(0, ENTITIES, size)]


@pytest.mark.parametrize("size", [1, *SIZES])
@pytest.mark.parametrize("different", [1, 3, 1000])
def test_parts_in_any_order_add_up_to_the_whole_row(size: int, different: int) -> None:
    rng = np.random.default_rng(size)
    scores = torch.from_numpy(rng.integers(0, different, (20, ENTITIES)).astype(np.float32) / 7)
    known = np.nonzero(rng.random((20, ENTITIES)) < 0.3)
    out = known_in(known, 20, 0, ENTITIES)  # type: ignore[arg-type]
    gold = torch.from_numpy(rng.integers(0, ENTITIES, 20))
    spans = parts(size)
    rng.shuffle(spans)

    double = (scores * 2)[..., None]
    top = reduce(add, [Top.of(scores[:, a:b], a, 9, out[:, a:b], double[:, a:b]) for a, b in spans])
    for row in range(20):
        want = top_k(scores[row].numpy(), 9, known[1][known[0] == row])
        there = top.ids[row] >= 0
        assert top.ids[row][there].tolist() == want.tolist()
        assert top.values[row][there].tolist() == scores[row, want].tolist()
        assert top.carried[row][there, 0].tolist() == (scores[row, want] * 2).tolist()
        assert there.sum() == len(want) and np.isneginf(top.values[row][~there]).all()

    log_sum = reduce(add, [LogSum.of(scores[:, a:b], 1.7, out[:, a:b]) for a, b in spans])
    unknown = scores.double().masked_fill(out, -torch.inf)
    torch.testing.assert_close(torch.from_numpy(log_sum.log_sum), torch.logsumexp(unknown * 1.7, 1), rtol=0, atol=2e-6)
    assert log_sum.best.tolist() == unknown.amax(1).tolist()
    assert log_sum.leading.tolist() == (unknown == unknown.amax(1, keepdim=True)).sum(1).tolist()

    others = out.clone()
    others[torch.arange(20), gold] = False
    true = scores.gather(1, gold[:, None]).squeeze(1)
    rivals = reduce(add, [Rivals.of(scores[:, a:b], true, others[:, a:b]) for a, b in spans])
    optimistic, pessimistic, _, _ = rank_scores(scores, gold, known)  # type: ignore[arg-type]
    assert (rivals.above + 1).tolist() == optimistic.tolist()
    assert (rivals.above + rivals.level).tolist() == pessimistic.tolist()

    moments = reduce(add, [Moments.of(scores[:, a:b]) for a, b in spans])
    torch.testing.assert_close(moments.features(), row_features(scores), rtol=1e-5, atol=1e-6)


def model(scorer: Any) -> Any:
    """What an answerer needs of a bundle."""
    known = FilterIndex.build(FACTS, ENTITIES, RELATIONS)
    made = SimpleNamespace(num_entities=ENTITIES, num_relations=RELATIONS, known=known, scorer=scorer)
    made.calibration = calibration(RELATIONS)
    for name in ("score_tails", "score_heads", "score_relations"):
        setattr(made, name, getattr(scorer, name))
    return made


def ask(answerer: Answerer) -> tuple[dict[str, Answers], Judged]:
    h, r, t = torch.from_numpy(triples(9, 60)[:16]).unbind(1)
    most, filtered = np.arange(16) % 9 + 1, np.arange(16) % 2 == 0
    asked = {"tail": (h, r), "head": (r, t), "relation": (h, t)}
    found = {task: answerer.complete(task, *given, most, filtered) for task, given in asked.items()}  # type: ignore[arg-type]
    return found, answerer.judge(h, r, t)


def compare(one: Answerer, other: Answerer, *, exact: bool) -> None:
    """exact: also the scores, bit by bit."""
    (answers, judged), (want, want_judged) = ask(one), ask(other)
    close = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-5, "atol": 1e-5}
    for task, oracle in want.items():
        found = answers[task]
        assert found.count.tolist() == oracle.count.tolist()
        assert found.set_size.tolist() == oracle.set_size.tolist()
        assert found.calibrated.tolist() == oracle.calibrated.tolist()
        for row, count in enumerate(oracle.count.tolist()):
            for name in ("ids", "known", "in_set"):
                assert getattr(found, name)[row, :count].tolist() == getattr(oracle, name)[row, :count].tolist(), name
            np.testing.assert_allclose(found.scores[row, :count], oracle.scores[row, :count], **close)  # type: ignore[arg-type]
            np.testing.assert_allclose(found.probability[row, :count], oracle.probability[row, :count], rtol=1e-5)
    for name in ("tail_rank", "head_rank", "known", "in_set", "calibrated"):
        assert getattr(judged, name).tolist() == getattr(want_judged, name).tolist(), name
    np.testing.assert_allclose(judged.score, want_judged.score, **close)  # type: ignore[arg-type]
    for name in ("tail_probability", "head_probability"):
        np.testing.assert_allclose(getattr(judged, name), getattr(want_judged, name), rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [5, 100])
def test_a_model_of_equal_scores_answers_as_unsharded(size: int, batch: int) -> None:
    made = model(ranged(levels(2)))
    compare(RangedAnswerer(made, made.scorer, batch, size), Answerer(made), exact=True)


def gate(names: tuple[str, ...], *, features: bool) -> Gate:
    whole = random_gate(4)
    assert whole.members == names
    return whole if features else Gate(names, whole.scale, whole.base, whole.levels, whole.directions)


def ensemble(*, features: bool, second_look: bool) -> EnsembleScorer:
    """Two members that can be ranged, and one that cannot. Scores of members are far apart, so none is a tie that a
    sum in another order would break."""
    members: dict[str, TableScorer] = {
        "a": ranged(table(FACTS, signal=(1, 2), seed=0)),
        "b": table(FACTS, signal=(2, 1), seed=1, scale=3.0),
        "c": ranged(table(FACTS, signal=(0, 1), seed=2)),
    }
    facts = TrainingFacts.of(TRAIN, ENTITIES, RELATIONS)
    reranker = None
    if second_look:
        graph = Graph.from_arrays({"train": TRAIN}, ENTITIES, RELATIONS)
        pairs = CandidateFeatures.of(graph, [f"name {i % 7}" for i in range(ENTITIES)], [""] * ENTITIES)
        count = 1 + 2 + len(pairs.names)
        torch.manual_seed(0)
        looked = Pairwise(count, 2 * RELATIONS, 8).eval()
        torch.nn.init.normal_(looked.common)
        torch.nn.init.normal_(looked.by_direction.weight)
        scale = torch.tensor([[0.5, 2.0], [1.5, 1.0]])
        reranker = Reranker(6, ("a", "b"), pairs, looked, scale, torch.zeros(count), torch.ones(count))
    gates = {part: gate(("a", "b", "c"), features=features) for part in ("entity",)}
    return EnsembleScorer(members, gates | {"relation": random_gate(1, "relation")}, facts, reranker)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("second_look", [False, True])
@pytest.mark.parametrize("features", [False, True])
def test_an_ensemble_answers_as_unsharded(size: int, second_look: bool, features: bool) -> None:
    """Bit by bit unless the gate reads moments, which are then those of float64."""
    made = model(ensemble(features=features, second_look=second_look))
    compare(RangedAnswerer(made, made.scorer, 7, size), Answerer(made), exact=not (features or second_look))


def test_several_processes_that_hold_a_range_each_answer_as_one() -> None:
    made = model(ensemble(features=True, second_look=True))

    class Several:
        """Two holders, whose answers come in the wrong order."""

        def __init__(self) -> None:
            self.holders = [Blocks(made.scorer, 8, 32, ENTITIES), Blocks(made.scorer, 8, 0, 32)]

        def each(self, method: str, *arguments: Any) -> Any:
            from kgray.evaluation.merging import total

            return total(holder.each(method, *arguments) for holder in self.holders)

    compare(RangedAnswerer(made, made.scorer, 9, 8, Several()), Answerer(made), exact=False)


def test_whole_rows_are_taken_where_they_fit_and_memory_is_kept_where_not() -> None:
    plain = ensemble(features=False, second_look=False)
    alone = Gate.single(("b",), "b", torch.ones(3, 1))
    only_whole = EnsembleScorer({"b": plain.members["b"]}, {"entity": alone}, plain.facts)
    assert not can_range(plain.members["b"]) and can_range(plain.members["a"])
    assert sizes(plain, 1000, 1 << 25) is None
    assert sizes(only_whole, 10**8, 1 << 25) is None, "nothing is gained by ranges"
    for entities in (10**6, 10**7, 10**8):
        batch, size = sizes(plain, entities, 1 << 26) or (0, 0)
        used = batch * size * (3 + 6) + batch * entities  # the ranges, and the rows of the member that needs them whole
        assert batch >= 1 and size >= 1
        assert used <= 1 << 26 or batch == 1
    member = ranged(levels(0))
    batch, size = sizes(member, 10**8, 1 << 26) or (0, 0)
    assert batch == 256 and batch * size * 7 <= 1 << 26


def test_a_score_that_is_no_number_is_found_in_whatever_range() -> None:
    scorer = ranged(levels(2))
    scorer.forward[3, 0, 41] = float("nan")
    made = model(scorer)
    given = torch.tensor([2, 3, 4]), torch.tensor([0, 0, 0])
    found = RangedAnswerer(made, scorer, 10, 16).complete("tail", *given, np.full(3, 4), np.zeros(3, dtype=bool))
    assert found.finite.tolist() == [True, False, True]


def _three(ranks: Ranks) -> tuple[list[int], list[int], list[int]]:
    return ranks.optimistic.tolist(), ranks.pessimistic.tolist(), ranks.candidates.tolist()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["levels", "ensemble"])
def test_the_evaluator_counts_the_same_ranks_by_range(size: int, kind: str) -> None:
    """Ranks, the ranks' sums, and how probabilities and answer sets did."""
    scorer = ranged(levels(2)) if kind == "levels" else ensemble(features=False, second_look=True)
    made = model(scorer)
    asked, strata = triples(9, 60)[:40], Strata.of(TRAIN, ENTITIES, RELATIONS)
    known = FilterIndex.build(np.concatenate([FACTS, asked]), ENTITIES, RELATIONS)
    whole: dict[str, list[int]] = {"tail": [], "head": []}
    want = {task: Reliability() for task in whole}

    def see(scored: Scored) -> None:
        relations = scored.triples[:, 1]
        want[scored.side].observe(
            *(made.calibration, scored.side, scored.scores, scored.gold, relations), scored.others_known()
        )

    oracle = rank_triples(
        *(scorer, asked, known),
        split="test",
        train=strata,
        tasks=("tail", "head"),
        on_scores=see,
        on_ranks=lambda ranks: whole[ranks.side].extend(zip(*_three(ranks), strict=True)),
    )
    found: dict[str, list[int]] = {"tail": [], "head": []}
    told = {task: Reliability() for task in found}
    counts = rank_ranged(
        *(RangedAnswerer(made, scorer, 17, size), [asked[:25], asked[25:]], known),
        split="test",
        train=strata,
        tasks=("tail", "head"),
        on_ranks=lambda ranks: found[ranks.side].extend(zip(*_three(ranks), strict=True)),
        reliability=told,
    )
    assert found == whole
    assert counts.metrics() == oracle.metrics()
    for task, one in told.items():
        assert (one.covered, one.total_size, one.empty) == (want[task].covered, want[task].total_size, want[task].empty)
        assert one.metrics()["brier"] == pytest.approx(want[task].metrics()["brier"], rel=1e-4)
