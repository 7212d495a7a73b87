"""The second look: what it keeps of the first ranking, what it adds, and when it is not taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ensemble_members import ENTITIES, RELATIONS, TableScorer, gathered, table, triples

from kgray.graph.graph import Graph
from kgray.model.ensemble import BELOW, EnsembleScorer
from kgray.model.features import CandidateFeatures
from kgray.model.gate import TrainingFacts
from kgray.model.gate_fit import choose_gate, fused, reciprocal_ranks, scales_of
from kgray.model.reranking import Picked, Reranker, gaps, place
from kgray.model.reranking_fit import SecondLook, fit_second_look

FACTS = triples(3)
TRAIN, VALID = FACTS[::2], FACTS[1::2]


def features(named: bool) -> CandidateFeatures:
    """Texts that name an entity's tails of relation 0 when ``named``, else words that say nothing."""
    graph = Graph.from_arrays({"train": TRAIN}, ENTITIES, RELATIONS)
    names = [f"name{i}" for i in range(ENTITIES)]
    texts = ["" for _ in names]
    for head, relation, tail in FACTS.tolist() if named else []:
        if relation == 0:
            texts[head] += f" {names[tail]}"
    return CandidateFeatures.of(graph, names, texts)


def look(named: bool, hidden: int = 0, count: int = 20) -> tuple[SecondLook, EnsembleScorer]:
    member = table(FACTS, signal=(1.0, 2.0), seed=1)
    data = gathered({"a": member}, VALID, TRAIN, best=30, sampled=8)
    choice = choose_gate(data, folds=4, shrinkage=(0.3,), seed=0, directions=2 * RELATIONS)
    scores = fused(data.scores, choice.weights)
    found = fit_second_look(
        *(data, scores, scales_of(data), choice.fold, features(named)),
        count=count,
        hidden=hidden,
        directions=2 * RELATIONS,
        seed=0,
    )
    facts = TrainingFacts.of(TRAIN, ENTITIES, RELATIONS)
    return found, EnsembleScorer({"a": member}, {"entity": choice.gate}, facts, found.reranker)


@pytest.fixture(scope="module")
def named() -> tuple[SecondLook, EnsembleScorer]:
    return look(named=True)


def test_a_second_look_finds_what_the_texts_say_and_the_member_does_not(
    named: tuple[SecondLook, EnsembleScorer],
) -> None:
    found, _ = named
    none, summed = (one.mrr for one in found.tried)
    assert found.reranker is not None and found.mrr == summed > none + 0.1


def test_where_features_say_nothing_no_second_look_is_taken() -> None:
    found, scorer = look(named=False)
    none, summed = (one.mrr for one in found.tried)
    assert found.mrr >= max(none, summed) - 0.02
    if found.reranker is None:
        assert "no second look" in found.reason and scorer.reranker is None


def test_scores_are_those_of_candidates_and_the_sum_of_their_addends(
    named: tuple[SecondLook, EnsembleScorer],
) -> None:
    _, scorer = named
    first, second = torch.tensor([0, 7, 31]), torch.tensor([0, 1, 0])
    everyone = torch.arange(ENTITIES).expand(3, -1)
    for task, given in (("tail", (first, second)), ("head", (second, first))):
        row = scorer.score_tails(*given) if task == "tail" else scorer.score_heads(*given)
        parts = scorer.decompose(task, *given, everyone)
        torch.testing.assert_close(torch.stack(list(parts.values())).sum(0), row, atol=1e-4, rtol=1e-5)
        assert parts[BELOW].abs().sum() > 0


def test_candidates_not_looked_at_stay_in_order_below_the_others() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 30, generator=draw)
    ids = scores.topk(6, dim=1).indices
    valid = torch.ones(4, 6, dtype=torch.bool)
    valid[0, 5] = False
    valid[3] = False
    again = torch.randn(4, 6, generator=draw) * 5
    out = place(scores, Picked(ids, valid, valid), again)
    assert torch.isfinite(out).all()
    for row in range(4):
        looked = ids[row][valid[row]]
        rest = torch.ones(30, dtype=torch.bool)
        rest[looked] = False
        torch.testing.assert_close(out[row, looked], again[row][valid[row]])
        assert torch.equal(out[row, rest].argsort(stable=True), scores[row, rest].argsort(stable=True))
        if valid[row].any():
            assert out[row, rest].max() < out[row, looked].min()


def test_known_facts_among_the_candidates_move_no_other_score() -> None:
    """The fit never sees any: what is fitted, calibration too, would not hold beside them."""
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(3, 30, generator=draw)
    ids = scores.topk(6, dim=1).indices
    again, members = torch.randn(3, 6, generator=draw), torch.randn(3, 6, 2, generator=draw)
    every, new = torch.ones(3, 6, dtype=torch.bool), torch.tensor([True] * 4 + [False] * 2).expand(3, 6)
    alone = place(scores.scatter(1, ids[:, 4:], -50.0), Picked(ids[:, :4], every[:, :4], every[:, :4]), again[:, :4])
    again[:, 4:] = torch.tensor([-90.0, 90.0])
    beside = place(scores, Picked(ids, every, new), again)
    others = torch.ones(3, 30, dtype=torch.bool).scatter(1, ids[:, 4:], False)
    torch.testing.assert_close(beside[others], alone[others])
    torch.testing.assert_close(beside.gather(1, ids), again)
    members[:, 4:] = 90.0
    torch.testing.assert_close(gaps(members, every, new)[:, :4], gaps(members[:, :4], every[:, :4], every[:, :4]))


def test_known_facts_do_not_crowd_out_what_is_asked_for(named: tuple[SecondLook, EnsembleScorer]) -> None:
    found, scorer = named
    assert found.reranker is not None
    reranker = found.reranker
    head, relation = 0, 0
    known = TRAIN[(TRAIN[:, 0] == head) & (TRAIN[:, 1] == relation), 2]
    row = torch.zeros(1, ENTITIES)
    row[0, torch.from_numpy(known)] = 100.0
    picked = reranker.pick("tail", torch.tensor([head]), torch.tensor([relation]), row)
    chosen = picked.ids[picked.valid].tolist()
    assert len(known) > 0 and set(known) <= set(chosen) and len(chosen) == reranker.count + len(known)
    assert len(set(chosen)) == len(chosen)
    assert scorer.score_tails(torch.tensor([head]), torch.tensor([relation])).shape == (1, ENTITIES)


def test_the_fit_sees_the_very_scores_that_are_ranked_later(named: tuple[SecondLook, EnsembleScorer]) -> None:
    """Fitted on all queries, the second look ranks them at least as well as it did queries it never saw."""
    found, scorer = named
    data = gathered({"a": scorer.members["a"]}, VALID, TRAIN, best=30, sampled=8)  # type: ignore[dict-item]
    head, relation, tail = torch.from_numpy(VALID).unbind(1)
    rows = torch.cat([scorer.score_tails(head, relation), scorer.score_heads(relation, tail)])
    final = rows.gather(1, data.ids)
    assert reciprocal_ranks(final, data.log_weight).mean() > found.mrr - 0.02


@pytest.mark.parametrize("hidden", [0, 8])
def test_it_comes_back_from_its_files(tmp_path: Path, hidden: int) -> None:
    found, scorer = look(named=True, hidden=hidden)
    assert found.reranker is not None
    again = Reranker.load(tmp_path, found.reranker.write(tmp_path))
    first, second = torch.tensor([0, 7, 31]), torch.tensor([0, 1, 0])
    expected = scorer.score_tails(first, second)
    scorer.reranker = again
    assert torch.equal(scorer.score_tails(first, second), expected)


def test_with_too_few_queries_it_is_not_tried() -> None:
    member = TableScorer(np.random.default_rng(0).normal(size=(ENTITIES, RELATIONS, ENTITIES)))
    data = gathered({"a": member}, VALID[:20], TRAIN)
    fold = np.arange(len(data)) % 2
    found = fit_second_look(
        *(data, data.scores[..., 0], scales_of(data), fold, features(True)),
        count=8,
        hidden=0,
        directions=2 * RELATIONS,
        seed=0,
    )
    assert found.reranker is None and "too few" in found.reason and torch.equal(found.scores, data.scores[..., 0])
