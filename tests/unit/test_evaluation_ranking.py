"""The evaluator against a brute-force oracle in plain Python, in every mode: ties, leaks, bad scores."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kgray.errors import NonFiniteError
from kgray.evaluation import ranking
from kgray.evaluation.counts import HITS, KINDS, SIDES, Counts, Strata, merge
from kgray.evaluation.ranking import Ranks, filter_splits, rank_scores, rank_triples
from kgray.graph.filter_index import FilterIndex

N, R = 9, 4


class TableScorer:
    """Scores looked up in a dense (N, R, N) table, one for each direction."""

    def __init__(self, forward: torch.Tensor, backward: torch.Tensor | None = None) -> None:
        self.forward = forward
        self.backward = forward if backward is None else backward
        self.num_entities, self.num_relations = forward.shape[0], forward.shape[1]

    def score_tails(self, heads: torch.Tensor, relations: torch.Tensor) -> torch.Tensor:
        return self.forward[heads, relations]

    def score_heads(self, relations: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        return self.backward[:, relations, tails].T

    def score_relations(self, heads: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        return ((self.forward + self.backward) / 2)[heads, :, tails]

    def score_triples(self, h: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The same score by another kernel: off in the last bits, as in LibKGE issue 221."""
        return self.forward[h, r, t] * (1 + 1e-6) + 1e-6


def oracle(
    scorer: TableScorer, triples: np.ndarray, known: set[tuple[int, int, int]], side: str
) -> list[tuple[int, int, int]]:
    """(optimistic, pessimistic, candidates) of each triple by looping over the candidates."""
    answer = []
    mean = (scorer.forward + scorer.backward) / 2
    for h, r, t in triples.tolist():
        if side == "tail":
            rivals = [(scorer.forward[h, r, x].item(), (h, r, x)) for x in range(scorer.num_entities)]
        elif side == "head":
            rivals = [(scorer.backward[x, r, t].item(), (x, r, t)) for x in range(scorer.num_entities)]
        else:
            rivals = [(mean[h, x, t].item(), (h, x, t)) for x in range(scorer.num_relations)]
        true = next(score for score, triple in rivals if triple == (h, r, t))
        left = [score for score, triple in rivals if triple == (h, r, t) or triple not in known]
        better = sum(score > true for score in left)
        level = sum(score == true for score in left)
        answer.append((better + 1, better + level, len(left)))
    return answer


def random_scorer(seed: int, levels: int | None, n: int = N, r: int = R) -> TableScorer:
    generator = torch.Generator().manual_seed(seed)
    forward, backward = (torch.randn(n, r, n, generator=generator) for _ in range(2))
    if levels is not None:  # few distinct scores: ties everywhere
        forward, backward = ((x * levels / 3).round() for x in (forward, backward))
    return TableScorer(forward, backward)


def random_triples(seed: int, count: int, n: int = N, r: int = R) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return np.stack([draw.integers(0, n, count), draw.integers(0, r, count), draw.integers(0, n, count)], 1)


def index_of(triples: np.ndarray, n: int = N, r: int = R) -> FilterIndex:
    return FilterIndex.build(triples, n, r)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("levels", [None, 2, 0])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 30), batch_size=st.sampled_from([None, 1, 3, 7, 64]))
def test_equals_the_oracle(
    side: str, filtered: bool, levels: int | None, seed: int, count: int, batch_size: int | None
) -> None:
    scorer, triples = random_scorer(seed, levels), random_triples(seed, count)
    known = np.concatenate([triples, random_triples(seed + 1, 60)])
    batches: list[Ranks] = []
    counts = rank_triples(
        scorer,
        triples,
        index_of(known) if filtered else None,
        split="test",
        tasks=[side],
        batch_size=batch_size,
        on_ranks=batches.append,
    )
    expected = oracle(scorer, triples, {tuple(t) for t in known.tolist()} if filtered else set(), side)
    got = [
        row
        for b in batches
        for row in zip(b.optimistic.tolist(), b.pessimistic.tolist(), b.candidates.tolist(), strict=True)
    ]
    assert got == expected
    if not count:
        return
    realistic = [(a + b) / 2 for a, b, _ in expected]
    metrics, key = counts.metrics(KINDS), f"test.{side}.{{}}.{'filtered' if filtered else 'raw'}.full."
    columns = ([a for a, _, _ in expected], realistic, [b for _, b, _ in expected])
    for kind, ranks in zip(KINDS, columns, strict=True):
        at = key.format(kind)
        assert metrics[at + "mrr"] == pytest.approx(math.fsum(1 / x for x in ranks) / count, abs=1e-12)
        assert metrics[at + "mr"] == pytest.approx(sum(ranks) / count, abs=1e-12)
        for k in HITS:
            assert metrics[at + f"hits@{k}"] == pytest.approx(sum(x <= k for x in ranks) / count, abs=1e-12)
        chance = sum((c + 1) / 2 for *_, c in expected) / count
        adjusted = 1 - (sum(ranks) / count - 1) / (chance - 1) if chance > 1 else 0.0
        assert metrics[at + "amri"] == pytest.approx(adjusted, abs=1e-9)
        assert metrics[at + "ties"] == pytest.approx(sum(b > a for a, b, _ in expected) / count)
        assert metrics[at + "count"] == count


@pytest.mark.parametrize("block", [1, 5, 1 << 18])
def test_blocks_of_any_shape_give_the_same_ranks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    scores = torch.randint(0, 4, (13, 29), generator=torch.Generator().manual_seed(0)).float()
    gold = torch.arange(13)
    expected = rank_scores(scores, gold)
    monkeypatch.setattr(ranking, "_BLOCK", {"cpu": block})
    monkeypatch.setattr(ranking, "_EXACT_SUM", max(block, 3))
    for a, b in zip(rank_scores(scores, gold), expected, strict=True):
        assert a.tolist() == b.tolist()


def test_half_precision_and_strided_scores_are_ranked_and_left_as_they_were() -> None:
    scores = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)).bfloat16().T
    before = scores.clone()
    optimistic, pessimistic, true, _ = rank_scores(scores, torch.arange(6), (np.array([0, 0]), np.array([0, 5])))
    wide = scores.float()
    for row in range(6):
        left = [wide[row, c] for c in range(40) if not (row == 0 and c == 5)]
        assert optimistic[row] == 1 + sum(x > wide[row, row] for x in left)
        assert pessimistic[row] == sum(x >= wide[row, row] for x in left)
        assert true[row] == wide[row, row]
    assert torch.equal(scores, before)


def test_a_constant_scorer_gets_the_middle_rank() -> None:
    n, r = 101, 5
    triples = random_triples(3, 50, n, r)
    counts = rank_triples(TableScorer(torch.zeros(n, r, n)), triples, None, split="test")
    metrics = counts.metrics(KINDS)
    assert metrics["test.both.realistic.raw.full.mr"] == 51
    assert metrics["test.both.realistic.raw.full.mrr"] == pytest.approx(1 / 51, abs=1e-14)
    assert metrics["test.both.realistic.raw.full.amri"] == 0
    assert metrics["test.both.realistic.raw.full.ties"] == 1
    assert metrics["test.both.realistic.raw.full.hits@10"] == 0
    assert metrics["test.relation.realistic.raw.full.mr"] == 3
    assert metrics["test.both.optimistic.raw.full.mrr"] == 1
    assert metrics["test.both.pessimistic.raw.full.mr"] == n


def test_the_true_score_is_taken_from_the_matrix_of_its_rivals() -> None:
    # All scores equal; a true score from score_triples would be a hair above and win every tie.
    scorer = TableScorer(torch.full((N, R, N), 0.1))
    triples = random_triples(5, 20)
    assert bool((scorer.score_triples(*torch.from_numpy(triples).T) > 0.1).all())
    counts = rank_triples(scorer, triples, None, split="valid")
    assert counts.metrics()["valid.both.realistic.raw.full.mr"] == (N + 1) / 2


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", SIDES)
def test_a_non_finite_score_is_an_error_that_names_the_query(wrong: float, side: str) -> None:
    table = torch.zeros(N, R, N)
    table[2, 1, 3] = wrong
    triples = np.array([[0, 0, 0], [4, 2, 4], [2, 1, 3]])
    asked = {"tail": "(2, 1, ?)", "head": "(?, 1, 3)", "relation": "(2, ?, 3)"}[side]
    with pytest.raises(NonFiniteError) as caught:
        rank_triples(TableScorer(table), triples, index_of(triples), split="test", tasks=[side])
    assert asked in str(caught.value)
    assert str(wrong) in str(caught.value)
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), NonFiniteError)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_filtered_or_rival_non_finite_score_is_an_error_too(wrong: float) -> None:
    table = torch.zeros(N, R, N)
    table[0, 0, 5] = wrong
    known = index_of(np.array([[0, 0, 1], [0, 0, 5]]))
    with pytest.raises(NonFiniteError, match="candidate 5"):
        rank_triples(TableScorer(table), np.array([[0, 0, 1]]), known, split="test", tasks=["tail"])


def test_huge_finite_scores_whose_sum_overflows_are_fine() -> None:
    table = torch.full((N, R, N), torch.finfo(torch.float32).max)
    counts = rank_triples(TableScorer(table), random_triples(0, 5), None, split="test", tasks=["tail"])
    assert counts.metrics()["test.tail.realistic.raw.full.mr"] == (N + 1) / 2


def test_the_true_answer_is_never_filtered_and_duplicates_count_twice() -> None:
    table = torch.zeros(N, R, N)
    table[0, 0, 1], table[0, 0, 2] = 1.0, 2.0
    triples = np.array([[0, 0, 1], [0, 0, 2], [0, 0, 1]])
    seen: list[Ranks] = []
    counts = rank_triples(
        TableScorer(table), triples, index_of(triples), split="test", tasks=["tail"], on_ranks=seen.append
    )
    assert seen[0].realistic.tolist() == [1, 1, 1]
    assert seen[0].candidates.tolist() == [N - 1] * 3
    assert counts.metrics()["test.tail.realistic.filtered.full.count"] == 3


def test_validation_is_filtered_by_train_and_valid_only_and_test_by_all() -> None:
    assert filter_splits("train") == ("train",)
    assert filter_splits("valid") == ("train", "valid", "support")
    assert filter_splits("test") == ("train", "valid", "test", "support")
    with pytest.raises(ValueError, match="unknown split"):
        filter_splits("dev")


def test_filtering_validation_by_test_would_change_its_metric() -> None:
    """The leak the rule is against: a test answer above the validation answer must count as a rival."""
    splits = {"train": np.array([[0, 0, 1]]), "valid": np.array([[0, 0, 2]]), "test": np.array([[0, 0, 3]])}
    splits["support"] = np.empty((0, 3), dtype=np.int64)
    table = torch.zeros(N, R, N)
    table[0, 0, 1], table[0, 0, 2], table[0, 0, 3] = 3.0, 1.0, 2.0
    rank = {}
    for names in (filter_splits("valid"), filter_splits("test")):
        known = index_of(np.concatenate([splits[name] for name in names]))
        counts = rank_triples(TableScorer(table), splits["valid"], known, split="valid", tasks=["tail"])
        rank[names] = counts.metrics()["valid.tail.realistic.filtered.full.mr"]
    assert rank[filter_splits("valid")] == 2
    assert rank[filter_splits("test")] == 1


def test_an_iterator_of_arrays_is_read_once_and_lazily() -> None:
    triples = random_triples(9, 40)
    scorer, known = random_scorer(1, 2), index_of(triples)
    pulled = []

    def stream() -> Iterator[np.ndarray]:
        for part in np.array_split(triples.astype(np.int32), 4):
            pulled.append(len(part))
            yield part

    ranked: list[int] = []
    counts = rank_triples(
        scorer,
        stream(),
        known,
        split="test",
        tasks=["tail"],
        on_ranks=lambda _: ranked.append(len(pulled)),
    )
    assert ranked == [1, 2, 3, 4]
    assert counts.metrics() == rank_triples(scorer, triples, known, split="test", tasks=["tail"]).metrics()


def test_batches_are_near_equal_so_that_no_leftover_meets_another_kernel() -> None:
    sizes: list[int] = []
    triples = random_triples(0, 130)
    rank_triples(
        random_scorer(0, None),
        triples,
        None,
        split="test",
        tasks=["tail"],
        batch_size=64,
        on_ranks=lambda ranks: sizes.append(len(ranks.triples)),
    )
    assert sum(sizes) == 130
    assert max(sizes) <= 64
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), parts=st.integers(1, 6), levels=st.sampled_from([None, 2]))
def test_shards_merge_in_any_order_to_the_same_bits(seed: int, parts: int, levels: int | None) -> None:
    scorer, triples, train = (
        random_scorer(seed, levels),
        random_triples(seed, 37),
        random_triples(seed + 2, 20),
    )
    known, strata = index_of(np.concatenate([triples, train])), Strata.of(train, N, R)
    whole = rank_triples(scorer, triples, known, split="test", train=strata)
    shards = [rank_triples(scorer, part, known, split="test", train=strata) for part in np.array_split(triples, parts)]
    random.Random(seed).shuffle(shards)
    total = merge(shards)
    assert total.metrics(KINDS) == whole.metrics(KINDS)
    assert total.slices() == whole.slices()
    for again in (Counts.from_json(total.to_json()), pickle.loads(pickle.dumps(total))):
        assert again.metrics(KINDS) == whole.metrics(KINDS)
        assert again.slices() == whole.slices()


def test_misuse_is_told() -> None:
    scorer, triples = random_scorer(0, None), random_triples(0, 3)
    with pytest.raises(ValueError, match="unknown task"):
        rank_triples(scorer, triples, None, split="test", tasks=["tails"])
    with pytest.raises(ValueError, match="filter is of a graph"):
        rank_triples(scorer, triples, FilterIndex.build(triples, N + 1, R), split="test")
    with pytest.raises(ValueError, match="batch_size"):
        rank_triples(scorer, triples, None, split="test", batch_size=0)
    scorer.num_entities = N + 2
    with pytest.raises(ValueError, match="shape"):
        rank_triples(scorer, triples, None, split="test", tasks=["tail"])
