"""The ensemble: the fused score against its definition, what the gate learns, and what it must never do.

python3 -m pytest tests/unit/test_model_ensemble.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ensemble_members import ENTITIES, RELATIONS, TableScorer, gathered, table, triples
from torch.nn.functional import softplus

from kgray.errors import NonFiniteError
from kgray.evaluation.ranking import rank_triples
from kgray.graph.filter_index import FilterIndex
from kgray.model import ensemble as ensemble_module
from kgray.model.candidates import collect, thin
from kgray.model.ensemble import EnsembleScorer, score
from kgray.model.gate import FEATURES, LEVELS, Gate, TrainingFacts, row_features
from kgray.model.gate_fit import Choice, Variant, choose_gate, fit_gate, folds_of, fused, reciprocal_ranks, scales_of

TRAIN, VALID = triples(0), triples(1, 400)
SHRINKAGE = (0.3, 1.0)


def choose(members: dict[str, TableScorer], tasks: tuple[str, ...] = ("tail", "head"), **other: int) -> Choice:
    data = gathered(members, VALID, TRAIN, tasks=tasks, **other)
    return choose_gate(data, folds=4, shrinkage=SHRINKAGE, seed=0, directions=2 * RELATIONS)


def random_gate(seed: int, part: str = "entity") -> Gate:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    features = 3 * len(FEATURES)
    return Gate(
        ("a", "b", "c"),
        torch.rand(3, 3, generator=draw) + 0.1,
        normal(3, 3),
        normal(LEVELS[part], 3),
        normal(2 * RELATIONS, 3) if part == "entity" else None,
        normal(features, 3),
        normal(features),
        torch.rand(features, generator=draw) + 0.1,
    )


@pytest.mark.parametrize("task", ["tail", "head", "relation"])
def test_the_fused_score_is_what_it_is_defined_to_be_and_the_sum_of_its_addends(task: str) -> None:
    members = {name: table(VALID, signal=(1, 2), seed=i, scale=3.0**i) for i, name in enumerate("abc")}
    gates = {part: random_gate(i, part) for i, part in enumerate(("entity", "relation"))}
    facts = TrainingFacts.of(TRAIN, ENTITIES, RELATIONS)
    ensemble = EnsembleScorer(members, gates, facts)
    head, relation, tail = torch.from_numpy(VALID[:50]).unbind(1)
    first, second = {"tail": (head, relation), "head": (relation, tail), "relation": (head, tail)}[task]
    found = score(ensemble, task, first, second)
    gate = gates["relation" if task == "relation" else "entity"]
    side = ("tail", "head", "relation").index(task)
    train = {tuple(row) for row in TRAIN.tolist()}
    rows = [score(member, task, first, second) for member in members.values()]
    for q in range(50):
        # By the definition, a query at a time.
        h, r, t = VALID[q].tolist()
        theta = gate.base[side].clone()
        if task == "tail":
            answers = sum((h, r, e) in train for e in range(ENTITIES))
        elif task == "head":
            answers = sum((e, r, t) in train for e in range(ENTITIES))
        else:
            answers = sum((h, s, t) in train for s in range(RELATIONS))
        bin_ = 0 if answers == 0 else 1 if answers == 1 else 2 if answers < 10 else 3 if answers < 100 else 4
        seen = {e for x, _, y in train for e in (x, y)}
        if task == "relation":
            theta += gate.levels[bin_] + gate.levels[5 + (h not in seen)] + gate.levels[7 + (t not in seen)]
        else:
            theta += gate.levels[int(facts.cardinality[r]) + 5 * (task == "head")] + gate.levels[10 + bin_]
            theta += gate.levels[15 + ((h if task == "tail" else t) not in seen)]
            theta += gate.directions[r if task == "tail" else r + RELATIONS]
        x = []
        for row in rows:
            one = row[q].double()
            normal = (one - one.min()) / (one.max() - one.min())
            top = normal.sort().values
            x += [1 - normal.mean(), normal.var(correction=0), top[-1] - top[-2]]
        z = ((torch.stack(x) - gate.centre) / gate.spread).clamp(-3, 3).float()
        weights = softplus(theta + z @ gate.features) * gate.scale[side]
        want = sum(w * row[q] for w, row in zip(weights, rows, strict=True))
        torch.testing.assert_close(found[q], want, rtol=1e-4, atol=1e-4)
    candidates = torch.randint(0, found.shape[1], (50, 7))
    addends = ensemble.decompose(task, first, second, candidates)
    assert list(addends) == ["a", "b", "c"]
    torch.testing.assert_close(sum(addends.values()), found.gather(1, candidates), rtol=1e-5, atol=1e-5)


def test_a_triple_is_the_mean_of_its_directions() -> None:
    members = {"a": table(VALID, signal=(1, 1), seed=0), "b": table(VALID, signal=(0, 1), seed=1)}
    choice = choose(members)
    ensemble = EnsembleScorer(members, {"entity": choice.gate}, TrainingFacts.of(TRAIN, ENTITIES, RELATIONS))
    assert ensemble.tasks == ("tail", "head")
    h, r, t = torch.from_numpy(VALID[:20]).unbind(1)
    want = 0.5 * (ensemble.score_tails(h, r)[range(20), t] + ensemble.score_heads(r, t)[range(20), h])
    torch.testing.assert_close(ensemble.score_triples(h, r, t), want)
    with pytest.raises(ValueError, match="relation"):
        ensemble.score_relations(h, t)


def test_the_gate_finds_out_who_is_good_at_which_relation() -> None:
    members = {"a": table(VALID, signal=(4, 0), seed=1, scale=5.0), "b": table(VALID, signal=(0, 4), seed=2)}
    choice = choose(members)
    assert choice.variant.relations, choice.reason
    weights = choice.weights
    z = weights / scales_of(gathered(members, VALID, TRAIN))[0]
    relation = torch.from_numpy(np.tile(VALID[:, 1], 2))
    share = z[:, 0] / z.sum(1)
    assert share[relation == 0].mean() > 0.8 and share[relation == 1].mean() < 0.2
    by_name = {one.variant: one.mrr for one in choice.tried}
    assert choice.mrr > by_name["single"] + 0.05 and choice.mrr > by_name["global"]


@pytest.mark.parametrize("kind", ["noise", "constant", "worse than chance", "huge noise"])
def test_a_useless_member_gets_no_weight_and_costs_nothing(kind: str) -> None:
    good = table(VALID, signal=(4, 4), seed=1)
    noise = table(VALID, signal=(0, 0), seed=5, scale=1e4 if kind == "huge noise" else 1.0)
    constant = TableScorer(np.full((ENTITIES, RELATIONS, ENTITIES), 7.0))
    bad = table(VALID, signal=(-4, -4), seed=6)
    useless = {"constant": constant, "worse than chance": bad}.get(kind, noise)
    members = {"useless": useless, "good": good}
    choice = choose(members)
    data = gathered(members, VALID, TRAIN)
    spread = data.scores.std(dim=(0, 1))
    say = (choice.gate.weights(data.queries) * spread).mean(0)
    assert choice.best_single == "good"
    assert say[0] < 0.05 * say[1]
    assert choice.mrr >= choice.tried[0].mrr - 1e-9
    # Also where the gate has every freedom.
    everything = Variant("all", classes=True, relations=True, features=True, deviation=1.0)
    free = fit_gate(data, everything, scales_of(data), 2 * RELATIONS)
    say = (free.weights(data.queries) * spread).mean(0)
    assert say[0] < 0.1 * say[1] and torch.isfinite(say).all() and say[1] > 0


def test_all_members_useless_is_no_collapse_either() -> None:
    members = {"a": table(VALID, signal=(0, 0), seed=5), "b": table(VALID, signal=(0, 0), seed=6)}
    choice = choose(members)
    rows = fused(gathered(members, VALID, TRAIN).scores, choice.gate.weights(gathered(members, VALID, TRAIN).queries))
    assert torch.isfinite(rows).all() and choice.mrr > 0


def test_one_member_alone_keeps_its_ranks() -> None:
    member = table(VALID, signal=(2, 1), seed=3, scale=50.0)
    gates = {part: choose({"only": member}, tasks).gate for part, tasks in PARTS.items()}
    ensemble = EnsembleScorer({"only": member}, gates, TrainingFacts.of(TRAIN, ENTITIES, RELATIONS))
    known = FilterIndex.build(np.concatenate([TRAIN, VALID]), ENTITIES, RELATIONS)
    mine, own = (rank_triples(s, VALID, known, split="valid").metrics() for s in (ensemble, member))
    for name, value in own.items():
        assert mine[name] == pytest.approx(value, abs=0.01), name


PARTS = {"entity": ("tail", "head"), "relation": ("relation",)}


def test_folds_never_share_a_question_and_are_near_equal() -> None:
    data = gathered({"a": table(VALID, signal=(1, 1), seed=0)}, VALID, TRAIN)
    fold = folds_of(data, 4, 0)
    asked: dict[tuple[int, int], set[int]] = {}
    for side, key, number in zip(data.queries.task.tolist(), data.keys.tolist(), fold.tolist(), strict=True):
        asked.setdefault((side, key), set()).add(number)
    assert all(len(folds) == 1 for folds in asked.values()) and len(asked) < len(data)
    assert set(fold.tolist()) == {0, 1, 2, 3} and np.bincount(fold).min() > len(data) / 8
    assert (folds_of(data, 4, 1) != fold).any()


def test_candidates_estimate_the_whole_row() -> None:
    """Everything at once against a few candidates and a sample: ranks and the sum over all of them."""
    members = {"a": table(VALID, signal=(2, 2), seed=0), "b": table(VALID, signal=(1, 0), seed=1)}
    whole = gathered(members, VALID, TRAIN, best=ENTITIES, sampled=1)
    few = gathered(members, VALID, TRAIN, best=8, sampled=16)
    assert few.scores.shape[1] < whole.scores.shape[1] <= ENTITIES
    assert torch.equal(few.scores[:, 0], whole.scores[:, 0])
    weights = torch.ones(len(whole), 2)
    sums = [torch.logsumexp(fused(d.scores, weights) + d.log_weight, 1).exp().mean() for d in (whole, few)]
    assert float(sums[1] / sums[0]) == pytest.approx(1, abs=0.02)
    ranks = [reciprocal_ranks(fused(d.scores, weights), d.log_weight) for d in (whole, few)]
    assert ranks[1].mean() == pytest.approx(ranks[0].mean(), abs=0.005)
    # Against the one evaluator, on the same fused scores.
    known = FilterIndex.build(np.concatenate([TRAIN, VALID]), ENTITIES, RELATIONS)
    both = TableScorer((members["a"].forward + members["b"].forward).numpy())
    full = rank_triples(both, VALID, known, split="valid", tasks=("tail", "head")).metrics()
    assert ranks[0].mean() == pytest.approx(full["valid.both.realistic.filtered.full.mrr"], abs=1e-6)


def test_a_sample_does_not_depend_on_how_queries_are_cut_into_batches() -> None:
    members = {"a": table(VALID, signal=(2, 2), seed=0)}
    whole = gathered(members, VALID, TRAIN, tasks=("tail",))
    known = FilterIndex.build(np.concatenate([TRAIN, VALID]), ENTITIES, RELATIONS)
    facts = TrainingFacts.of(TRAIN, ENTITIES, RELATIONS)
    part = torch.from_numpy(VALID[100:130])
    rows = {"a": members["a"].score_tails(part[:, 0], part[:, 1])}
    alone = collect("tail", part, rows, known, facts, best=8, sampled=16, seed=0)
    for i in range(30):
        there = [~torch.isinf(d.log_weight[n]) for d, n in ((whole, 100 + i), (alone, i))]
        assert torch.equal(whole.scores[100 + i][there[0]], alone.scores[i][there[1]])
        assert torch.equal(whole.log_weight[100 + i][there[0]], alone.log_weight[i][there[1]])
    kept = thin(VALID, 0.5, 3)
    assert 0.35 < len(kept) / len(VALID) < 0.65
    halves = np.concatenate([thin(VALID[:77], 0.5, 3), thin(VALID[77:], 0.5, 3)])
    assert np.array_equal(kept, halves) and np.array_equal(thin(VALID, 1.0, 3), VALID)


def test_features_of_a_constant_row_and_scores_that_are_no_numbers() -> None:
    assert row_features(torch.full((2, 9), 3.0)).tolist() == [[0.0] * 3] * 2
    sick = table(VALID, signal=(1, 1), seed=0)
    sick.forward[VALID[0, 0], VALID[0, 1], 5] = torch.nan
    with pytest.raises(NonFiniteError, match="member sick: tail"):
        gathered({"sick": sick}, VALID, TRAIN)


def test_gates_and_facts_come_back_from_their_arrays() -> None:
    gate = random_gate(0)
    back = Gate.from_arrays(gate.members, gate.to_arrays())
    data = gathered({n: table(VALID, signal=(1, 1), seed=i) for i, n in enumerate("abc")}, VALID, TRAIN)
    assert torch.equal(gate.weights(data.queries), back.weights(data.queries))
    facts = TrainingFacts.of(TRAIN, ENTITIES, RELATIONS)
    again = TrainingFacts.from_arrays(facts.to_arrays())
    h, r, _ = torch.from_numpy(VALID).unbind(1)
    assert torch.equal(facts.levels("tail", h, r), again.levels("tail", h, r))


def test_a_batch_worked_off_in_slices_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    members = {name: table(VALID, signal=(1, 2), seed=i) for i, name in enumerate("abc")}
    facts = TrainingFacts.of(TRAIN, ENTITIES, RELATIONS)
    ensemble = EnsembleScorer(members, {"entity": random_gate(0)}, facts)
    h, r, _ = torch.from_numpy(VALID[:40]).unbind(1)
    whole = ensemble.score_tails(h, r)
    monkeypatch.setattr(ensemble_module, "_CELLS", 7 * ENTITIES * 3)
    torch.testing.assert_close(ensemble.score_tails(h, r), whole)
