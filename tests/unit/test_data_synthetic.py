"""Drawn graphs: each triple a function of its number, degrees a power law, tails where relations map their heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kgray.config import from_dict
from kgray.data.config import DataConfig, SyntheticConfig
from kgray.data.synthetic import SyntheticGraph, _power
from kgray.errors import ConfigError

MASK = 2**64 - 1


def graph(triples: int = 20_000, **settings: object) -> SyntheticGraph:
    return SyntheticGraph.sized(triples, from_dict(SyntheticConfig, settings))


def test_a_triple_depends_on_its_number_alone() -> None:
    drawn = graph()
    whole = np.stack(drawn.draw(0, 5000))
    for start, count in ((0, 1), (17, 100), (4999, 1)):
        assert np.array_equal(np.stack(drawn.draw(start, count)), whole[:, start : start + count])
    assert np.array_equal(np.stack(graph(seed=0).draw(0, 5000)), whole)
    assert (np.stack(graph(seed=1).draw(0, 5000)) != whole).any(axis=0).mean() > 0.9


def slow_mix(x: int) -> int:
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & MASK
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def test_equals_plain_python() -> None:
    """The definition once more, a triple at a time; 1.5 is the exponent 4, which a power takes that is exact."""
    drawn = graph(3000, entities=500, relations=7, communities=23, exponent=4.0, noise=0.3, seed=5)
    bits = np.random.Philox(key=5)
    raw = [int(value) for value in bits.random_raw(4 * 300)]
    shares = np.cumsum([1 / (n + 1) for n in range(7)])
    ends = [int(share / shares[-1] * 2.0**53) << 11 for share in shares]
    offsets = [slow_mix((r + slow_mix(5 + 1)) & MASK) % 3 - 1 for r in range(7)]
    offsets[0] = 0
    found = list(zip(*(column.tolist() for column in drawn.draw(0, 300)), strict=True))
    for n in range(300):
        a, b, c, d = ((value >> 11) * 2.0**-53 for value in raw[4 * n : 4 * n + 4])
        head = int(a * float(np.sqrt(a)) * 500)
        relation = next((r for r, end in enumerate(ends) if raw[4 * n + 1] < end), 6)
        place = head % 23
        place = ((-place if relation % 3 == 2 else place) + offsets[relation]) % 23
        inside = [entity for entity in range(500) if entity % 23 == place]
        popular = c * float(np.sqrt(c))
        tail = int(popular * 500) if d < 0.3 else inside[int(popular * len(inside))]
        assert found[n] == (head, relation, tail), n
        assert 0 <= b < 1


@pytest.mark.parametrize("power", [1.0, 1.0625, 1.5, 2.75, 3.0, 20.9375])
def test_power(power: float) -> None:
    values = np.random.default_rng(0).random(1000)
    np.testing.assert_allclose(_power(values, power), values**power, rtol=1e-12)


def test_degrees_follow_the_law() -> None:
    """Hill's estimate of the exponent over the largest degrees of the heads."""
    for exponent in (2.3, 2.5, 3.0):
        drawn = graph(400_000, entities=40_000, exponent=exponent)
        degree = np.sort(np.bincount(drawn.draw(0, 400_000)[0], minlength=40_000))[::-1].astype(float)
        top = degree[:1000]
        assert 1 + 1 / np.log(top / degree[1000]).mean() == pytest.approx(exponent, abs=0.2)


def test_tails_lie_where_relations_map_their_heads() -> None:
    """All but the noise can be told from head and relation, up to the community."""
    drawn = graph(50_000, entities=5000, relations=9, communities=50, noise=0.2)
    heads, relations, tails = drawn.draw(0, 50_000)
    assert np.bincount(relations, minlength=9).argmax() == 0 and len(np.unique(relations)) == 9
    for relation in range(9):
        use = relations == relation
        ring, reached = heads[use] % 50, tails[use] % 50
        turned = (reached + ring if relation % 3 == 2 else reached - ring) % 50
        assert np.bincount(turned, minlength=50).max() / use.sum() == pytest.approx(0.8, abs=0.06)


def test_files_hold_the_same(tmp_path: Path) -> None:
    drawn = graph(3000)
    drawn.write_tsv(str(tmp_path / "t.tsv"), 500, 2500)
    rows = [line.split("\t") for line in (tmp_path / "t.tsv").read_text().splitlines()]
    wanted = [[f"e{h}", f"r{r}", f"e{t}"] for h, r, t in zip(*drawn.draw(500, 2000), strict=True)]
    assert rows == wanted


def test_one_entity_one_relation() -> None:
    heads, relations, tails = graph(10, entities=1, relations=1).draw(0, 10)
    assert not heads.any() and not relations.any() and not tails.any()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"triples": 0}, "triples"),
        ({"triples": -5}, "triples"),
        ({"triples": 2**41}, "triples"),
        ({"synthetic": {"exponent": 2.0}}, "synthetic.exponent"),
        ({"synthetic": {"noise": 1.5}}, "synthetic.noise"),
        ({"synthetic": {"relations": 0}}, "synthetic.relations"),
        ({"synthetic": {"entities": 10, "communities": 11}}, "synthetic.communities"),
        ({"synthetic": {"seed": -1}}, "synthetic.seed"),
        ({"synthetic": {"triples": 3}}, "synthetic.triples"),
        ({"entities": "e.tsv"}, "entities"),
        ({"relations": "r.tsv"}, "relations"),
        ({"columns": {"split": "split"}}, "columns.split"),
        ({"triples": 1.5}, "triples"),
        ({"triples": True}, "triples"),
        ({"triples": 10**14}, "triples"),
    ],
)
def test_mistakes_are_told(settings: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(DataConfig, {"triples": 1000, **settings})
    assert caught.value.key == key and "\n" not in str(caught.value)
