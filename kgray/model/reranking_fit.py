"""Fitting the second look on validation queries, and deciding by cross-validation whether and how it is taken.

Listwise: the softmax cross-entropy of the true answer among the candidates looked at (Cao et al. 2007), over the
queries whose true answer is among them. Tried are none, a sum of weighted features, and that with a perceptron; the
simplest within one standard error of the best wins, as with the gate. Folds are the gate's, and the first ranking's
scores come from gates that never saw the query.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kgray.model.candidates import Candidates
from kgray.model.features import CandidateFeatures
from kgray.model.gate_fit import Tried, reciprocal_ranks, simplest
from kgray.model.reranking import Pairwise, Picked, Reranker, gaps, place, standardise

log = logging.getLogger(__name__)

_BATCH = 128
_RATE = 5e-3
_EPOCHS = {0: 30, 1: 15}  # of the sum alone, with the perceptron
_PRIOR = 0.15
_ROWS = 256


@dataclass(frozen=True)
class Kind:
    """A second look that is tried. hidden None: none at all."""

    hidden: int | None

    def __str__(self) -> str:
        return {None: "no second look", 0: "sum of features"}.get(self.hidden, "sum of features and perceptron")


@dataclass(frozen=True)
class SecondLook:
    """What was chosen. scores (Q, C): every query's candidates as a second look that never saw its fold scores them.

    reranker: None where none is taken. chosen: its name among ``tried``. mrr: cross-validated; reason: in words.
    """

    reranker: Reranker | None
    chosen: str
    scores: Tensor
    mrr: float
    tried: tuple[Tried, ...]
    reason: str

    def to_json(self) -> dict[str, Any]:
        """What is told of it in the artifact and in the report."""
        tried = [one.to_json() for one in self.tried]
        return {"chosen": self.chosen, "reason": self.reason, "mrr": self.mrr, "tried": tried}


@dataclass(frozen=True)
class _Looked:
    """Features of all queries: picked columns of the candidates, x (Q, K, F) raw, gold (Q,) its place or -1."""

    columns: Tensor
    valid: Tensor
    x: Tensor
    gold: Tensor
    directions: Tensor


def fit_second_look(
    data: Candidates,
    scores: Tensor,
    scale: Tensor,
    fold: npt.NDArray[np.int64],
    features: CandidateFeatures,
    *,
    count: int,
    hidden: int,
    directions: int,
    seed: int,
) -> SecondLook:
    """Choose and fit. scores (Q, C): of the first ranking, by gates that never saw the query; scale (3, M): the
    members' inverse temperatures; fold (Q,): the gate's folds; hidden: width of the perceptron tried, 0 for none."""
    looked = _look(data, scores, scale, features, count)
    kinds = [Kind(None), Kind(0), *([Kind(hidden)] if hidden else [])]
    out = [scores.clone() for _ in kinds]
    if int(fold.max()) == 0 or int((looked.gold >= 0).sum()) < _BATCH:
        kinds, out = kinds[:1], out[:1]
    for number in range(int(fold.max()) + 1 if len(kinds) > 1 else 0):
        held = torch.from_numpy(np.flatnonzero(fold == number))
        fitting = torch.from_numpy(np.flatnonzero(fold != number))
        for place_, kind in enumerate(kinds):
            if kind.hidden is not None:
                model, centre, spread = _fit(looked, fitting, kind.hidden, directions, seed)
                out[place_][held] = _again(looked, held, scores[held], model, centre, spread)
        log.info("ensemble: second look, fold %d of %d done", number + 1, int(fold.max()) + 1)
    ranks = np.stack([reciprocal_ranks(own, data.log_weight) for own in out])
    chosen, tried = simplest(kinds, ranks)
    reason = _reason(kinds[chosen], tried)
    log.info("ensemble: %s", reason)
    reranker = None
    own_hidden = kinds[chosen].hidden
    if own_hidden is not None:
        everything = torch.arange(len(data))
        model, centre, spread = _fit(looked, everything, own_hidden, directions, seed)
        reranker = Reranker(count, data.members, features, model, scale[:2], centre, spread)
    return SecondLook(reranker, str(kinds[chosen]), out[chosen], float(ranks[chosen].mean()), tuple(tried), reason)


def _look(data: Candidates, scores: Tensor, scale: Tensor, features: CandidateFeatures, count: int) -> _Looked:
    standing = data.log_weight == 0
    ranked = scores.masked_fill(~standing, -torch.inf)
    found = ranked.topk(min(count, scores.shape[1]), dim=1)
    columns, valid = found.indices, torch.isfinite(found.values)
    ids = data.ids.gather(1, columns)
    members = range(len(data.members))
    own = torch.stack([scores, *(data.scores[..., m] * scale[data.queries.task, m][:, None] for m in members)], -1)
    gathered = own.gather(1, columns[..., None].expand(-1, -1, own.shape[-1]))
    pairs = torch.empty(*ids.shape, len(features.names))
    head, relation, tail = data.triples.unbind(1)
    for side, (anchor, tails) in enumerate(((head, True), (tail, False))):
        mine = (data.queries.task == side).nonzero().squeeze(1)
        for rows in torch.split(mine, _ROWS):  # type: ignore[no-untyped-call]
            given = (anchor[rows].numpy(), relation[rows].numpy(), ids[rows].numpy())
            pairs[rows] = torch.from_numpy(features(*given, tails=tails))
    x = torch.cat([gaps(gathered.float(), valid, valid), pairs], dim=-1)
    is_gold = (columns == 0) & valid
    gold = torch.where(is_gold.any(1), is_gold.byte().argmax(1), torch.full((len(data),), -1))
    return _Looked(columns, valid, x, gold, data.queries.directions)


def _fit(
    looked: _Looked, rows: Tensor, hidden: int, directions: int, seed: int
) -> tuple[Pairwise, Tensor, Tensor]:
    """One model on the queries ``rows`` whose true answer was looked at; with what standardises its features."""
    rows = rows[looked.gold[rows] >= 0]
    flat = looked.x[rows][looked.valid[rows]]
    centre, spread = flat.mean(0), flat.std(0, correction=0).clamp(min=1e-4)
    # Gaps stay gaps: zero is the best.
    x, valid, gold, where = looked.x[rows], looked.valid[rows], looked.gold[rows], looked.directions[rows]
    x = standardise(x, centre, spread)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Pairwise(x.shape[-1], directions, hidden)
        with torch.no_grad():
            model.common[0] = spread[0]  # begins as the first ranking
        epochs = _EPOCHS[int(hidden > 0)]
        steps = epochs * -(-len(rows) // _BATCH)
        optimiser = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE * 2, total_steps=steps + 1)
        for _ in range(epochs):
            for batch in torch.split(torch.randperm(len(rows)), _BATCH):  # type: ignore[no-untyped-call]
                scores = model(x[batch], where[batch]).masked_fill(~valid[batch], -torch.inf)
                loss = torch.nn.functional.cross_entropy(scores, gold[batch])
                # A prior that draws every direction's weights to the common ones.
                prior = _PRIOR * model.by_direction.weight.pow(2).sum() / len(rows)
                optimiser.zero_grad()
                (loss + prior).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
    return model.eval(), centre, spread


def _again(looked: _Looked, rows: Tensor, scores: Tensor, model: Pairwise, centre: Tensor, spread: Tensor) -> Tensor:
    """(len(rows), C) scores after the second look."""
    with torch.no_grad():
        again = model(standardise(looked.x[rows], centre, spread), looked.directions[rows])
    return place(scores, Picked(looked.columns[rows], looked.valid[rows], looked.valid[rows]), again)


def _reason(chosen: Kind, tried: Sequence[Tried]) -> str:
    if len(tried) == 1:
        return "second look: none, as there are too few validation queries to fit one"
    curve = ", ".join(f"{one.variant} {one.mrr:.4f}" for one in tried)
    return f"second look: {chosen} (cross-validated MRR: {curve})"

