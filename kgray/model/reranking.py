"""The second look: the best candidates of a first ranking, scored again by all that is known of each of them.

The first ranking sees every entity but only what states and relation vectors say. For the K best it leaves, features
of each pair (:mod:`kgray.model.features`) and the members' own scores are weighed, by weights a relation and direction
shrunk to common ones; a small perceptron over the same features may add what no sum of them says (after the candidate
re-ranking of learning to rank, Cao et al. 2007, listwise). The score stays a sum with one addend a feature, the
perceptron's being one. Candidates not looked at keep the order of the first ranking, below all that were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import Tensor, nn

from kgray.model.features import CandidateFeatures

FEATURES = "rerank-features.safetensors"
WEIGHTS = "rerank.safetensors"
FIRST = "first ranking"
TOGETHER = "features together"
_DIRECTION_DIM = 16
_LIMIT = 5.0  # standard deviations: a stranger pair must not drive its score out of what was fitted
_GAP = 1e-3


class Pairwise(nn.Module):
    """Scores of candidates from F standardised features, of which the first is the first ranking's score.

    directions: 2R. hidden: width of the perceptron, 0 for none. Dropout only in training.
    """

    def __init__(self, num_features: int, directions: int, hidden: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.common = nn.Parameter(torch.zeros(num_features))
        self.by_direction = nn.Embedding(directions, num_features)
        nn.init.zeros_(self.by_direction.weight)
        self.hidden = hidden
        self.direction: nn.Embedding | None = None
        self.together: nn.Sequential | None = None
        if hidden:
            self.direction = nn.Embedding(directions, _DIRECTION_DIM)
            last = nn.Linear(hidden, 1)
            nn.init.zeros_(last.weight)
            wide = nn.Linear(num_features + _DIRECTION_DIM, hidden)
            inner = (nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.ReLU())
            self.together = nn.Sequential(wide, *inner, last)

    def addends(self, x: Tensor, directions: Tensor) -> Tensor:
        """(B, K, F) features, (B,) directions -> (B, K, F) or, with the perceptron's last, (B, K, F + 1)."""
        parts = x * (self.common + self.by_direction(directions))[:, None]
        if self.together is None or self.direction is None:
            return parts  # type: ignore[no-any-return]
        where = self.direction(directions)[:, None].expand(-1, x.shape[1], -1)
        return torch.cat([parts, self.together(torch.cat([x, where], dim=-1))], dim=-1)

    def forward(self, x: Tensor, directions: Tensor) -> Tensor:
        """(B, K)."""
        return self.addends(x, directions).sum(-1)


class Picked(NamedTuple):
    """Candidates (B, K) int64 of a first ranking, which of them count, and which of those are no training fact, (B, K)
    bool. The fit sees only such: all that is relative to a query's candidates is relative to them."""

    ids: Tensor
    valid: Tensor
    new: Tensor


@dataclass(frozen=True)
class Reranker:
    """A fitted second look at entity queries.

    count: K. members: whose scores are read beside the first ranking's, with ``scale`` (2, M) for tails and heads.
    centre, spread (F,): of the features where it was fitted; F is 1 + M + the pair features.
    """

    count: int
    members: tuple[str, ...]
    features: CandidateFeatures
    model: Pairwise
    scale: Tensor
    centre: Tensor
    spread: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """What each addend is."""
        own = (FIRST, *self.members, *self.features.names)
        return own if self.model.together is None else (*own, TOGETHER)

    def pick(self, task: str, first: Tensor, second: Tensor, scores: Tensor) -> Picked:
        """The candidates looked at: the K best that are no training fact, and the K best of those that are.

        Known facts must not crowd out what is asked for, and still have a place of their own when they are asked too.
        """
        facts = self.features.facts
        rows, answers = (facts.tails if task == "tail" else facts.heads)(first, second)
        known = torch.zeros(scores.shape, dtype=torch.bool)
        known[torch.from_numpy(rows), torch.from_numpy(answers)] = True
        new = scores.masked_fill(known, -torch.inf).topk(min(self.count, scores.shape[1]), dim=1)
        most = int(known.sum(1).max()) if len(known) else 0
        old = scores.masked_fill(~known, -torch.inf).topk(min(self.count, most), dim=1)
        ids = torch.cat([new.indices, old.indices], dim=1)
        valid = torch.isfinite(torch.cat([new.values, old.values], dim=1))
        return Picked(ids, valid, valid & (torch.arange(ids.shape[1]) < new.indices.shape[1]))

    def look(
        self, task: str, first: Tensor, second: Tensor, scores: Tensor, rows: Mapping[str, Tensor], picked: Picked
    ) -> Tensor:
        """(B, K, F) standardised features of the picked candidates. scores, rows: (B, N) of all candidates."""
        own = {name: rows[name].gather(1, picked.ids) for name in self.members}
        return self.look_at(task, first, second, scores.gather(1, picked.ids), own, picked)

    def look_at(
        self, task: str, first: Tensor, second: Tensor, scores: Tensor, own: Mapping[str, Tensor], picked: Picked
    ) -> Tensor:
        """:meth:`look` from the scores (B, K) of the picked candidates alone, the first ranking's and each member's."""
        side = 0 if task == "tail" else 1
        scaled = [own[name] * self.scale[side, m] for m, name in enumerate(self.members)]
        gathered = torch.stack([scores, *scaled], dim=-1).float()
        anchors, relations = (first, second) if task == "tail" else (second, first)
        pairs = self.features(anchors.numpy(), relations.numpy(), picked.ids.numpy(), tails=task == "tail")
        x = torch.cat([gaps(gathered, picked.valid, picked.new), torch.from_numpy(pairs)], dim=-1)
        return standardise(x, self.centre, self.spread)

    def apply(
        self, task: str, first: Tensor, second: Tensor, scores: Tensor, rows: Mapping[str, Tensor]
    ) -> Tensor:
        """(B, N) scores after the second look; first, second (B,) are the given parts in the order head, relation,
        tail, scores those of the first ranking and rows those of each member."""
        picked = self.pick(task, first, second, scores)
        x = self.look(task, first, second, scores, rows, picked)
        return place(scores, picked, self.again(task, first, second, x))

    def again(self, task: str, first: Tensor, second: Tensor, x: Tensor) -> Tensor:
        """(B, K) scores of the second look from the features of :meth:`look`."""
        with torch.no_grad():
            scores: Tensor = self.model(x, self._directions(task, first, second))
        return scores

    def addends(
        self, task: str, first: Tensor, second: Tensor, scores: Tensor, rows: Mapping[str, Tensor], picked: Picked
    ) -> Tensor:
        """(B, K, len(names)) addends of the picked candidates' scores."""
        x = self.look(task, first, second, scores, rows, picked)
        with torch.no_grad():
            return self.model.addends(x, self._directions(task, first, second))

    def _directions(self, task: str, first: Tensor, second: Tensor) -> Tensor:
        return second if task == "tail" else first + self.features.facts.num_relations

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the files of the second look; what config.json must say of it."""
        arrays = {k: np.ascontiguousarray(v) for k, v in self.features.to_arrays().items()}
        save_file(arrays, folder / FEATURES)
        tensors = {f"model.{k}": v.contiguous() for k, v in self.model.state_dict().items()}
        fitted = {"scale": self.scale, "centre": self.centre, "spread": self.spread}
        save_tensors(tensors | {k: v.contiguous() for k, v in fitted.items()}, folder / WEIGHTS)
        return {"count": self.count, "members": list(self.members), "hidden": self.model.hidden}

    @classmethod
    def load(cls, folder: Path, info: Mapping[str, Any]) -> Reranker:
        """What :meth:`write` wrote; info: what it returned."""
        features = CandidateFeatures.from_arrays(load_file(folder / FEATURES))
        tensors = load_tensors(folder / WEIGHTS)
        model = Pairwise(len(tensors["centre"]), 2 * features.facts.num_relations, info["hidden"])
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        fitted = (tensors[name] for name in ("scale", "centre", "spread"))
        return cls(info["count"], tuple(info["members"]), features, model.eval(), *fitted)


def gaps(scores: Tensor, valid: Tensor, new: Tensor) -> Tensor:
    """(B, K, S) scores -> how far each is behind the best new one of its row; what does not count is level."""
    best = scores.masked_fill(~new[..., None], -torch.inf).amax(1, keepdim=True)
    best = torch.where(torch.isfinite(best), best, torch.zeros_like(best))
    return (scores - best).masked_fill(~valid[..., None], 0.0)


def standardise(x: Tensor, centre: Tensor, spread: Tensor) -> Tensor:
    """Of mean 0 and deviation 1 where it was fitted. The members' scores keep their tails; counts are cut off."""
    return ((x - centre) / spread).clamp(-_LIMIT * 4, _LIMIT)


def place(scores: Tensor, picked: Picked, again: Tensor) -> Tensor:
    """(B, N): ``again`` (B, K) for the picked candidates, the first ranking's scores below the new ones among them for
    the others."""
    chosen = torch.zeros(scores.shape, dtype=torch.bool)
    rows = torch.arange(len(scores))[:, None].expand_as(picked.ids)
    chosen[rows[picked.valid], picked.ids[picked.valid]] = True
    shift, cap = below(again, picked, scores.masked_fill(chosen, -torch.inf).amax(1))
    out = torch.minimum(scores + shift[:, None], cap[:, None])
    out[rows[picked.valid], picked.ids[picked.valid]] = again[picked.valid]
    return out


def below(again: Tensor, picked: Picked, highest: Tensor) -> tuple[Tensor, Tensor]:
    """How candidates that were not picked are moved below the new ones that were: what is added to their scores, and
    what these are at most, (B,) each. highest (B,): of their scores, -inf where there are none."""
    lowest = again.masked_fill(~picked.new, torch.inf).amin(1)
    both = torch.isfinite(lowest) & torch.isfinite(highest)
    shift = torch.where(both, lowest - highest - _GAP, torch.zeros_like(lowest))
    # A shifted score may round up to the lowest one.
    return shift, torch.where(torch.isfinite(lowest), lowest - _GAP / 2, torch.inf)

