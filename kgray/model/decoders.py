"""Where a query (h, r, ?) and a candidate t meet.

Both decoders are bilinear: ``query`` folds head and relation into one vector whose inner product with a candidate
is the score, so that ranking against all entities is one matrix product, and the score of a triple, of all tails
and of all relations come from the same algebra. Shapes: heads, relations, tails (n, d), d even.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kgray.model.registry import Registry


class Decoder(Protocol):
    """What every decoder offers."""

    def query(self, heads: Tensor, relations: Tensor) -> Tensor:
        """(n, d), (n, d) -> (n, d): inner product with a tail is the score."""

    def relation_query(self, heads: Tensor, tails: Tensor) -> Tensor:
        """(n, d), (n, d) -> (n, d): inner product with a relation vector is the score."""

    def moduli(self, vectors: Tensor) -> Tensor:
        """(n, d) -> (n, k) absolute values the N3 regulariser sums cubes of."""


DECODERS: Registry[type[Decoder]] = Registry("model.decoder")


@DECODERS.register("distmult")
class DistMult:
    """<h, r, t> (Yang et al. 2015). Symmetric in head and tail but for the reciprocal relation vectors."""

    def query(self, heads: Tensor, relations: Tensor) -> Tensor:
        return heads * relations

    def relation_query(self, heads: Tensor, tails: Tensor) -> Tensor:
        return heads * tails

    def moduli(self, vectors: Tensor) -> Tensor:
        return vectors.abs()


@DECODERS.register("complex")
class ComplEx:
    """Re<h, r, conj(t)> (Trouillon et al. 2016); the first half of a vector is real, the second imaginary."""

    def query(self, heads: Tensor, relations: Tensor) -> Tensor:
        h_re, h_im = heads.chunk(2, dim=-1)
        r_re, r_im = relations.chunk(2, dim=-1)
        return torch.cat([h_re * r_re - h_im * r_im, h_re * r_im + h_im * r_re], dim=-1)

    def relation_query(self, heads: Tensor, tails: Tensor) -> Tensor:
        h_re, h_im = heads.chunk(2, dim=-1)
        t_re, t_im = tails.chunk(2, dim=-1)
        return torch.cat([h_re * t_re + h_im * t_im, h_re * t_im - h_im * t_re], dim=-1)

    def moduli(self, vectors: Tensor) -> Tensor:
        real, imaginary = vectors.chunk(2, dim=-1)
        return torch.sqrt(real**2 + imaginary**2 + 1e-12)
