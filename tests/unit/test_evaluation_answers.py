"""The core of answers against one obvious query at a time: order, ties, known facts, probabilities, ranks.

python3 -m pytest tests/unit/test_evaluation_answers.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from serving_bundle import TableBundle

from kgray.evaluation.answers import Answerer, best_candidates, top_k
from kgray.evaluation.calibration import Calibration, Monotone, TaskCalibration
from kgray.evaluation.ranking import rank_scores
from kgray.serving.predictor import Predictor, Query, Ranking, ScoredTriple, Triple


def calibration(relations: int) -> Calibration:
    """Maps and thresholds that tell tasks and relations apart."""
    maps = Monotone(np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.6, 0.9])), Monotone(np.array([0.0, 1.0]), np.ones(2))
    tasks = {}
    for n, task in enumerate(("tail", "head", "relation")):
        tasks[task] = TaskCalibration(0.7 + n, *maps, np.log(np.linspace(0.02, 0.2, relations)))
    return Calibration(0.1, tasks)


@pytest.mark.parametrize("levels", [0, 1, 2, 5])
@pytest.mark.parametrize("count", [1, 4, 39, 40])
def test_best_candidates_are_those_of_a_full_sort(levels: int, count: int) -> None:
    rng = np.random.default_rng(levels)
    scores = (rng.integers(0, levels, (30, 40)) if levels else rng.normal(size=(30, 40))).astype(np.float32)
    out = rng.random((30, 40)) < 0.3
    for blocked in (None, out):
        mask = None if blocked is None else torch.from_numpy(out)
        values, ids = best_candidates(torch.from_numpy(scores), count, mask)
        for row in range(30):
            without = np.flatnonzero(out[row]) if blocked is not None else None
            want = top_k(scores[row], count, without)
            assert ids[row, : len(want)].tolist() == want.tolist()
            assert values[row, : len(want)].tolist() == scores[row, want].tolist()


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("cells", [1, 700, 1 << 25])
def test_a_batch_says_what_the_oracle_says_of_each_query(levels: int, cells: int) -> None:
    """Probabilities and sets by the calibration of one query, whose oracle is in test_evaluation_calibration.py."""
    bundle = TableBundle(levels=levels)
    bundle.calibration = calibration(bundle.num_relations)
    h, r, t = torch.from_numpy(bundle.triples[:25].copy()).unbind(1)
    most = np.arange(25) % 7 + 1
    filtered = np.arange(25) % 2 == 0
    asked = {"tail": (h, r, "tails"), "head": (r, t, "heads"), "relation": (h, t, "relations")}
    for task, (first, second, lookup) in asked.items():
        found = Answerer(bundle, cells).complete(task, first, second, most, filtered)  # type: ignore[arg-type]
        scores = getattr(bundle, f"score_{lookup}")(first, second).numpy()
        for row in range(25):
            known = getattr(bundle.known, lookup)(first[row : row + 1], second[row : row + 1])[1]
            want = top_k(scores[row], int(most[row]), known if filtered[row] else None)
            count = int(found.count[row])
            assert found.ids[row, :count].tolist() == want.tolist()
            assert found.known[row, :count].tolist() == np.isin(want, known).tolist()
            of_relation = None if task == "relation" else int(r[row])
            one = bundle.calibration.one(task, scores[row], of_relation, known)
            assert (one is not None) == bool(found.calibrated[row])
            if one is not None:
                marks = np.isin(want, known)
                np.testing.assert_allclose(
                    found.probability[row, :count], one.probability(0, scores[row, want], marks), rtol=1e-6
                )
                assert found.in_set[row, :count].tolist() == one.contains(0, scores[row, want], marks).tolist()
                inside = set(np.flatnonzero(scores[row] >= one.threshold[0])) - set(known.tolist())
                assert found.set_size[row] == len(inside)


def test_whole_triples_are_ranked_as_the_evaluator_ranks_them() -> None:
    bundle = TableBundle(levels=4)
    bundle.calibration = calibration(bundle.num_relations)
    rng = np.random.default_rng(3)
    new = np.stack([rng.integers(0, n, 20) for n in (40, 5, 40)], axis=1)
    triples = np.concatenate([bundle.triples[:20], new])
    h, r, t = torch.from_numpy(triples).unbind(1)
    found = Answerer(bundle, 4000).judge(h, r, t)
    assert found.known.tolist() == bundle.known.contains(h, r, t).tolist() and 20 <= found.known.sum() < 40
    for end, scores, gold, out in (
        ("tail", bundle.score_tails(h, r), t, bundle.known.tails(h, r)),
        ("head", bundle.score_heads(r, t), h, bundle.known.heads(r, t)),
    ):
        optimistic, pessimistic, true, _ = rank_scores(scores, gold, out)
        assert getattr(found, f"{end}_rank").tolist() == ((optimistic + pessimistic) / 2).tolist()
        for row in range(len(triples)):
            known = out[1][out[0] == row]
            one = bundle.calibration.one(end, scores[row].numpy(), int(r[row]), known)
            assert one is not None
            want = one.probability(0, true[row : row + 1], found.known[row : row + 1])[0]
            assert getattr(found, f"{end}_probability")[row] == pytest.approx(want, rel=1e-6)
    assert found.score.tolist() == bundle.score_triples(h, r, t).tolist()


def test_a_score_that_is_no_number_spoils_its_own_row_alone() -> None:
    bundle = TableBundle()
    bundle.forward[2, 0, 7] = float("nan")
    h = torch.tensor([1, 2, 3])
    zeros = torch.zeros(3, dtype=torch.int64)
    found = Answerer(bundle).complete("tail", h, zeros, np.full(3, 5), np.zeros(3, dtype=bool))
    assert found.finite.tolist() == [True, False, True] and found.count.tolist() == [5, 0, 5]
    judged = Answerer(bundle).judge(h, zeros, torch.tensor([4, 4, 4]))
    assert judged.finite.tolist() == [True, False, True]


def test_the_service_and_the_core_agree() -> None:
    bundle = TableBundle(levels=3)
    bundle.calibration = calibration(bundle.num_relations)
    h, r, t = bundle.triples[5].tolist()
    (answer,) = Predictor(bundle).predict([Query(f"e{h:02d}", f"r{r}", None, top_k=8)])
    assert isinstance(answer, Ranking) and answer.answer_set is not None
    one = [torch.tensor([i]) for i in (h, r, t)]
    found = Answerer(bundle).complete("tail", one[0], one[1], np.array([8]), np.array([False]))
    assert [bundle.entity_ids.index(p.id) for p in answer.predictions] == found.ids[0].tolist()
    assert [p.probability for p in answer.predictions] == found.probability[0].tolist()
    assert answer.answer_set.size == found.set_size[0]
    (scored,) = Predictor(bundle).score([Triple(f"e{h:02d}", f"r{r}", f"e{t:02d}")])
    assert isinstance(scored, ScoredTriple) and scored.score == Answerer(bundle).judge(*one).score[0]
