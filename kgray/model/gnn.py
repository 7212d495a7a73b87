"""Graph networks over sampled blocks, H_e = GNN(S, neighbourhood of e).

A message is made of the neighbour's state and the vector of the relation it comes over (the composition of CompGCN,
Vashishth et al. 2020); torch-geometric's convolutions then gather the messages. Because a composed message belongs
to one edge, an edge is handed to the convolution as a source node of its own: that makes every bipartite convolution
relation-aware, with relations as an integer column and not as edge types.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GATv2Conv, GINConv, GraphConv, RGCNConv, SAGEConv, TransformerConv
from torch_geometric.utils import degree, scatter

from kgray.model.config import GnnConfig
from kgray.model.registry import Registry

LayerFactory = Callable[[GnnConfig, int, int], nn.Module]
GNNS: Registry[LayerFactory] = Registry("model.gnn.kind")


@torch.no_grad()
def _mean_scale(target: Tensor, size: int) -> Tensor:
    """(E,) weights 1 / sqrt(in-degree of the target)."""
    return degree(target, size).clamp(min=1).rsqrt()[target]  # type: ignore[no-any-return]


class ComposedConv(nn.Module):
    """A torch-geometric convolution over composed messages.

    conv: takes ((messages, targets), edge_index[, edge_weight]) and gives (targets, d).
    """

    reads_relations = True

    def __init__(self, conv: nn.Module, composition: str, *, normalised: bool = False) -> None:
        super().__init__()
        self.conv = conv
        self.composition = composition
        self.normalised = normalised

    def forward(self, x: Tensor, targets: int, source: Tensor, target: Tensor, relation: Tensor, z: Tensor) -> Tensor:
        # Not x[source]: the gradient of plain indexing is added up in whatever order threads come, and a resumed run
        # would not end with the same bits; an embedding's is added up in order, and faster.
        neighbours, relations = F.embedding(source, x), F.embedding(relation, z)
        messages = compose(self.composition, neighbours, relations)
        edges = torch.stack([torch.arange(len(target), device=target.device), target])
        pair = (messages, x[:targets])
        if self.normalised:
            weight = _mean_scale(target, targets).to(messages.dtype)
            return self.conv(pair, edges, weight)  # type: ignore[no-any-return]
        return self.conv(pair, edges)  # type: ignore[no-any-return]


class CompGcnConv(nn.Module):
    """CompGCN (Vashishth et al. 2020): composed messages, one matrix for those over real relations and one for those
    over reciprocal ones, normalised by the target's degree in the block.

    The paper's third matrix, for the entity itself, is the network's residual connection; relation vectors change from
    layer to layer (:class:`GraphNetwork`), and the decoder has its own.
    """

    reads_relations = True

    def __init__(self, dim: int, num_relations: int, composition: str) -> None:
        super().__init__()
        self.forwards, self.backwards = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.num_real = num_relations // 2
        self.composition = composition

    def forward(self, x: Tensor, targets: int, source: Tensor, target: Tensor, relation: Tensor, z: Tensor) -> Tensor:
        messages = compose(self.composition, F.embedding(source, x), F.embedding(relation, z))
        messages = messages * _mean_scale(target, targets).to(messages.dtype)[:, None]
        # A matrix of a sum is the sum of the matrix's products: gather first, by direction.
        place = target + targets * (relation >= self.num_real)
        real, reciprocal = scatter(messages, place, dim_size=2 * targets).split(targets)
        return self.forwards(real) + self.backwards(reciprocal)  # type: ignore[no-any-return]


def compose(composition: str, neighbours: Tensor, relations: Tensor) -> Tensor:
    """(E, d), (E, d) -> (E, d) messages (Vashishth et al. 2020)."""
    if composition == "multiply":
        return neighbours * relations
    return neighbours - relations if composition == "subtract" else neighbours + relations


class RelationalConv(nn.Module):
    """R-GCN (Schlichtkrull et al. 2018): a matrix a relation, as a mixture of a few bases."""

    reads_relations = False

    def __init__(self, dim: int, num_relations: int) -> None:
        super().__init__()
        self.conv = RGCNConv((dim, dim), dim, num_relations, num_bases=min(8, num_relations))

    def forward(
        self, x: Tensor, targets: int, source: Tensor, target: Tensor, relation: Tensor, z: Tensor | None
    ) -> Tensor:
        return self.conv((x, x[:targets]), torch.stack([source, target]), relation)  # type: ignore[no-any-return]


@GNNS.register("attention")
def _attention(config: GnnConfig, dim: int, num_relations: int) -> nn.Module:
    """Ego-graph attention: dot-product attention of an entity over its composed neighbours (Shi et al. 2021)."""
    conv = TransformerConv(
        (dim, dim), dim // config.heads, heads=config.heads, dropout=config.dropout, root_weight=False
    )
    conv.lin_skip = None  # made by torch-geometric all the same, and never used without the root weight
    return ComposedConv(conv, config.composition)


@GNNS.register("gat")
def _gat(config: GnnConfig, dim: int, num_relations: int) -> nn.Module:
    """GATv2 (Brody et al. 2022)."""
    conv = GATv2Conv((dim, dim), dim // config.heads, heads=config.heads, dropout=config.dropout, add_self_loops=False)
    return ComposedConv(conv, config.composition)


@GNNS.register("sage")
def _sage(config: GnnConfig, dim: int, num_relations: int) -> nn.Module:
    """GraphSAGE, mean of neighbours (Hamilton et al. 2017)."""
    return ComposedConv(SAGEConv((dim, dim), dim, root_weight=False), config.composition)


@GNNS.register("gcn")
def _gcn(config: GnnConfig, dim: int, num_relations: int) -> nn.Module:
    """GCN (Kipf & Welling 2017), normalised by the target's degree in the block."""
    return ComposedConv(GraphConv((dim, dim), dim, aggr="add"), config.composition, normalised=True)


@GNNS.register("gin")
def _gin(config: GnnConfig, dim: int, num_relations: int) -> nn.Module:
    """GIN (Xu et al. 2019): a perceptron over the sum of neighbours."""
    mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
    return ComposedConv(GINConv(mlp), config.composition)


@GNNS.register("rgcn")
def _rgcn(config: GnnConfig, dim: int, num_relations: int) -> nn.Module:
    return RelationalConv(dim, num_relations)


@GNNS.register("compgcn")
def _compgcn(config: GnnConfig, dim: int, num_relations: int) -> nn.Module:
    return CompGcnConv(dim, num_relations, config.composition)


class GraphNetwork(nn.Module):
    """Layers of one convolution kind, each with a residual connection and layer normalisation.

    CompGCN's relation vectors pass through a matrix between two layers; all other kinds read the same in every layer.
    """

    def __init__(self, config: GnnConfig, dim: int, num_relations: int) -> None:
        super().__init__()
        make = GNNS.get(config.kind)
        self.layers = nn.ModuleList(make(config, dim, num_relations) for _ in range(config.layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(config.layers))
        self.dropout = nn.Dropout(config.dropout)
        changes = config.layers - 1 if isinstance(self.layers[0], CompGcnConv) else 0
        self.relation_maps = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(changes))

    @property
    def reads_relations(self) -> bool:
        """Whether messages are made with relation vectors; R-GCN has matrices of its own."""
        return any(layer.reads_relations for layer in self.layers)

    def forward(self, x: Tensor, blocks: list[tuple[int, Tensor, Tensor, Tensor]], z: Tensor | None) -> Tensor:
        """x (n, d) states of the outermost block's nodes -> states of the innermost block's targets.

        blocks: (number of targets, source, target, relation) from the outermost hop inward.
        z: (2R, d) relation vectors, or None where no layer reads them.
        """
        steps = zip(self.layers, self.norms, blocks, strict=True)
        for number, (layer, norm, (targets, source, target, relation)) in enumerate(steps):
            if self.relation_maps and number:
                z = self.relation_maps[number - 1](z)
            x = x[:targets] + self.dropout(norm(layer(x, targets, source, target, relation, z)))
        return x
