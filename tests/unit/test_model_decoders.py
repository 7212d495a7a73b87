"""Every decoder against its formula written out slowly, through the scorer, to disk and back, and learning.

python3 -m pytest tests/unit/test_model_decoders.py
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_graphs import ENTITIES, ONE_VS_ALL, SMALL, TRAIN, graph, vectors
from torch import Tensor, nn

from kgray.config import description, to_dict
from kgray.errors import ArtifactError, ConfigError
from kgray.evaluation.ranking import rank_triples
from kgray.graph.graph import SPLITS
from kgray.graph.resident import ResidentStore
from kgray.model import decoders as module
from kgray.model.bundle import Bundle, write_bundle
from kgray.model.config import DecodingConfig, GnnConfig, ModelConfig, ObjectiveConfig
from kgray.model.decoders import DECODERS, Decoder, ScaledDecoder, Trilinear
from kgray.model.fusion import FUSIONS
from kgray.model.gnn import GNNS
from kgray.model.objectives import LOSSES, batch_loss
from kgray.model.pairs import PAIRS
from kgray.model.states import StateScorer, encode_all, load_states, scorer_of, write_states
from kgray.training.batches import BatchMaker
from kgray.training.config import OptimiserConfig
from kgray.training.fused_task import build_model
from kgray.training.loop import fit

DIM, SCALE = 8, 0.7
SHAPE = DecodingConfig(hidden=12, layers=2, heads=2, channels=3)
EACH = [(name, SHAPE) for name in DECODERS.names()] + [("transe", replace(SHAPE, norm=1))]


def complexes(v: Tensor) -> list[complex]:
    half = len(v) // 2
    return [complex(a, b) for a, b in zip(v[:half].tolist(), v[half:].tolist(), strict=True)]


def linear(layer: nn.Module, v: list[float]) -> list[float]:
    rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    return [b + sum(w * x for w, x in zip(row, v, strict=True)) for row, b in rows]


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def normed(layer: nn.LayerNorm, v: list[float]) -> list[float]:
    mean = sum(v) / len(v)
    root = math.sqrt(sum((x - mean) ** 2 for x in v) / len(v) + layer.eps)
    return [w * (x - mean) / root + b for x, w, b in zip(v, layer.weight.tolist(), layer.bias.tolist(), strict=True)]


def slow_mlp(net: nn.Module, a: list[float], b: list[float]) -> list[float]:
    v = a + b
    for layer in net.network:
        v = linear(layer, v) if isinstance(layer, nn.Linear) else [gelu(x) for x in v] if isinstance(
            layer, nn.GELU
        ) else v  # fmt: skip
    return v


def slow_lstm(net: nn.Module, a: list[float], b: list[float]) -> list[float]:
    sequence = [a, b]
    for layer in range(net.recurrence.num_layers):
        parts = {k: getattr(net.recurrence, f"{k}_l{layer}") for k in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")}
        of_input = SimpleNamespace(weight=parts["weight_ih"], bias=parts["bias_ih"])
        of_state = SimpleNamespace(weight=parts["weight_hh"], bias=parts["bias_hh"])
        size = net.recurrence.hidden_size
        h, c = [0.0] * size, [0.0] * size
        out = []
        for x in sequence:
            z = [p + q for p, q in zip(linear(of_input, x), linear(of_state, h), strict=True)]
            i, f, g, o = (z[k * size : (k + 1) * size] for k in range(4))
            c = [sigmoid(f[k]) * c[k] + sigmoid(i[k]) * math.tanh(g[k]) for k in range(size)]
            h = [sigmoid(o[k]) * math.tanh(c[k]) for k in range(size)]
            out.append(h)
        sequence = out
    return linear(net.out, sequence[-1])


def slow_transformer(net: nn.Module, a: list[float], b: list[float]) -> list[float]:
    tokens = [
        [x + p for x, p in zip(token, place, strict=True)]
        for token, place in zip([net.token.tolist(), a, b], net.places.tolist(), strict=True)
    ]
    for layer in net.encoder.layers:
        attention = layer.self_attn
        heads, width = attention.num_heads, attention.head_dim
        together = SimpleNamespace(weight=attention.in_proj_weight, bias=attention.in_proj_bias)
        projected = [linear(together, normed(layer.norm1, t)) for t in tokens]
        d = len(tokens[0])
        q, k, v = ([p[s * d : (s + 1) * d] for p in projected] for s in range(3))
        for place, token in enumerate(tokens):
            mixed: list[float] = []
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                dots = [sum(x * y for x, y in zip(q[place][part], kk[part], strict=True)) for kk in k]
                weights = [math.exp(dot / math.sqrt(width)) for dot in dots]
                shares = [w / sum(weights) for w in weights]
                mixed += [sum(s * vv[part][n] for s, vv in zip(shares, v, strict=True)) for n in range(width)]
            tokens = [*tokens]
            tokens[place] = [x + y for x, y in zip(token, linear(attention.out_proj, mixed), strict=True)]
        inner = [[gelu(x) for x in linear(layer.linear1, normed(layer.norm2, t))] for t in tokens]
        tokens = [
            [x + y for x, y in zip(t, linear(layer.linear2, i), strict=True)]
            for t, i in zip(tokens, inner, strict=True)
        ]
    return normed(net.encoder.norm, tokens[0])


def slow_conve(net: nn.Module, a: list[float], b: list[float]) -> list[float]:
    width = len(a) // net.height
    rows = [v[i * width : (i + 1) * width] for v in (a, b) for i in range(net.height)]
    flat = []
    for kernel, bias in zip(net.filters.weight.tolist(), net.filters.bias.tolist(), strict=True):
        for i in range(len(rows)):
            for j in range(width):
                total = bias
                for di in (-1, 0, 1):
                    for dj in (-1, 0, 1):
                        if 0 <= i + di < len(rows) and 0 <= j + dj < width:
                            total += kernel[0][di + 1][dj + 1] * rows[i + di][j + dj]
                flat.append(max(0.0, total))
    return [max(0.0, x) for x in normed(net.norm, linear(net.out, flat))]


SLOW_PAIRS = {"mlp": slow_mlp, "lstm": slow_lstm, "transformer": slow_transformer, "conve": slow_conve}


def slow_score(name: str, decoder: Decoder, h: Tensor, r: Tensor, t: Tensor) -> float:
    """Of (h, r, t) by the formula of the paper."""
    if name in SLOW_PAIRS:
        query = SLOW_PAIRS[name](decoder.of_relation, h.tolist(), r.tolist())
        return sum(a * b for a, b in zip(query, t.tolist(), strict=True))
    if name == "distmult":
        return float(sum(a * b * c for a, b, c in zip(h, r, t, strict=True)))
    if name == "transe":
        gaps = [abs(float(a + b - c)) for a, b, c in zip(h, r, t, strict=True)]
        return -sum(gaps) if decoder.norm == 1 else -math.sqrt(sum(g * g for g in gaps))
    z = list(zip(complexes(h), complexes(r), complexes(t), strict=True))
    if name == "complex":
        return sum((a * b * c.conjugate()).real for a, b, c in z)
    return -sum(abs(a * b / abs(b) - c) for a, b, c in z)


def slow_relation_score(name: str, decoder: Decoder, h: Tensor, r: Tensor, t: Tensor) -> float:
    if name not in SLOW_PAIRS:
        return slow_score(name, decoder, h, r, t)
    query = SLOW_PAIRS[name](decoder.of_tail, h.tolist(), t.tolist())
    return sum(a * b for a, b in zip(query, r.tolist(), strict=True))


def made(name: str, shape: DecodingConfig, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return DECODERS.get(name)(DIM, shape, True).eval().requires_grad_(False)


def test_each_is_tested() -> None:
    assert set(SLOW_PAIRS) == set(PAIRS)
    assert set(SLOW_PAIRS) | {"complex", "distmult", "transe", "rotate"} == set(DECODERS.names())


@pytest.mark.parametrize(("name", "shape"), EACH)
def test_scores_of_two_views_equal_the_formula(
    name: str, shape: DecodingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", 60)  # several chunks
    decoders = [made(name, shape, 0), made(name, shape, 1)]
    heads, tails, relations = torch.randn(7, 2 * DIM), torch.randn(7, 2 * DIM), torch.randn(6, 2 * DIM)
    scales = [SCALE, 0.3]
    scorer = StateScorer(
        heads, tails, relations, [ScaledDecoder(d, torch.tensor(s)) for d, s in zip(decoders, scales, strict=True)]
    )

    def slow(formula, h: int, r: int, t: int) -> float:
        own = (slice(0, DIM), slice(DIM, None))
        return sum(
            s * formula(name, d, heads[h, c], relations[r, c], tails[t, c])
            for s, d, c in zip(scales, decoders, own, strict=True)
        )

    h, r, t = torch.tensor([0, 3, 6]), torch.tensor([0, 2, 1]), torch.tensor([5, 3, 0])
    rows = list(zip(h.tolist(), r.tolist(), t.tolist(), strict=True))
    forward = torch.tensor([[slow(slow_score, a, b, e) for e in range(7)] for a, b, _ in rows])
    backward = torch.tensor([[slow(slow_score, c, b + 3, e) for e in range(7)] for _, b, c in rows])
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(scorer.score_tails(h, r), forward, **close)
    torch.testing.assert_close(scorer.score_heads(r, t), backward, **close)
    both = (forward.gather(1, t[:, None]) + backward.gather(1, h[:, None])).squeeze(1) / 2
    torch.testing.assert_close(scorer.score_triples(h, r, t), both, **close)
    ways = [
        [slow(slow_relation_score, a, k, c) + slow(slow_relation_score, c, k + 3, a) for k in range(3)]
        for a, _, c in rows
    ]
    torch.testing.assert_close(scorer.score_relations(h, t), torch.tensor(ways) / 2, **close)


@pytest.mark.parametrize("name", ["transe", "rotate"])
def test_gradients_of_distances_are_those_of_one_pair_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", 60)
    decoder = made(name, SHAPE)
    q, c, weight = torch.randn(5, DIM), torch.randn(9, DIM), torch.randn(5, 9)
    found = []
    for whole in (True, False):
        ends = q.clone().requires_grad_(), c.clone().requires_grad_()
        if whole:
            scores = decoder.scores(*ends)
        else:
            scores = torch.stack([decoder.pair_scores(ends[0], one.expand(5, -1)) for one in ends[1]], dim=1)
        (scores * weight).sum().backward()  # type: ignore[no-untyped-call]
        found.append([end.grad for end in ends])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["transe", "rotate"])
def test_a_candidate_that_is_the_query_has_a_finite_gradient(name: str) -> None:
    both = torch.ones(2, DIM, requires_grad=True)
    made(name, SHAPE).scores(both, both).sum().backward()  # type: ignore[no-untyped-call]
    assert both.grad is not None and torch.isfinite(both.grad).all()


@pytest.mark.parametrize(("name", "shape"), EACH)
def test_written_states_give_equal_scores(name: str, shape: DecodingConfig, tmp_path: Path) -> None:
    data = graph()
    config = replace(SMALL, decoder=name, decoding=replace(shape, dropout=0.5))
    model = build_model(data, vectors(), config, seed=0)
    scorer = scorer_of(model, data.message_index())
    assert model.training and not any(d.decoder.training for d in scorer.decoders)
    write_bundle(tmp_path, model, scorer, data, [], {})
    bundle = Bundle.load(SimpleNamespace(kind="model", uri="x", version="v", local_path=lambda _: tmp_path))  # type: ignore
    h, r, t = (torch.from_numpy(c.copy()) for c in data.triples["test"].T)
    assert torch.equal(bundle.score_tails(h, r), scorer.score_tails(h, r))
    assert torch.equal(bundle.score_heads(r, t), scorer.score_heads(r, t))
    assert torch.equal(bundle.score_relations(h, t), scorer.score_relations(h, t))
    assert torch.equal(bundle.score_triples(h, r, t), scorer.score_triples(h, r, t))
    assert torch.equal(scorer.score_tails(h, r), scorer.score_tails(h, r)), "dropout is off"
    (tmp_path / "decoders.safetensors").unlink()
    with pytest.raises(ArtifactError, match="train it again"):
        Bundle.load(SimpleNamespace(kind="model", uri="x", version="v", local_path=lambda _: tmp_path))  # type: ignore


@pytest.mark.parametrize("content", [b"torn", None])
def test_damaged_decoders_are_told(tmp_path: Path, content: bytes | None) -> None:
    """A file that is none, and one with the weights of another decoder."""
    scaled = ScaledDecoder(made("mlp", SHAPE), torch.tensor(1.0))
    write_states(tmp_path, StateScorer(torch.randn(4, DIM), torch.randn(4, DIM), torch.randn(2, DIM), [scaled]))
    if content is not None:
        (tmp_path / "decoders.safetensors").write_bytes(content)
    info = {"model": to_dict(ModelConfig(dim=DIM, decoder="lstm", decoding=SHAPE))}
    with pytest.raises(ArtifactError, match=r"decoders\.safetensors does not hold"):
        load_states(SimpleNamespace(uri="x", local_path=lambda _: tmp_path), info)  # type: ignore


def test_states_of_another_width_are_refused(tmp_path: Path) -> None:
    scaled = ScaledDecoder(made("complex", SHAPE), torch.tensor(1.0))
    write_states(tmp_path, StateScorer(torch.randn(4, 6), torch.randn(4, 6), torch.randn(2, 6), [scaled]))
    with pytest.raises(ArtifactError, match="1 x 8 columns"):
        load_states(SimpleNamespace(uri="x", local_path=lambda _: tmp_path), {"model": to_dict(ModelConfig(dim=8))})  # type: ignore


def test_a_scorer_keeps_its_decoder_when_training_goes_on() -> None:
    data = graph()
    model = build_model(data, vectors(), replace(SMALL, decoder="mlp"), seed=0)
    scorer = encode_all(model, data.message_index()).scorer(0.5)
    h, r, _ = (torch.from_numpy(c.copy()) for c in data.triples["test"].T)
    before = scorer.score_tails(h, r)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(scorer.score_tails(h, r), before)


@pytest.mark.parametrize("name", [n for n in DECODERS.names() if not isinstance(made(n, SHAPE), Trilinear)])
def test_n3_is_refused_where_there_is_no_tensor(name: str) -> None:
    objective = ObjectiveConfig(n3=0.1)
    with pytest.raises(ConfigError, match=r"model\.objective\.n3"):
        build_model(graph(), vectors(), replace(SMALL, decoder=name, objective=objective), seed=0)


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_relations_that_were_not_trained_are_not_ranked(name: str) -> None:
    data = graph()
    config = replace(SMALL, decoder=name, objective=replace(SMALL.objective, relation_weight=0.0))
    scorer = scorer_of(build_model(data, vectors(), config, seed=0), data.message_index())
    assert scorer.tasks == ("tail", "head")
    with pytest.raises(ValueError, match="relation_weight"):
        scorer.score_relations(torch.tensor([0]), torch.tensor([1]))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"decoding\.heads"):
        ModelConfig(dim=10, gnn=GnnConfig(kind="none"), decoder="transformer")
    with pytest.raises(ConfigError, match="norm"):
        DecodingConfig(norm=3)


def test_the_options_name_what_there_is() -> None:
    fields = {f"{cls.__name__}.{f.name}": f for cls in (ModelConfig, GnnConfig, ObjectiveConfig)
              for f in cls.__dataclass_fields__.values()}  # fmt: skip
    for key, registry in (
        ("ModelConfig.decoder", DECODERS),
        ("ModelConfig.fusion", FUSIONS),
        ("GnnConfig.kind", GNNS),
        ("ObjectiveConfig.loss", LOSSES),
    ):
        text = description(fields[key]).replace(",", " ").replace(":", " ").replace(".", " ").split()
        assert set(registry.names()) <= set(text), key


@pytest.mark.parametrize("name", DECODERS.names())
def test_each_learns_the_ring(name: str) -> None:
    """Structure and text, no neighbours: places on the ring must be learned through the decoder."""
    model = replace(
        ONE_VS_ALL,
        decoder=name,
        decoding=DecodingConfig(hidden=32, heads=2, channels=4, dropout=0.0),
        gnn=replace(SMALL.gnn, kind="none"),
        dropout=0.0,
    )
    train = replace(TRAIN, epochs=25, evaluate_every=25, optimiser=OptimiserConfig(lr=0.02, table_lr=0.2))
    done = fit(graph(), vectors(), model, train)
    chance = float(np.mean(1 / np.arange(1, ENTITIES + 1)))
    counts = rank_triples(done.scorer, graph().triples["test"], graph().known(SPLITS), split="test")
    found = counts.metrics()["test.both.realistic.filtered.full.mrr"]
    assert found > 2 * chance, f"{found:.3f}, by chance {chance:.3f}"


@pytest.mark.parametrize(("decoder", "fusion"), [*((n, "gated") for n in DECODERS.names()), ("complex", "lstm"),
                                                 ("complex", "cross_attention")])  # fmt: skip
def test_a_step_in_bfloat16_gives_finite_gradients_to_all(decoder: str, fusion: str) -> None:
    data = graph()
    config = replace(SMALL, decoder=decoder, decoding=SHAPE, fusion=fusion)
    model = build_model(data, vectors(), config, seed=0)
    batch = BatchMaker(ResidentStore.of(data), config, 16, seed=3).make(0, 0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = batch_loss(model, batch, config.objective)
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"no loss reaches {name}"
        assert torch.isfinite(parameter.grad.to_dense()).all(), name
