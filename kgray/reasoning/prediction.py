"""Why a model gives an answer: what its score is made of, and the reasons each kind of member can name.

The score of an ensemble is a sum with one addend a member or feature. What an addend is by itself means little, as
many are the same for every candidate; what it is less the addend of a rival says why this answer stands before it.
Rules name the facts they stand on, path models the paths, and the fused model the facts beside the query without which
its score would fall (:mod:`kgray.model.leave_one_out`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kgray.evaluation.calibration import Rows
from kgray.graph.neighbours import Int64
from kgray.model.bundle import Bundle, Scorer
from kgray.model.ensemble import EnsembleScorer, score
from kgray.model.leave_one_out import Effects, LeaveOneOut
from kgray.model.path_explain import ScoredPath
from kgray.model.path_scorer import PathScorer
from kgray.reasoning.explain import Fact, FiredRule, explain
from kgray.reasoning.scorer import RuleScorer

RULES, PATHS, FACTS = 10, 5, 16
"""At most so many of each are given as reasons."""


@dataclass(frozen=True)
class Addend:
    """value: what ``name`` adds to the score. contrast: less what it adds to the rival's; None without a rival."""

    name: str
    value: float
    contrast: float | None


@dataclass(frozen=True)
class Neighbour:
    """A training fact beside the query. change: by how much the member's score falls without it."""

    fact: Fact
    change: float


@dataclass(frozen=True)
class Neighbours:
    """member: whose ``score`` changes. examined: facts left out in turn. facts: those that change it most, by the size
    of the change. why_not: where they could not be left out, the reason; the rest is empty then."""

    member: str
    score: float | None = None
    examined: int = 0
    facts: tuple[Neighbour, ...] = ()
    why_not: str | None = None


@dataclass(frozen=True)
class Explanation:
    """Why ``candidate`` answers the query of ``task`` that the other two of head, relation, tail ask.

    rank: among all candidates but other known answers, from 1, ties shared. known: whether a split holds the triple.
    rival: the best other candidate that is not known, None where there is none. probability, in_set: None where the
    model is not calibrated. addends sum to the score, greatest contrast first. first_ranking: where the best
    candidates were looked at twice, what each member adds to the score of the first ranking (which is itself one of
    the features of the second); empty otherwise. rules_score: of the rules member, None without one.
    """

    task: str
    head: int
    relation: int
    tail: int
    score: float
    rank: float
    candidates: int
    known: bool
    rival: int | None
    rival_score: float | None
    probability: float | None
    in_set: bool | None
    coverage: float | None
    addends: tuple[Addend, ...]
    first_ranking: tuple[Addend, ...]
    rules_score: float | None
    rules: tuple[FiredRule, ...]
    paths: tuple[ScoredPath, ...]
    neighbours: Neighbours

    @property
    def candidate(self) -> int:
        """The part that answers the query."""
        return {"tail": self.tail, "head": self.head, "relation": self.relation}[self.task]


class Explainer:
    """Explains answers of one model, an ensemble or a single one.

    member: the fused model whose facts are left out, by name, with the means to do so or why there are none.
    """

    def __init__(
        self, bundle: Bundle, member: str = "fused", leave_one_out: LeaveOneOut | str = "not asked for"
    ) -> None:
        self.bundle = bundle
        self.member = member
        self.leave_one_out = leave_one_out
        family = str(bundle.info.get("family", "fused"))
        scorer = bundle.scorer
        self.members: Mapping[str, Scorer] = scorer.members if isinstance(scorer, EnsembleScorer) else {family: scorer}

    def best(self, task: str, first: int, second: int, count: int, *, filter_known: bool = False) -> list[int]:
        """At most ``count`` answers, best first, of equal ones the lower id first."""
        scores, known = self._row(task, first, second)
        order = np.argsort(-scores, kind="stable")
        if filter_known:
            order = order[~np.isin(order, known)]
        return [int(i) for i in order[:count]]

    @torch.no_grad()
    def explain(self, task: str, first: int, second: int, candidates: Sequence[int]) -> list[Explanation]:
        """One explanation a candidate. first, second: the given parts in the order head, relation, tail.

        Raises ValueError for a task that the model cannot do.
        """
        if task not in self.bundle.tasks:
            raise ValueError(f"the model answers {', '.join(self.bundle.tasks)} queries, not {task} queries")
        scores, known = self._row(task, first, second)
        others = scores.astype(np.float64)
        others[known] = -np.inf
        rivals = {candidate: _rival(others, candidate) for candidate in candidates}
        wanted = list(dict.fromkeys([*candidates, *(r for r in rivals.values() if r is not None)]))
        addends, mixture = self._addends(task, first, second, wanted)
        effects = self._effects(task, first, second, candidates)
        calibrated = self._calibrated(task, second if task == "tail" else first, scores, known)
        found = []
        for number, candidate in enumerate(candidates):
            head, relation, tail = triple_of(task, first, second, candidate)
            rival = rivals[candidate]
            places = wanted.index(candidate), None if rival is None else wanted.index(rival)
            mine = np.array([candidate]), np.isin([candidate], known)
            row = scores[mine[0]]
            rules_score, rules = self._rules(head, relation, tail)
            found.append(
                Explanation(
                    *(task, head, relation, tail),
                    score=float(scores[candidate]),
                    rank=_rank(others, float(scores[candidate]), candidate),
                    candidates=len(scores),
                    known=bool(mine[1][0]),
                    rival=rival,
                    rival_score=None if rival is None else float(scores[rival]),
                    probability=None if calibrated is None else float(calibrated.probability(0, row, mine[1])[0]),
                    in_set=None if calibrated is None else bool(calibrated.contains(0, row, mine[1])[0]),
                    coverage=None if self.bundle.calibration is None else self.bundle.calibration.coverage,
                    addends=_contrasted(addends, *places),
                    first_ranking=_contrasted(mixture, *places),
                    rules_score=rules_score,
                    rules=rules,
                    paths=self._paths(task, head, relation, tail),
                    neighbours=effects if isinstance(effects, Neighbours) else self._most(effects, number),
                )
            )
        return found

    def _row(self, task: str, first: int, second: int) -> tuple[NDArray[np.float32], Int64]:
        """Scores (C,) of all candidates, and the answers known already."""
        a, b = torch.tensor([first]), torch.tensor([second])
        known = self.bundle.known
        lookups: dict[str, Callable[..., tuple[Int64, Int64]]] = {
            "tail": known.tails,
            "head": known.heads,
            "relation": known.relations,
        }
        with torch.no_grad():
            return score(self.bundle.scorer, task, a, b)[0].float().numpy(), lookups[task](a, b)[1]

    def _addends(
        self, task: str, first: int, second: int, candidates: Sequence[int]
    ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """By name, a value a candidate: what adds up to the score, and to the first ranking's where there are two."""
        a, b, wanted = torch.tensor([first]), torch.tensor([second]), torch.tensor([list(candidates)])
        scorer = self.bundle.scorer
        if not isinstance(scorer, EnsembleScorer):
            return {next(iter(self.members)): score(scorer, task, a, b).gather(1, wanted)[0].tolist()}, {}
        parts = {name: part[0].tolist() for name, part in scorer.decompose(task, a, b, wanted).items()}
        if scorer.reranker is None or task == "relation":
            return parts, {}
        rows = scorer.rows(task, a, b)
        weights = scorer.weights(task, a, b, rows)
        return parts, {name: (rows[name].gather(1, wanted)[0] * weight).tolist() for name, weight in weights.items()}

    def _calibrated(self, task: str, relation: int, scores: NDArray[np.float32], known: Int64) -> Rows | None:
        calibration = self.bundle.calibration
        if calibration is None:
            return None
        return calibration.one(task, scores, None if task == "relation" else relation, known)

    def _rules(self, head: int, relation: int, tail: int) -> tuple[float | None, tuple[FiredRule, ...]]:
        for member in self.members.values():
            if isinstance(member, RuleScorer):
                own: Tensor = member.score_triples(*(torch.tensor([part]) for part in (head, relation, tail)))
                return float(own[0]), tuple(explain(member, head, relation, tail, limit=RULES))
        return None, ()

    def _paths(self, task: str, head: int, relation: int, tail: int) -> tuple[ScoredPath, ...]:
        """From the query's entity to the answer; the path model has no say in relations."""
        member = next((m for m in self.members.values() if isinstance(m, PathScorer)), None)
        if member is None or task == "relation":
            return ()
        if task == "tail":
            return tuple(member.paths(head, relation, tail, PATHS))
        return tuple(member.paths(tail, relation + member.num_relations, head, PATHS))

    def _effects(self, task: str, first: int, second: int, candidates: Sequence[int]) -> Effects | Neighbours:
        if isinstance(self.leave_one_out, str):
            return Neighbours(self.member, why_not=self.leave_one_out)
        if task not in self.leave_one_out.scorer.tasks:
            return Neighbours(self.member, why_not=f"the model cannot tell the {task}")
        return self.leave_one_out.effects(task, first, second, candidates)

    def _most(self, effects: Effects, number: int) -> Neighbours:
        changes = effects.changes[:, number].numpy()
        order = np.argsort(-np.abs(changes), kind="stable")[:FACTS]
        facts = tuple(Neighbour(Fact(*effects.facts[i].tolist()), float(changes[i])) for i in order)
        return Neighbours(self.member, float(effects.scores[number]), len(changes), facts)


def triple_of(task: str, first: int, second: int, candidate: int) -> tuple[int, int, int]:
    """Head, relation, tail of an answered query."""
    if task == "tail":
        return first, second, candidate
    return (candidate, first, second) if task == "head" else (first, candidate, second)


def _rival(others: NDArray[np.float64], candidate: int) -> int | None:
    """The best of ``others`` (C,), scores with -inf for known answers, that is not the candidate."""
    left = others.copy()
    left[candidate] = -np.inf
    best = int(left.argmax())
    return None if np.isneginf(left[best]) else best


def _rank(others: NDArray[np.float64], own: float, candidate: int) -> float:
    rest = np.delete(others, candidate)
    return 1.0 + float((rest > own).sum()) + float((rest == own).sum()) / 2


def _contrasted(parts: Mapping[str, Sequence[float]], own: int, rival: int | None) -> tuple[Addend, ...]:
    found = []
    for name, values in parts.items():
        found.append(Addend(name, values[own], None if rival is None else values[own] - values[rival]))
    return tuple(sorted(found, key=lambda a: -abs(a.value if a.contrast is None else a.contrast)))
