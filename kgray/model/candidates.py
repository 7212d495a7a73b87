"""What a gate is fitted on: for each validation query the candidates that matter, with every member's score of them.

A softmax over all N entities for all queries and members would hold queries x N x members scores. Kept are the gold
answer, the union of each member's K best and a uniform sample of the rest, which stands for the rest by its weight: a
sum over all candidates is then estimated without bias, and where N is small it is exact. Other known answers are left
out as in ranking. What is fitted here ranks later over all candidates, always.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kgray.errors import NonFiniteError
from kgray.evaluation.counts import SIDES
from kgray.graph.filter_index import FilterIndex
from kgray.model.gate import FEATURES, Queries, TrainingFacts, row_features


@dataclass(frozen=True)
class Candidates:
    """Q queries with at most C candidates each, the gold one first.

    triples (Q, 3) int64. ids (Q, C) int64 of the candidates. scores (Q, C, M) float32 raw scores of the members.
    log_weight (Q, C) float32: 0 of a
    candidate that stands for itself, log(n) of a sampled one that stands for n, -inf where there is none. keys (Q,)
    int64: equal where queries of a task ask the same.
    """

    members: tuple[str, ...]
    triples: Tensor
    queries: Queries
    keys: Tensor
    ids: Tensor
    scores: Tensor
    log_weight: Tensor

    def __len__(self) -> int:
        return len(self.triples)

    def __getitem__(self, rows: Tensor) -> Candidates:
        parts = (self.ids[rows], self.scores[rows], self.log_weight[rows])
        return Candidates(self.members, self.triples[rows], self.queries[rows], self.keys[rows], *parts)

    @classmethod
    def concatenate(cls, parts: Sequence[Candidates]) -> Candidates:
        """One after the other; ValueError when there is none."""
        if not parts:
            raise ValueError("no candidates to put together")
        width = max(part.log_weight.shape[1] for part in parts)
        queries = [part.queries for part in parts]
        features = [q.features for q in queries if q.features is not None]
        return cls(
            parts[0].members,
            torch.cat([part.triples for part in parts]),
            Queries(
                torch.cat([q.task for q in queries]),
                torch.cat([q.levels for q in queries]),
                torch.cat([q.directions for q in queries]),
                torch.cat(features) if features else None,
            ),
            torch.cat([part.keys for part in parts]),
            torch.cat([_widen(part.ids, width, 0) for part in parts]),
            torch.cat([_widen(part.scores.transpose(1, 2), width, 0.0).transpose(1, 2) for part in parts]),
            torch.cat([_widen(part.log_weight, width, -torch.inf) for part in parts]),
        )


def _widen(tensor: Tensor, width: int, value: float) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]), value=value)


def collect(
    task: str,
    triples: Tensor,
    rows: Mapping[str, Tensor],
    known: FilterIndex,
    facts: TrainingFacts,
    *,
    best: int,
    sampled: int,
    seed: int,
) -> Candidates:
    """The candidates of B queries of one task. triples (B, 3); rows: each member's scores of all candidates (B, N).

    best: candidates kept of each member; sampled: how many of the rest are drawn, the same ones of a query however
    queries are cut into batches. Raises NonFiniteError naming the member and query with a score that is not finite.
    """
    side = SIDES.index(task)
    head, relation, tail = triples.unbind(1)
    first, second, gold = [(head, relation, tail), (relation, tail, head), (head, tail, relation)][side]
    width = next(iter(rows.values())).shape[1]
    for name, scores in rows.items():
        if not bool(torch.isfinite(scores).all()):
            bad = int((~torch.isfinite(scores)).any(1).nonzero()[0])
            raise NonFiniteError(f"member {name}: {task} query of triple {triples[bad].tolist()} has no finite score")
    lookup = (known.tails, known.heads, known.relations)[side]
    which, answers = (torch.from_numpy(part) for part in lookup(first, second))
    blocked = torch.zeros(len(triples), width, dtype=torch.bool)
    blocked[which, answers] = True
    blocked[torch.arange(len(triples)), gold] = False
    ids, weight = _choose(rows, gold, blocked, best, _sample(triples.numpy(), side, width, sampled, seed))
    scores = torch.stack([row.gather(1, ids) for row in rows.values()], dim=2).float()
    features = torch.stack([row_features(row) for row in rows.values()], dim=1)
    scores[torch.isinf(weight)] = 0.0
    queries = Queries(
        torch.full((len(triples),), side),
        facts.levels(task, first, second),
        facts.directions(task, first, second),
        features.view(len(triples), len(rows), len(FEATURES)),
    )
    keys = torch.from_numpy(facts.keys(task, first, second))
    return Candidates(tuple(rows), triples, queries, keys, ids, scores, weight)


def _choose(
    rows: Mapping[str, Tensor], gold: Tensor, blocked: Tensor, best: int, drawn: Tensor
) -> tuple[Tensor, Tensor]:
    """Ids (B, C), the gold one first, and their log weights (B, C); drawn (B, S) ids of a uniform sample."""
    (count, width), sampled = blocked.shape, drawn.shape[1]
    everything = width <= best + sampled
    if everything:
        ids = torch.cat([gold[:, None], torch.arange(width).expand(count, -1)], dim=1)
        fixed = ids.shape[1]
    else:
        tops = [row.masked_fill(blocked, -torch.inf).topk(best, dim=1).indices for row in rows.values()]
        ids = torch.cat([gold[:, None], *tops, drawn], dim=1)
        fixed = ids.shape[1] - sampled
    valid = ~blocked.gather(1, ids)
    # Of the same id several times only the first counts; a stable sort keeps the order of the columns.
    ordered, order = ids.sort(dim=1, stable=True)
    again = torch.zeros_like(valid)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    valid &= ~torch.zeros_like(valid).scatter(1, order, again)
    weight = torch.zeros(ids.shape)
    if not everything:
        rest = width - blocked.sum(1) - valid[:, :fixed].sum(1)
        found = valid[:, fixed:].sum(1)
        weight[:, fixed:] = (rest / found.clamp(min=1)).log()[:, None]
    weight[~valid] = -torch.inf
    # Columns that count come first, in their order, and the batch is as wide as its longest row.
    front = (~valid).byte().sort(dim=1, stable=True).indices[:, : int(valid.sum(1).max())]
    return ids.gather(1, front), weight.gather(1, front)


def thin(triples: npt.NDArray[np.int64], share: float, seed: int) -> npt.NDArray[np.int64]:
    """About that share of (n, 3) triples, the same ones however the triples are cut into shards."""
    if share >= 1:
        return triples
    state = mix(np.full(len(triples), seed, dtype=np.uint64), *triples.T)
    return triples[state < np.uint64(int(share * 2**63) * 2)]


def _sample(triples: npt.NDArray[np.int64], side: int, width: int, count: int, seed: int) -> Tensor:
    """(B, count) int64 ids below ``width``, uniform, decided by the query and the seed alone."""
    of_query = mix(np.full(len(triples), seed, dtype=np.uint64), *triples.T, np.full(len(triples), side))
    drawn = [mix(of_query, np.full(len(triples), number)) % np.uint64(width) for number in range(count)]
    return torch.from_numpy(np.stack(drawn, axis=1).astype(np.int64))


def mix(state: npt.NDArray[np.uint64], *columns: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """(n,) numbers that every bit of every column moves in every bit: splitmix64 (Steele et al. 2014)."""
    for column in columns:
        state = (state ^ column.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state
