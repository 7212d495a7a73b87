"""What is seen beside the ranks while a model is ranked: its members, where it is an ensemble, each ranked by the very
rows that were mixed; and its probabilities and answer sets, where it is calibrated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kgray.evaluation.counts import Counts, Strata
from kgray.evaluation.links import LinkScores, draw_negatives
from kgray.evaluation.ranking import Scored, Scorer, rank_scores
from kgray.evaluation.reliability import Reliability
from kgray.model.bundle import Bundle
from kgray.model.ensemble import EnsembleScorer


class _Recorder:
    """An ensemble that remembers the rows of its members it last mixed."""

    def __init__(self, ensemble: EnsembleScorer) -> None:
        self.ensemble = ensemble
        self.num_entities, self.num_relations = ensemble.num_entities, ensemble.num_relations
        self.rows: dict[str, torch.Tensor] = {}

    def score_tails(self, heads: torch.Tensor, relations: torch.Tensor) -> torch.Tensor:
        return self._score("tail", heads, relations)

    def score_heads(self, relations: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        return self._score("head", relations, tails)

    def score_relations(self, heads: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        return self._score("relation", heads, tails)

    def _score(self, task: str, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        self.rows = self.ensemble.rows(task, first, second, everyone=True)
        return self.ensemble.finish(task, first, second, self.rows)


@dataclass(slots=True)
class LinkWatch:
    """Scores of links and of pairs without one, by whose they are. near: (N, N) sparse adjacency of training."""

    near: Any
    count: int
    scores: dict[str, LinkScores] = field(default_factory=dict)

    def see(self, name: str, scored: Scored, rows: Mapping[str, torch.Tensor] | None = None) -> None:
        """Take note of one batch of ``name``, and of ``rows`` of others, by their names, to the same queries."""
        if scored.side == "relation":
            return
        negatives = draw_negatives(scored, self.near, self.count)
        for whose, scores in {name: scored.scores, **(rows or {})}.items():
            self.scores.setdefault(whose, LinkScores()).see(scored, negatives, scores)


@dataclass(slots=True)
class Watch:
    """Watches one shard. scorer: what to rank, ``see`` being its ``on_scores``."""

    bundle: Bundle
    scorer: Scorer
    strata: Strata
    recorder: _Recorder | None
    members: dict[str, Counts] = field(default_factory=dict)
    reliability: dict[str, Reliability] = field(default_factory=dict)
    links: LinkWatch | None = None

    @classmethod
    def of(
        cls, bundle: Bundle, split: str, strata: Strata, tasks: Sequence[str], links: LinkWatch | None = None
    ) -> Watch:
        """Of a model about to be ranked on ``tasks`` of ``split``."""
        recorder = _Recorder(bundle.scorer) if isinstance(bundle.scorer, EnsembleScorer) else None
        watch = cls(bundle, bundle if recorder is None else recorder, strata, recorder, links=links)
        if isinstance(bundle.scorer, EnsembleScorer):
            for name in bundle.scorer.members:
                watch.members[name] = Counts(split, True, bundle.num_relations, strata.cardinality)
        if bundle.calibration is not None:
            watch.reliability = {task: Reliability() for task in tasks if task in bundle.calibration.tasks}
        return watch

    def see(self, scored: Scored) -> None:
        """Take note of one batch."""
        relations = scored.triples[:, 1]
        unseen = ~(self.strata.seen[scored.triples[:, 0]] & self.strata.seen[scored.triples[:, 2]])
        for name, rows in ({} if self.recorder is None else self.recorder.rows).items():
            optimistic, pessimistic, _, candidates = rank_scores(rows, scored.gold, scored.left_out)
            self.members[name].add(scored.side, relations, unseen, optimistic, pessimistic, candidates)
        if self.links is not None:
            members = {} if self.recorder is None else self.recorder.rows
            self.links.see("model", scored, {f"member.{name}": row for name, row in members.items()})
        if scored.side in self.reliability and self.bundle.calibration is not None:
            asked = None if scored.side == "relation" else relations
            out = scored.others_known()
            self.reliability[scored.side].observe(
                self.bundle.calibration, scored.side, scored.scores, scored.gold, asked, out
            )
