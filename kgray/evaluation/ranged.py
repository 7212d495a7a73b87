"""Answers where a row of all candidates is too much to hold: candidates in ranges, looked at one at a time, by one
process or by several that hold a range each, and merged.

What must be known of a whole row is gathered in rounds, each of which goes over all ranges once:

1. ``moments``: how each member's scores are distributed, where the gate of an ensemble reads that;
2. ``shortlist``: the best candidates of the first ranking, with each member's score, where there is a second look;
3. ``survey``: of the final scores the best candidates, their softmax, and the score of the true answer;
4. ``compare``: how many candidates are above and level with that, and in the answer set.

Scores are computed anew in each round: the same numbers, as the same queries meet the same range. A round's results add
up exactly (:mod:`kgray.evaluation.merging`). Ranges end at multiples of their size whoever holds them, so answers do
not depend on the number of processes.

Which members can be scored by range: those whose candidates are vectors of their own (fused models, their variants and
seeds, ComplEx and the like: ``score_range``). A path model cannot: what it says of a candidate is a message from the
query's entity over all edges, so all N are computed or none. Nor can rules: their bodies are walked from the query's
entity, and which candidates these walks end at is known when all of them are walked. Such members give whole rows,
which are kept for the batch, and batches are made so small that these fit.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kgray.evaluation.answers import Answerer, Answers, Bools, Floats, Ints, Judged, Known, Model, Side, Task, both
from kgray.evaluation.calibration import Calibration, Rows, TaskCalibration
from kgray.evaluation.merging import LogSum, Moments, Rivals, Top, finite_rows, known_in, total
from kgray.model.ensemble import EnsembleScorer, score
from kgray.model.reranking import Picked, below

BATCH = 256
"""Queries scored at once, where they fit: fewer make a product of matrices slow."""

_LEAST_BATCH = 16
"""Where so many whole rows fit, nothing is gained by ranges."""

_COPIES = 6
"""Matrices as large as the scores of a range that are held besides those of the members."""


@dataclass(frozen=True)
class Asked:
    """B queries of an entity task. first, second (B,) int64: the given parts in the order head, relation, tail; known:
    answers that are left out of softmax and ranks; gold (B,): the true answers, -1 where there is none; token: of these
    queries alone, by which a process knows them again in the next round."""

    task: Task
    first: Tensor
    second: Tensor
    known: Known
    gold: Tensor
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def __len__(self) -> int:
        return len(self.first)


@dataclass(frozen=True)
class Final:
    """What turns members' scores into final ones. weights (B,) by member, None for a model that is its only member;
    the others are of the second look, None without it: ids (B, K) of the candidates looked at again, valid (B, K),
    again (B, K) their scores; shift, cap (B,) for those that were not."""

    weights: dict[str, Tensor] | None = None
    ids: Tensor | None = None
    valid: Tensor | None = None
    again: Tensor | None = None
    shift: Tensor | None = None
    cap: Tensor | None = None


@dataclass(frozen=True)
class Survey:
    """A range's part of round 3. true (B,): score of the gold answer, -inf elsewhere; finite (B,)."""

    top: Top
    log_sum: LogSum | None
    true: Floats
    finite: Bools

    def __add__(self, other: Survey) -> Survey:
        log_sum = None if self.log_sum is None or other.log_sum is None else self.log_sum + other.log_sum
        true = np.maximum(self.true, other.true)
        return Survey(self.top + other.top, log_sum, true, self.finite & other.finite)


@dataclass(frozen=True)
class Ranked:
    """True answers among all candidates: ranks with ties won and lost, scores, whether all scores of the query are
    numbers, (B,) each. Of a calibrated model also what calibration says of the queries, how many candidates lead, and
    the sizes of the answer sets where they were asked for; else None."""

    optimistic: Ints
    pessimistic: Ints
    true: Floats
    finite: Bools
    rows: Rows | None
    leading: Ints | None
    set_size: Ints | None


class Ranges(Protocol):
    """Whoever goes over all ranges: this process (`Blocks`), or several."""

    def each(self, method: str, *arguments: Any) -> Any:
        """The sum over all ranges of what ``method`` of `Blocks` gives."""
        ...


@dataclass
class Blocks:
    """The ranges that one process holds: from ``start`` to ``stop``, ``size`` candidates at a time.

    scorer: the model's, an `EnsembleScorer` or a family's own.
    """

    scorer: Any
    size: int
    start: int
    stop: int
    _held: dict[str, Tensor] = field(default_factory=dict)
    _held_of: str = ""

    def each(self, method: str, *arguments: Any) -> Any:
        """See `Ranges`."""
        starts = range(self.start, self.stop, self.size)
        with torch.inference_mode():
            return total(getattr(self, method)(low, min(low + self.size, self.stop), *arguments) for low in starts)

    def moments(self, start: int, stop: int, asked: Asked) -> dict[str, Moments]:
        """Round 1, of each member."""
        return {name: Moments.of(row) for name, row in self._rows(asked, start, stop).items()}

    def shortlist(self, start: int, stop: int, asked: Asked, final: Final, facts: Known, count: int) -> tuple[Top, Top]:
        """Round 2: the ``count`` best of the first ranking that are no training fact, and of those that are, with the
        scores of the members. facts: the training facts among the candidates."""
        rows = self._rows(asked, start, stop)
        mixed = self._mixed(rows, final)
        old = known_in(facts, len(asked), start, stop)
        members = torch.stack([rows[name].float() for name in self.scorer.reranker.members], dim=-1)
        return Top.of(mixed, start, count, old, members), Top.of(mixed, start, count, ~old, members)

    def survey(
        self, start: int, stop: int, asked: Asked, final: Final, filtered: Bools, count: int, temperature: float | None
    ) -> Survey:
        """Round 3. filtered (B,): whose known answers may not be among the best; temperature: the inverse one, None
        where nothing is calibrated."""
        scores = self._final(asked, final, start, stop)
        known = known_in(asked.known, len(asked), start, stop)
        out = known & torch.from_numpy(filtered)[:, None] if filtered.any() else None
        inside = (asked.gold >= start) & (asked.gold < stop)
        place = torch.where(inside, asked.gold - start, 0)
        true = torch.where(inside, scores.gather(1, place[:, None]).squeeze(1), -torch.inf)
        log_sum = None if temperature is None else LogSum.of(scores, temperature, known)
        return Survey(Top.of(scores, start, count, out), log_sum, true.numpy(), finite_rows(scores))

    def compare(
        self, start: int, stop: int, asked: Asked, final: Final, true: Floats | None, thresholds: Floats | None
    ) -> tuple[Rivals | None, Rivals | None]:
        """Round 4: candidates against the true answers' scores (B,), known ones left out, but the true ones; and
        against the thresholds (B,) of the answer set, known ones left out. None for what is not asked."""
        scores = self._final(asked, final, start, stop)
        known = known_in(asked.known, len(asked), start, stop)
        others = known.clone()
        rows = torch.nonzero((asked.gold >= start) & (asked.gold < stop)).flatten()
        others[rows, asked.gold[rows] - start] = False
        return (
            None if true is None else Rivals.of(scores, torch.from_numpy(true), others),
            None if thresholds is None else Rivals.of(scores, torch.from_numpy(thresholds), known),
        )

    def _rows(self, asked: Asked, start: int, stop: int) -> dict[str, Tensor]:
        """Scores (B, C) of each member that an answer needs."""
        if asked.token != self._held_of:
            self._held, self._held_of = {}, asked.token
        found = {}
        for name, member in members_of(self.scorer, asked.task).items():
            if can_range(member):
                found[name] = member.score_range(asked.task, asked.first, asked.second, start, stop)
                continue
            if name not in self._held:
                self._held[name] = score(member, asked.task, asked.first, asked.second)
            found[name] = self._held[name][:, start:stop]
        return found

    def _mixed(self, rows: dict[str, Tensor], final: Final) -> Tensor:
        if final.weights is None:
            (only,) = rows.values()
            return only.float()
        mixed: Tensor = self.scorer.fuse(final.weights, rows)
        return mixed

    def _final(self, asked: Asked, final: Final, start: int, stop: int) -> Tensor:
        scores = self._mixed(self._rows(asked, start, stop), final)
        if final.ids is None:
            return scores
        valid, again, shift, cap = final.valid, final.again, final.shift, final.cap
        if valid is None or again is None or shift is None or cap is None:
            raise ValueError("a second look of which parts are missing")
        out = torch.minimum(scores + shift[:, None], cap[:, None])
        here = valid & (final.ids >= start) & (final.ids < stop)
        rows = torch.arange(len(scores))[:, None].expand_as(final.ids)
        out[rows[here], final.ids[here] - start] = again[here]
        return out


def members_of(scorer: Any, task: str) -> dict[str, Any]:
    """The members whose scores an answer needs; a model that is none is its own."""
    if not isinstance(scorer, EnsembleScorer):
        return {"model": scorer}
    return {name: scorer.members[name] for name in scorer.asked(task)}


def can_range(member: Any) -> bool:
    """Whether a member's candidates can be scored by range; see the module."""
    return hasattr(member, "score_range")


def sizes(scorer: Any, num_entities: int, cells: int) -> tuple[int, int] | None:
    """(queries at once, candidates at once) of entity queries that hold no more than so many numbers; None where whole
    rows of enough queries fit, or no member can be scored by range.

    One query is answered at a time where even its whole rows, of members that cannot do otherwise, are too much.
    """
    if "tail" not in scorer.tasks:
        return None
    members = members_of(scorer, "tail")
    whole = sum(not can_range(member) for member in members.values())
    if whole == len(members) or _LEAST_BATCH * num_entities * (len(members) + _COPIES) <= cells:
        return None
    # Half for whole rows, the rest for the range.
    batch = BATCH if not whole else max(1, min(BATCH, cells // (2 * whole * num_entities)))
    size = (cells - (cells // 2 if whole else 0)) // (batch * (len(members) + _COPIES))
    # Near-equal ranges: a narrow last one would go through another matrix kernel, and break ties with its last bits.
    ranges = -(-num_entities // max(1, min(size, num_entities)))
    return batch, -(-num_entities // ranges)


class RangedAnswerer(Answerer):
    """An `Answerer` that never holds a row of all candidates; relation queries, which have few, are answered as ever.

    batch, size: queries and candidates at once (see :func:`sizes`). ranges: who goes over them; this process unless
    given, when it must hold the same model and the same ranges.
    """

    def __init__(self, model: Model, scorer: Any, batch: int, size: int, ranges: Ranges | None = None) -> None:
        super().__init__(model)
        self.scorer = scorer
        self.batch = batch
        self.ranges = ranges or Blocks(scorer, size, 0, model.num_entities)

    def complete(self, task: Task, first: Tensor, second: Tensor, top_k: Ints, filter_known: Bools) -> Answers:
        """As :meth:`Answerer.complete`."""
        if task == "relation":
            return super().complete(task, first, second, top_k, filter_known)
        parts = []
        for rows in self.parts(len(first)):
            asked = self._asked(task, first[rows], second[rows], torch.full((len(first[rows]),), -1))
            parts.append(self._complete(asked, top_k[rows], filter_known[rows]))
        return Answers.concatenate(parts)

    def judge(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Judged:
        """As :meth:`Answerer.judge`."""
        parts = []
        for rows in self.parts(len(heads)):
            h, r, t = heads[rows], relations[rows], tails[rows]
            known = self.model.known.contains(h, r, t)
            tail = self._side(self._asked("tail", h, r, t), known)
            parts.append(both(tail, self._side(self._asked("head", r, t, h), known), known))
        return Judged.concatenate(parts)

    def parts(self, count: int) -> list[slice]:
        """Near-equal batches of so many queries."""
        parts = -(-count // self.batch)
        return [slice(count * i // parts, count * (i + 1) // parts) for i in range(parts)]

    def _asked(self, task: Task, first: Tensor, second: Tensor, gold: Tensor) -> Asked:
        known = self.model.known
        return Asked(task, first, second, (known.tails if task == "tail" else known.heads)(first, second), gold)

    def _complete(self, asked: Asked, top_k: Ints, filter_known: Bools) -> Answers:
        width, batch = self.model.num_entities, len(asked)
        fitted = self._calibration(asked.task)
        final = self._final(asked)
        most = max(1, min(int(top_k.max(initial=1)), width))
        temperature = None if fitted is None else fitted.inverse_temperature
        found: Survey = self.ranges.each("survey", asked, final, filter_known, most, temperature)
        number_known = np.bincount(asked.known[0], minlength=batch)
        left = width - np.where(filter_known, number_known, 0)
        count = np.where(found.finite, np.minimum(top_k, left), 0)
        ids = np.maximum(found.top.ids, 0)
        of_known = _contained(asked.known, ids, width)
        answers = Answers(
            *(ids, found.top.values, of_known, np.full(ids.shape, np.nan), np.zeros(ids.shape, dtype=bool)),
            *(np.zeros(batch, dtype=np.int64), count, np.zeros(batch, dtype=bool), found.finite),
        )
        if fitted is None or found.log_sum is None:
            return answers
        rows = _rows(fitted, found.log_sum, asked)
        every = np.arange(batch)[:, None]
        with np.errstate(invalid="ignore"):
            probability = rows.probability(every, found.top.values, of_known)
            inside = rows.contains(every, found.top.values, of_known)
        _, reaching = self.ranges.each("compare", asked, final, None, rows.reaching())
        calibrated = found.finite & (number_known < width)
        size = reaching.above + reaching.level
        return Answers(ids, found.top.values, of_known, probability, inside, size, count, calibrated, found.finite)

    def rank(self, asked: Asked, *, set_sizes: bool) -> Ranked:
        """Where the true answers stand among all candidates; set_sizes: whether those of the answer sets are counted,
        where the model is calibrated."""
        fitted = self._calibration(asked.task)
        final = self._final(asked)
        temperature = None if fitted is None else fitted.inverse_temperature
        none = np.zeros(len(asked), dtype=bool)
        found: Survey = self.ranges.each("survey", asked, final, none, 1, temperature)
        rows, leading = None, None
        if fitted is not None and found.log_sum is not None:
            rows, leading = _rows(fitted, found.log_sum, asked), found.log_sum.leading
        counted = rows.reaching() if rows is not None and set_sizes else None
        rivals, reaching = self.ranges.each("compare", asked, final, found.true, counted)
        size = None if reaching is None else reaching.above + reaching.level
        # Level counts the true answer itself.
        above, level = rivals.above, rivals.level
        return Ranked(above + 1, above + level, found.true, found.finite, rows, leading, size)

    def _side(self, asked: Asked, known: Bools) -> Side:
        batch, width = len(asked), self.model.num_entities
        found = self.rank(asked, set_sizes=False)
        rank, rows = (found.optimistic + found.pessimistic) / 2, found.rows
        none = np.zeros(batch, dtype=bool)
        probability, inside, calibrated = np.full(batch, np.nan), none, none
        if rows is not None:
            every = np.arange(batch)
            calibrated = found.finite & (np.bincount(asked.known[0], minlength=batch) < width)
            with np.errstate(invalid="ignore"):
                inside = rows.contains(every, found.true, known)
                probability = np.where(calibrated, rows.probability(every, found.true, known), np.nan)
        return Side(found.true, rank, probability, inside, calibrated, found.finite)

    def _calibration(self, task: Task) -> TaskCalibration | None:
        calibration: Calibration | None = self.model.calibration
        return None if calibration is None else calibration.tasks.get(task)

    def _final(self, asked: Asked) -> Final:
        """Rounds 1 and 2, where they are needed."""
        if not isinstance(self.scorer, EnsembleScorer):
            return Final()
        task, first, second = asked.task, asked.first, asked.second
        gate = self.scorer.gate(task)
        features = None
        if gate.features is not None:
            found = self.ranges.each("moments", asked)
            features = torch.stack([found[name].features() for name in gate.members], dim=1)
        final = Final(self.scorer.weigh(task, first, second, features))
        reranker = self.scorer.reranker
        if reranker is None:
            return final
        width = self.model.num_entities
        facts = (reranker.features.facts.tails if task == "tail" else reranker.features.facts.heads)(first, second)
        count = min(reranker.count, width)
        # One more than is looked at: the best of the others decides how far they are moved down.
        new, old = self.ranges.each("shortlist", asked, final, facts, count + 1)
        most = min(reranker.count, int(np.bincount(facts[0], minlength=1).max(initial=0)))
        values = np.concatenate([new.values[:, :count], old.values[:, :most]], axis=1)
        ids = torch.from_numpy(np.maximum(np.concatenate([new.ids[:, :count], old.ids[:, :most]], axis=1), 0))
        carried = torch.from_numpy(np.concatenate([new.carried[:, :count], old.carried[:, :most]], axis=1))
        valid = torch.from_numpy(np.isfinite(values))
        picked = Picked(ids, valid, valid & (torch.arange(ids.shape[1]) < count))
        own = {name: carried[..., m] for m, name in enumerate(reranker.members)}
        x = reranker.look_at(task, first, second, torch.from_numpy(values), own, picked)
        again = reranker.again(task, first, second, x)
        highest = torch.from_numpy(np.maximum(new.values[:, count], old.values[:, most]))
        shift, cap = below(again, picked, highest)
        return Final(final.weights, ids, valid, again, shift, cap)


def _rows(fitted: TaskCalibration, log_sum: LogSum, asked: Asked) -> Rows:
    relations = (asked.second if asked.task == "tail" else asked.first).numpy()
    return Rows(fitted, log_sum.log_sum, log_sum.best, fitted.thresholds[relations])


def _contained(known: Known, ids: Ints, width: int) -> Bools:
    """(B, K): which of ids (B, K) are among the known (rows, candidates)."""
    wanted = np.arange(len(ids))[:, None] * width + ids
    found: Bools = np.isin(wanted, known[0] * width + known[1])
    return found


def answerer_of(model: Any, cells: int) -> Answerer:
    """The answerer of a bundle that keeps to so many numbers: whole rows where they fit, else ranges."""
    found = sizes(model.scorer, model.num_entities, cells)
    return Answerer(model, cells) if found is None else RangedAnswerer(model, model.scorer, *found)
