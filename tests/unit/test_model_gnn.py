"""Every graph network and fusion against loops over nodes and edges.

python3 -m pytest tests/unit/test_model_gnn.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from model_graphs import RELATIONS, SMALL, graph, vectors
from torch import Tensor, nn

from kgray.model.config import GnnConfig
from kgray.model.fusion import FUSIONS
from kgray.model.gnn import GNNS, GraphNetwork
from kgray.training.fused_task import build_model

DIM, HEADS, NODES, TARGETS = 8, 2, 6, 3
# The last target has no neighbour; one edge is there twice, over a relation and its reciprocal.
EDGES = [(3, 0, 0), (4, 0, 1), (4, 0, 4), (5, 1, 2), (1, 1, 5), (0, 1, 0)]
COMPOSED = {"multiply": torch.mul, "subtract": torch.sub, "add": torch.add}
Messages = list[list[tuple[Tensor, int, int]]]
"""By target: message, source, relation."""


def attention(conv: nn.Module, x: Tensor, messages: Messages) -> Tensor:
    c = conv.conv
    rows = []
    for i, own in enumerate(messages):
        query = c.lin_query(x[i]).view(HEADS, -1)
        dots = [(query * c.lin_key(m).view(HEADS, -1)).sum(1) / (DIM // HEADS) ** 0.5 for m, _, _ in own]
        rows.append(mixed(dots, [c.lin_value(m).view(HEADS, -1) for m, _, _ in own]))
    return torch.stack(rows)


def gat(conv: nn.Module, x: Tensor, messages: Messages) -> Tensor:
    c = conv.conv
    rows = []
    for i, own in enumerate(messages):
        target = c.lin_r(x[i]).view(HEADS, -1)
        values = [c.lin_l(m).view(HEADS, -1) for m, _, _ in own]
        rows.append(mixed([(F.leaky_relu(v + target, 0.2) * c.att[0]).sum(1) for v in values], values) + c.bias)
    return torch.stack(rows)


def mixed(dots: list[Tensor], values: list[Tensor]) -> Tensor:
    """Attention a head; zeros where there is nothing to attend to."""
    if not values:
        return torch.zeros(DIM)
    shares = torch.stack(dots).softmax(0)
    return sum((s[:, None] * v for s, v in zip(shares, values, strict=True)), torch.zeros(())).reshape(-1)


def sage(conv: nn.Module, x: Tensor, messages: Messages) -> Tensor:
    means = [sum((m for m, _, _ in own), torch.zeros(DIM)) / max(1, len(own)) for own in messages]
    return torch.stack([conv.conv.lin_l(mean) for mean in means])


def gcn(conv: nn.Module, x: Tensor, messages: Messages) -> Tensor:
    c = conv.conv
    sums = [sum((m for m, _, _ in own), torch.zeros(DIM)) / max(1, len(own)) ** 0.5 for own in messages]
    return torch.stack([c.lin_rel(s) + c.lin_root(x[i]) for i, s in enumerate(sums)])


def gin(conv: nn.Module, x: Tensor, messages: Messages) -> Tensor:
    return torch.stack([conv.conv.nn(sum((m for m, _, _ in own), x[i])) for i, own in enumerate(messages)])


def rgcn(conv: nn.Module, x: Tensor, messages: Messages) -> Tensor:
    c = conv.conv
    rows = []
    for i, own in enumerate(messages):
        row = x[i] @ c.root + c.bias
        for relation in {r for _, _, r in own}:
            sources = [x[s] for _, s, r in own if r == relation]
            matrix = sum((w * basis for w, basis in zip(c.comp[relation], c.weight, strict=True)), torch.zeros(()))
            row = row + sum(sources, torch.zeros(DIM)) / len(sources) @ matrix
        rows.append(row)
    return torch.stack(rows)


def compgcn(conv: nn.Module, x: Tensor, messages: Messages) -> Tensor:
    rows = []
    for own in messages:
        row = torch.zeros(DIM)
        for m, _, relation in own:
            matrix = (conv.forwards if relation < RELATIONS else conv.backwards).weight
            row = row + matrix @ m / len(own) ** 0.5
        rows.append(row)
    return torch.stack(rows)


SLOW: dict[str, Callable[[nn.Module, Tensor, Messages], Tensor]] = {
    f.__name__: f for f in (attention, gat, sage, gcn, gin, rgcn, compgcn)
}


def test_every_kind_is_tested() -> None:
    assert sorted(SLOW) == GNNS.names()


@pytest.mark.parametrize("composition", sorted(COMPOSED))
@pytest.mark.parametrize("kind", sorted(SLOW))
def test_two_layers_equal_loops_over_edges(kind: str, composition: str) -> None:
    torch.manual_seed(0)
    config = GnnConfig(
        kind=kind, composition=composition, heads=HEADS, fanouts=(9, 9), inference_fanouts=(9, 9)  # type: ignore[arg-type]
    )  # fmt: skip
    network = GraphNetwork(config, DIM, 2 * RELATIONS).eval()
    with torch.no_grad():  # biases start at zero, and a test with zeros sees none
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    outer = [*EDGES, (4, 3, 5), (7, 5, 0), (6, 4, 1)]
    blocks = [block(outer, NODES), block(EDGES, TARGETS)]
    x, z = torch.randn(NODES + 2, DIM), torch.randn(2 * RELATIONS, DIM)
    want, relations = x, z
    for number, (layer, norm, (targets, *_), edges) in enumerate(
        zip(network.layers, network.norms, blocks, [outer, EDGES], strict=True)
    ):
        if kind == "compgcn" and number:
            relations = torch.stack([network.relation_maps[number - 1].weight @ row for row in relations])
        messages: Messages = [
            [(COMPOSED[composition](want[s], relations[r]), s, r) for s, t, r in edges if t == i]
            for i in range(targets)
        ]
        want = want[:targets] + norm(SLOW[kind](layer, want, messages))
    torch.testing.assert_close(network(x, blocks, z), want, rtol=1e-4, atol=1e-5)


def block(edges: list[tuple[int, int, int]], targets: int) -> tuple[int, Tensor, Tensor, Tensor]:
    source, target, relation = torch.tensor(edges).T
    return targets, source, target, relation


# --- fusions ------------------------------------------------------------------------------------------------------


def slow_cross_attention(fusion: nn.Module, text: Tensor, structure: Tensor | None) -> Tensor:
    """One entity's (d,) vectors; None: no structural one."""
    tokens = [text] if structure is None else [text, structure]
    c = fusion.attention
    q, k, v = (
        [c.in_proj_weight[s * DIM : (s + 1) * DIM] @ (t + kind) + c.in_proj_bias[s * DIM : (s + 1) * DIM]
         for t, kind in zip(tokens, fusion.kinds, strict=False)]
        for s in range(3)
    )  # fmt: skip
    heads, out = c.num_heads, []
    for place, token in enumerate(tokens):
        dots = [(q[place] * key).view(heads, -1).sum(1) / (DIM // heads) ** 0.5 for key in k]
        seen = mixed(dots, [value.view(heads, -1) for value in v])
        out.append(token + c.out_proj(seen))
    return sum(out, torch.zeros(DIM)) / len(out)


def slow_lstm(fusion: nn.Module, text: Tensor, structure: Tensor | None) -> Tensor:
    hidden, memory = torch.zeros(DIM), torch.zeros(DIM)
    for step in [text] if structure is None else [structure, text]:
        c = fusion.cell
        gates = c.weight_ih @ step + c.bias_ih + c.weight_hh @ hidden + c.bias_hh
        i, f, g, o = gates.chunk(4)
        memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * memory.tanh()
    return text + hidden


@pytest.mark.parametrize(("name", "slow"), [("cross_attention", slow_cross_attention), ("lstm", slow_lstm)])
def test_fusions_equal_loops_over_entities(name: str, slow: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    fusion = FUSIONS.get(name)(DIM)
    text, structure = torch.randn(2, 5, DIM)
    has = torch.tensor([True, False, True, False, False])[:, None]
    want = [slow(fusion, t, s if there else None) for t, s, there in zip(text, structure, has, strict=True)]
    torch.testing.assert_close(fusion(text, structure * has, has), torch.stack(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in FUSIONS.names() if n != "late"])
def test_gradients_reach_both_sides_and_only_those_that_are_there(name: str) -> None:
    torch.manual_seed(0)
    fusion = FUSIONS.get(name)(DIM)
    text, structure = (torch.randn(4, DIM, requires_grad=True) for _ in range(2))
    has = torch.tensor([True, False, True, False])[:, None]
    fused = fusion(text, structure * has, has)
    (fused * torch.randn_like(fused)).sum().backward()
    assert torch.isfinite(fused).all() and text.grad is not None and structure.grad is not None
    assert (text.grad.abs().sum(1) > 0).all()
    assert (structure.grad.abs().sum(1) > 0).tolist() == has.squeeze(1).tolist()


def test_the_width_of_odd_multiples_of_two_fits_every_fusion() -> None:
    for name in FUSIONS.names():
        fused = FUSIONS.get(name)(6)(torch.randn(2, 6), torch.randn(2, 6), torch.ones(2, 1, dtype=torch.bool))
        assert fused.shape == (2, 6)


def test_all_slots_of_a_model_are_the_ones_tested_here() -> None:
    model = build_model(graph(), vectors(), SMALL, seed=0)
    assert isinstance(model.gnn, GraphNetwork) and isinstance(model.fusion, FUSIONS.get(SMALL.fusion))
