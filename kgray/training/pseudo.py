"""Pseudo-labels: a trained model's surest predictions, taken as further training targets of another (Lee 2013).

The new targets are only asked for. They carry no messages and filter no rank, so a wrong one misleads one query and
is never itself evidence; validation and test are not looked at, a held-out fact may well be among them.
"""

from __future__ import annotations

import numpy as np
import torch

from kgray.graph.graph import Graph
from kgray.graph.neighbours import Int64
from kgray.model.bundle import Scorer
from kgray.training.config import PseudoConfig

_AT_ONCE = 1 << 24
"""Scores held at once: 64 MiB of float32."""


def pseudo_labels(teacher: Scorer, graph: Graph, config: PseudoConfig) -> Int64:
    """(n, 3) int64 triples outside training, n at most ``config.share`` of the training triples, surest first.

    Queries (entity, relation, direction) are drawn with relation and direction as frequent as in training and the
    entity any that training has; what is sure is a high softmax probability of the best answer, training's own answers
    left out; entities held out of training are none. Depends on the teacher, the training triples and ``config`` alone.
    """
    train, n = graph.triples["train"], graph.num_entities
    trained = graph.trained_entities()
    held_out = np.empty(0, dtype=np.int64) if trained is None else np.setdiff1d(np.arange(n), trained)
    wanted = int(config.share * len(train))
    generator = np.random.default_rng(config.seed)
    relations = train[generator.integers(0, len(train), config.queries), 1]
    entities = generator.choice(np.unique(train[:, [0, 2]]), config.queries)
    backward = generator.random(config.queries) < 0.5
    known = graph.known(["train"])
    found, sure = [], []
    size = max(1, _AT_ONCE // n)
    for back in (False, True):
        mine = np.flatnonzero(backward == back)
        for start in range(0, len(mine), size):
            rows = mine[start : start + size]
            e, r = entities[rows], relations[rows]
            et, rt = torch.from_numpy(e), torch.from_numpy(r)
            scores = (teacher.score_heads(rt, et) if back else teacher.score_tails(et, rt)).float()
            row, other = known.heads(r, e) if back else known.tails(e, r)
            scores[torch.from_numpy(row), torch.from_numpy(other)] = float("-inf")
            scores[:, torch.from_numpy(held_out)] = float("-inf")
            best = scores.max(dim=1)
            sure.append((best.values - scores.logsumexp(dim=1)).numpy())
            answer = best.indices.numpy()
            found.append(np.stack([answer, r, e] if back else [e, r, answer], axis=1))
    certainty = np.concatenate(sure)
    order = np.argsort(-certainty, kind="stable")
    # A query whose answers are all known has none left, and a certainty that is no number.
    triples: Int64 = np.concatenate(found)[order[np.isfinite(certainty[order])]]
    _, first = np.unique(triples, axis=0, return_index=True)
    surest: Int64 = triples[np.sort(first)][:wanted]
    return surest
