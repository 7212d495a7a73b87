"""Networks that make one vector of two, ``(n, d), (n, d) -> (n, d)``: the decoders that learn how head and relation
become a query."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from kgray.model.config import DecodingConfig


class PerceptronPair(nn.Module):
    """A perceptron over both vectors side by side (ER-MLP, Dong et al. 2014, without the tail)."""

    def __init__(self, dim: int, config: DecodingConfig) -> None:
        super().__init__()
        widths = [2 * dim, *[config.hidden] * config.layers]
        steps: list[nn.Module] = []
        for inner, outer in pairwise(widths):
            steps += [nn.Linear(inner, outer), nn.GELU(), nn.Dropout(config.dropout)]
        self.network = nn.Sequential(*steps, nn.Linear(config.hidden, dim))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.network(torch.cat([first, second], dim=1))  # type: ignore[no-any-return]


class TransformerPair(nn.Module):
    """What a query token has become after self-attention over [query, first, second] (CoKE, Wang et al. 2019; HittER,
    Chen et al. 2021)."""

    def __init__(self, dim: int, config: DecodingConfig) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(dim) * 0.5)
        self.places = nn.Parameter(torch.randn(3, dim) * 0.1)
        layer = nn.TransformerEncoderLayer(
            dim, config.heads, config.hidden, config.dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, config.layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        tokens = torch.stack([self.token.to(first.dtype).expand_as(first), first, second], dim=1) + self.places
        return self.encoder(tokens)[:, 0]  # type: ignore[no-any-return]


class RecurrentPair(nn.Module):
    """The last state of an LSTM (Hochreiter & Schmidhuber 1997) over the sequence first, second, mapped to d."""

    def __init__(self, dim: int, config: DecodingConfig) -> None:
        super().__init__()
        self.recurrence = nn.LSTM(dim, config.hidden, config.layers, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(config.hidden, dim)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        states, _ = self.recurrence(torch.stack([first, second.to(first.dtype)], dim=1))
        return self.out(self.dropout(states[:, -1]))  # type: ignore[no-any-return]


class ConvolutionPair(nn.Module):
    """ConvE (Dettmers et al. 2018): both vectors as images, one above the other, 3 x 3 filters, a linear map.

    Against the paper: a border of zeros, so that any width will do; a layer norm in place of batch norms, whose running
    means would differ between workers; no bias an entity.
    """

    def __init__(self, dim: int, config: DecodingConfig) -> None:
        super().__init__()
        # 200 becomes the paper's 10 x 20.
        self.height = next(h for h in range(math.isqrt(dim // 2), 0, -1) if dim % h == 0)
        self.filters = nn.Conv2d(1, config.channels, 3, padding=1)
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(2 * dim * config.channels, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        shape = (len(first), 1, self.height, -1)
        image = torch.cat([first.reshape(shape), second.reshape(shape)], dim=2)
        maps = self.dropout(torch.relu(self.filters(image)))
        return torch.relu(self.norm(self.out(maps.flatten(1))))


PAIRS: Mapping[str, Callable[[int, DecodingConfig], nn.Module]] = {
    "mlp": PerceptronPair,
    "transformer": TransformerPair,
    "lstm": RecurrentPair,
    "conve": ConvolutionPair,
}
"""By the name of the decoder."""
