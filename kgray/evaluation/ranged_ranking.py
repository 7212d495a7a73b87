"""The evaluator where no row of all candidates is held: ranks and reliability of one shard from merged ranges.

The rules are those of :mod:`kgray.evaluation.ranking`: the true score is read from the range its rivals stand in, known
other answers are left out, a score that is no number is an error. Ranks are the same integers. What needs the rows of
each member, or of all pairs at hand, is not measured: the members of an ensemble, links.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from kgray.errors import NonFiniteError
from kgray.evaluation.answers import Task
from kgray.evaluation.counts import Counts, Strata
from kgray.evaluation.ranged import Asked, RangedAnswerer, Ranked
from kgray.evaluation.ranking import Ranks
from kgray.evaluation.reliability import Reliability
from kgray.graph.filter_index import FilterIndex

Ints = npt.NDArray[np.int64]


def rank_ranged(
    answerer: RangedAnswerer,
    triples: Iterable[Ints],
    known: FilterIndex,
    *,
    split: str,
    train: Strata,
    tasks: Sequence[Task],
    on_ranks: Callable[[Ranks], None],
    reliability: Mapping[str, Reliability],
) -> Counts:
    """Rank the true tail and head of each triple of arrays (n, 3), as ``rank_triples`` does of whole rows.

    tasks: of ``tail`` and ``head``. reliability: by task, to be added to. Raises NonFiniteError naming the query.
    """
    model = answerer.model
    counts = Counts(split, True, model.num_relations, train.cardinality)
    for array in triples:
        for rows in answerer.parts(len(array)):
            batch = array[rows]
            unseen = ~(train.seen[batch[:, 0]] & train.seen[batch[:, 2]])
            for task in tasks:
                asked = _asked(task, batch, known)
                found = answerer.rank(asked, set_sizes=task in reliability)
                _check(asked, found)
                out = np.bincount(asked.known[0], minlength=len(batch))
                candidates = model.num_entities - out
                counts.add(task, batch[:, 1], unseen, found.optimistic, found.pessimistic, candidates)
                on_ranks(Ranks(task, batch, found.optimistic, found.pessimistic, found.true, candidates))
                if task in reliability:
                    _observe(reliability[task], found)
    return counts


def _asked(task: Task, batch: Ints, known: FilterIndex) -> Asked:
    head, relation, tail = torch.from_numpy(batch.T.copy())
    first, second, gold = (head, relation, tail) if task == "tail" else (relation, tail, head)
    rows, answers = known.tails(first, second) if task == "tail" else known.heads(first, second)
    others = answers != gold.numpy()[rows]
    return Asked(task, first, second, (rows[others], answers[others]), gold)


def _check(asked: Asked, found: Ranked) -> None:
    if found.finite.all():
        return
    row = int(np.flatnonzero(~found.finite)[0])
    given = int(asked.first[row]), int(asked.second[row])
    query = f"({given[0]}, {given[1]}, ?)" if asked.task == "tail" else f"(?, {given[0]}, {given[1]})"
    raise NonFiniteError(
        f"{asked.task} query {query}, true answer {int(asked.gold[row])}: a candidate has a score that is not a "
        "number; it cannot be ranked"
    )


def _observe(reliability: Reliability, found: Ranked) -> None:
    """See ``Reliability.observe``, whose sums these are."""
    rows = found.rows
    if rows is None or found.leading is None or found.set_size is None:
        raise ValueError("reliability of a model that is not calibrated")
    true = found.true.astype(np.float64)
    credit = (true == rows.best) / found.leading
    log_p = np.minimum(rows.best * rows.task.inverse_temperature - rows.log_sum, 0.0)
    reliability.add(rows.task.first(np.exp(log_p)), credit, true >= rows.threshold, found.set_size)
