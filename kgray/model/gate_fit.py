"""Fitting the gate, on validation queries only, and choosing between gates by cross-validation.

Maximum likelihood: the softmax cross entropy of the gold answer against the candidates of :mod:`candidates`, plus a
Gaussian prior on every offset, which shrinks it to the global weight. Folds go by query: triples that ask the same
question lie in one fold. Of the variants, from one member alone to a gate with all offsets, the simplest wins whose
cross-validated MRR is within one standard error (of the paired difference) of the best one's; as the best single
member is one of them, the ensemble cannot be worse than it by more than noise.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import softplus

from kgray.evaluation.counts import SIDES
from kgray.model.candidates import Candidates
from kgray.model.gate import LEVELS, ONE, Gate, part_of, standardise

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
_STEPS = 30  # of L-BFGS; twice as many change a likelihood in the fourth digit
_BASE_DEVIATION = 3.0  # of the prior on a base weight: wide, only to keep a member without any say from drifting
_ROWS = 4096
_MOST_SHARP = 100.0  # inverse temperature in units of 1 / standard deviation of a member's scores


@dataclass(frozen=True)
class Variant:
    """A kind of gate: what its weights may depend on, and the prior standard deviation of the offsets."""

    name: str
    classes: bool = False
    relations: bool = False
    features: bool = False
    deviation: float = 0.0

    def __str__(self) -> str:
        return self.name if not self.deviation else f"{self.name}, deviation {self.deviation:g}"


def variants_of(part: str, shrinkage: Sequence[float]) -> list[Variant]:
    """The variants tried for a part ("entity" or "relation"), the simplest first."""
    found = [Variant("single"), Variant("global")]
    tight_first = sorted(shrinkage)
    found += [Variant("classes", classes=True, deviation=d) for d in tight_first]
    if part == "entity":
        found += [Variant("classes+relations", classes=True, relations=True, deviation=d) for d in tight_first]
    relations = part == "entity"
    name = "classes+relations+features" if relations else "classes+features"
    found += [Variant(name, classes=True, relations=relations, features=True, deviation=d) for d in tight_first]
    return found


@dataclass(frozen=True)
class Tried:
    """A variant's cross-validated MRR, and by how much it is behind the best one, with that gap's standard error."""

    variant: str
    mrr: float
    behind: float
    error: float

    def to_json(self) -> dict[str, Any]:
        return {"variant": self.variant, "mrr": self.mrr, "behind_best": self.behind, "standard_error": self.error}


@dataclass(frozen=True)
class Choice:
    """The gate chosen for a part.

    mrr: of the choice, nested: the variant for a fold is chosen by the other folds' queries. weights (Q, M): of the
    raw scores, each query weighed by a gate that never saw its fold. fold (Q,): which that was. reason: in words.
    """

    gate: Gate
    variant: Variant
    mrr: float
    best_single: str
    tried: tuple[Tried, ...]
    weights: Tensor
    fold: npt.NDArray[np.int64]
    reason: str

    def to_json(self) -> dict[str, Any]:
        """What is told of it in the artifact and in the report."""
        return {
            "chosen": str(self.variant),
            "reason": self.reason,
            "best_single": self.best_single,
            "mrr": self.mrr,
            "queries": len(self.fold),
            "tried": [one.to_json() for one in self.tried],
        }


def fused(scores: Tensor, weights: Tensor) -> Tensor:
    """sum_m w_m s_m: scores (Q, C, M), weights (Q, M) -> (Q, C)."""
    return torch.bmm(scores, weights[:, :, None]).squeeze(2)


def folds_of(data: Candidates, folds: int, seed: int) -> npt.NDArray[np.int64]:
    """(Q,) int64: the fold of each query, the same for all that ask the same."""
    question = np.stack([data.queries.task.numpy(), data.keys.numpy()], axis=1)
    distinct, which = np.unique(question, axis=0, return_inverse=True)
    fold = np.arange(len(distinct)) % min(folds, len(distinct))
    found: npt.NDArray[np.int64] = np.random.default_rng(seed).permutation(fold)[which.reshape(-1)]
    return found


def reciprocal_ranks(scores: Tensor, log_weight: Tensor) -> Floats:
    """(Q,) of the gold candidate, the first column, a sampled rival counting as many as it stands for; realistic."""
    weight = log_weight.exp()
    gold = scores[:, :1]
    above = (weight * (scores > gold)).sum(1)
    level = (weight * (scores == gold)).sum(1) - 1.0
    found: Floats = (1.0 / (1.0 + above + 0.5 * level)).double().numpy()
    return found


def cross_entropy(scores: Tensor, log_weight: Tensor) -> Tensor:
    """(Q,) of the gold candidate among its rivals."""
    return torch.logsumexp(scores + log_weight, dim=1) - scores[:, 0]


def inverse_temperature(scores: Tensor, log_weight: Tensor) -> float:
    """The b >= 0 for which softmax(b s) gives the gold candidates the highest likelihood; 0 where the scores say
    nothing, or the wrong thing, by two standard errors.

    scores, log_weight (Q, C). The likelihood is concave in b: its derivative is bisected.
    """
    present = ~torch.isinf(log_weight)
    deviation = float(scores[present].double().std()) if int(present.sum()) > 1 else 0.0
    if not deviation > 1e-12 * max(1.0, float(scores[present].abs().max())):
        return 0.0
    centred = torch.where(present, scores - scores[:, :1], torch.zeros_like(scores))

    def slope(b: float) -> float:
        share = torch.softmax(b * centred + log_weight, dim=1)
        return -float((share * centred).sum(1).mean())

    low, high = 0.0, 1.0 / deviation
    while slope(high) > 0 and high < _MOST_SHARP / deviation:
        low, high = high, 2 * high
    for _ in range(30):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    b = 0.5 * (low + high)
    gain = cross_entropy(torch.zeros_like(centred), log_weight) - cross_entropy(b * centred, log_weight)
    noise = float(gain.double().std()) / max(len(gain), 1) ** 0.5 if len(gain) > 1 else 0.0
    return b if float(gain.double().mean()) > 2 * noise else 0.0


def scales_of(data: Candidates) -> Tensor:
    """(3, M) inverse temperatures of each member at each task; 0 where it says nothing there."""
    scale = torch.zeros(len(SIDES), len(data.members))
    for task in sorted(set(data.queries.task.tolist())):
        rows = data.queries.task == task
        for member in range(len(data.members)):
            scale[task, member] = inverse_temperature(data.scores[rows, :, member], data.log_weight[rows])
    return scale


def fit_gate(data: Candidates, variant: Variant, scale: Tensor, directions: int) -> Gate:
    """Maximum likelihood of one variant's weights; ``scale`` from :func:`scales_of`. directions: 2R."""
    members, part = len(data.members), _part(data)
    active = scale > 0
    if variant.name == "single" or not bool(active.any()):
        return Gate.single(data.members, best_single(data, scale), _with_fallback(scale))
    base = torch.full_like(scale, ONE, requires_grad=True)
    offsets: dict[str, Tensor] = {}
    if variant.classes:
        offsets["levels"] = torch.zeros(LEVELS[part], members)
    if variant.relations:
        offsets["directions"] = torch.zeros(directions, members)
    fixed: dict[str, Tensor] = {}
    queries = data.queries
    if variant.features and queries.features is not None:
        flat = queries.features.flatten(1)
        fixed = {"centre": flat.mean(0), "spread": flat.std(0, correction=0).clamp(min=1e-6)}
        offsets["features"] = torch.zeros(flat.shape[1], members)
    for tensor in offsets.values():
        tensor.requires_grad_()
    standardised = None
    if fixed and queries.features is not None:
        standardised = standardise(queries.features, **fixed)

    def theta(rows: slice) -> Tensor:
        found = base[queries.task[rows]]
        if "levels" in offsets:
            found = found + offsets["levels"][queries.levels[rows]].sum(1)
        if "directions" in offsets:
            found = found + offsets["directions"][queries.directions[rows]]
        if standardised is not None:
            found = found + standardised[rows] @ offsets["features"]
        return found

    optimiser = torch.optim.LBFGS(
        [base, *offsets.values()], max_iter=_STEPS, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        penalty = ((base - ONE) ** 2)[active].sum() / (2 * _BASE_DEVIATION**2)
        for tensor in offsets.values():
            penalty = penalty + (tensor**2).sum() / (2 * variant.deviation**2)
        total = penalty / len(data)
        total.backward()  # type: ignore[no-untyped-call]
        value = total.detach()
        for start in range(0, len(data), _ROWS):
            rows = slice(start, start + _ROWS)
            weights = softplus(theta(rows)) * scale[queries.task[rows]]
            entropy = cross_entropy(fused(data.scores[rows], weights), data.log_weight[rows]).sum() / len(data)
            entropy.backward()  # type: ignore[no-untyped-call]
            value = value + entropy.detach()
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    found = {name: tensor.detach() for name, tensor in offsets.items()}
    return Gate(data.members, scale, base.detach(), **found, **fixed)


def best_single(data: Candidates, scale: Tensor) -> str:
    """The member with the highest MRR by itself, a member without a say as if all its scores were equal."""
    ranks = [_alone(data, member, scale).mean() for member in range(len(data.members))]
    return data.members[int(np.argmax(ranks))]


def _alone(data: Candidates, member: int, scale: Tensor) -> Floats:
    say = (scale[data.queries.task, member] > 0).float()[:, None]
    return reciprocal_ranks(data.scores[:, :, member] * say, data.log_weight)


def _with_fallback(scale: Tensor) -> Tensor:
    """A member chosen alone ranks by its scores as they are where no temperature could be fitted."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def choose_gate(
    data: Candidates, *, folds: int, shrinkage: Sequence[float], seed: int, directions: int
) -> Choice:
    """Try every variant on folds of the queries, choose, and fit the chosen one to all of them."""
    part = _part(data)
    fold = folds_of(data, folds, seed)
    variants = variants_of(part, shrinkage) if len(data.members) > 1 and fold.max() > 0 else [Variant("single")]
    weights = [torch.zeros(len(data), len(data.members)) for _ in variants]
    for train, held in _splits(fold):
        fitting, judged = data[train], data[held].queries
        scale = scales_of(fitting)
        for place, variant in enumerate(variants):
            weights[place][held] = fit_gate(fitting, variant, scale, directions).weights(judged)
        log.info("ensemble: %s gate, fold of %d queries done", part, len(held))
    ranks = np.stack([reciprocal_ranks(fused(data.scores, w), data.log_weight) for w in weights])
    chosen, tried = simplest(variants, ranks)
    nested = _nested(variants, ranks, fold)
    gate = fit_gate(data, variants[chosen], scales_of(data), directions)
    alone = best_single(data, scales_of(data))
    reason = _reason(part, variants[chosen], tried, alone)
    log.info("ensemble: %s", reason)
    for one in tried:
        log.info("ensemble:   %s gate, %-45s MRR %.4f", part, one.variant, one.mrr)
    return Choice(gate, variants[chosen], nested, alone, tuple(tried), weights[chosen], fold, reason)


def simplest(variants: Sequence[object], ranks: Floats) -> tuple[int, list[Tried]]:
    """The first of ``variants`` within one standard error of the best; ranks (V, Q) reciprocal ranks of each."""
    means = ranks.mean(1)
    best = int(means.argmax())
    gaps = ranks[best] - ranks
    errors = gaps.std(1) / max(ranks.shape[1], 1) ** 0.5
    tried = [
        Tried(str(v), float(m), float(g), float(e))
        for v, m, g, e in zip(variants, means, gaps.mean(1), errors, strict=True)
    ]
    return next(i for i, one in enumerate(tried) if one.behind <= one.error), tried


def _nested(variants: Sequence[Variant], ranks: Floats, fold: npt.NDArray[np.int64]) -> float:
    total = 0.0
    for number in range(int(fold.max()) + 1):
        held = fold == number
        judges = ~held if (~held).any() else held
        total += float(ranks[simplest(variants, ranks[:, judges])[0], held].sum())
    return total / len(fold)


def _splits(fold: npt.NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows to fit on, rows held out) of each fold; with one fold only, both are everything."""
    for number in range(int(fold.max()) + 1):
        held = fold == number
        train = ~held if (~held).any() else held
        yield torch.from_numpy(np.flatnonzero(train)), torch.from_numpy(np.flatnonzero(held))


def _part(data: Candidates) -> str:
    return part_of(SIDES[int(data.queries.task[0])])


def _reason(part: str, chosen: Variant, tried: Sequence[Tried], alone: str) -> str:
    if len(tried) == 1:
        return f"{part} answers: {alone} alone, as there is nothing to choose between"
    by_name: Mapping[str, Tried] = {one.variant: one for one in tried}
    best = max(tried, key=lambda one: one.mrr)
    mine, single = by_name[str(chosen)], tried[0]
    what = f"{alone} alone" if chosen.name == "single" else f"the gate with {chosen} weights"
    text = f"{part} answers: {what}, cross-validated MRR {mine.mrr:.4f} (best single member {single.mrr:.4f})"
    if best.variant != mine.variant:
        text += (
            f"; {best.variant} has {best.mrr:.4f}, but {mine.behind:.4f} is within its standard error of "
            f"{mine.error:.4f} and {mine.variant} is simpler"
        )
    return text
