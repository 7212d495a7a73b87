"""Where a query (h, r, ?) and a candidate t meet.

``query`` folds head and relation into one vector, and ``scores`` holds it against candidates, so that ranking against
all entities is one matrix operation. Decoders are modules: some have weights, which a stored model keeps. A view of
the states has a decoder of its own. Shapes: heads, relations, tails (n, d), d even.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kgray.model.config import DecodingConfig
from kgray.model.pairs import PAIRS
from kgray.model.registry import Registry

_ELEMENTS = 1 << 22
"""Numbers of one chunk where differences of all queries and candidates must be formed: 16 MiB of float32."""


class Decoder(nn.Module):
    """What every decoder offers.

    inner: the score is the inner product of query and candidate. If not it is a negative distance, for which no
    coordinate of a query may be dropped out or scaled on its own.
    tasks: what it can rank.
    """

    inner = True
    tasks: Sequence[str] = ("tail", "head", "relation")

    def query(self, heads: Tensor, relations: Tensor) -> Tensor:
        """(n, d), (n, d) -> (n, d)."""
        raise NotImplementedError

    def scores(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """(q, d), (u, d) -> (q, u); memory beyond that does not grow with u."""
        return queries @ candidates.T

    def pair_scores(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """(n, d), (n, d) -> (n,): a candidate of its own for every query."""
        return (queries * candidates).sum(dim=1)

    def relation_query(self, heads: Tensor, tails: Tensor) -> Tensor:
        """(n, d), (n, d) -> (n, d): what :meth:`scores` holds against relation vectors as candidates."""
        raise NotImplementedError

    def relation_scores(self, heads: Tensor, tails: Tensor, relations: Tensor) -> Tensor:
        """(n, d), (n, d), (k, d) relation vectors -> (n, k)."""
        return self.scores(self.relation_query(heads, tails), relations)

    def log_scale(self, dim: int) -> float:
        """Log of what scores of states and vectors of order one are multiplied by, to be spread by about one."""
        return -0.5 * math.log(dim)


DecoderFactory = Callable[[int, DecodingConfig, bool], Decoder]
"""From the width d, the options, and whether relations will be trained to be predicted."""

DECODERS: Registry[DecoderFactory] = Registry("model.decoder")


@dataclass(frozen=True)
class ScaledDecoder:
    """A decoder whose scores are multiplied by ``scale`` (a 0-dim tensor), as cheaply as they can be."""

    decoder: Decoder
    scale: Tensor

    def query(self, heads: Tensor, relations: Tensor) -> Tensor:
        """See :meth:`Decoder.query`."""
        query = self.decoder.query(heads, relations)
        return query * self.scale if self.decoder.inner else query

    def scores(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """Of queries of :meth:`query`."""
        scores = self.decoder.scores(queries, candidates)
        return scores if self.decoder.inner else scores * self.scale

    def pair_scores(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """Of queries of :meth:`query`."""
        scores = self.decoder.pair_scores(queries, candidates)
        return scores if self.decoder.inner else scores * self.scale

    def relation_scores(self, heads: Tensor, tails: Tensor, relations: Tensor) -> Tensor:
        """See :meth:`Decoder.relation_scores`."""
        if self.decoder.inner:
            return self.decoder.scores(self.decoder.relation_query(heads, tails) * self.scale, relations)
        return self.decoder.relation_scores(heads, tails, relations) * self.scale


class Trilinear(Decoder):
    """A factorisation of the tensor of triples, which the nuclear 3-norm regularises."""

    def __init__(self, dim: int, config: DecodingConfig, relations: bool) -> None:
        super().__init__()

    def moduli(self, vectors: Tensor) -> Tensor:
        """(n, d) -> (n, k) absolute values the N3 regulariser sums cubes of."""
        raise NotImplementedError


@DECODERS.register("distmult")
class DistMult(Trilinear):
    """<h, r, t> (Yang et al. 2015). Symmetric in head and tail but for the reciprocal relation vectors."""

    def query(self, heads: Tensor, relations: Tensor) -> Tensor:
        return heads * relations

    def relation_query(self, heads: Tensor, tails: Tensor) -> Tensor:
        return heads * tails

    def moduli(self, vectors: Tensor) -> Tensor:
        return vectors.abs()


@DECODERS.register("complex")
class ComplEx(Trilinear):
    """Re<h, r, conj(t)> (Trouillon et al. 2016); the first half of a vector is real, the second imaginary."""

    def query(self, heads: Tensor, relations: Tensor) -> Tensor:
        return _complex_product(heads, relations)

    def relation_query(self, heads: Tensor, tails: Tensor) -> Tensor:
        h_re, h_im = heads.chunk(2, dim=-1)
        t_re, t_im = tails.chunk(2, dim=-1)
        return torch.cat([h_re * t_re + h_im * t_im, h_re * t_im - h_im * t_re], dim=-1)

    def moduli(self, vectors: Tensor) -> Tensor:
        return _moduli(vectors)


@DECODERS.register("transe")
class TransE(Decoder):
    """-||h + r - t|| in the 1- or 2-norm (Bordes et al. 2013); computed in float32."""

    inner = False

    def __init__(self, dim: int, config: DecodingConfig, relations: bool) -> None:
        super().__init__()
        self.norm = config.norm

    def query(self, heads: Tensor, relations: Tensor) -> Tensor:
        return heads + relations

    def scores(self, queries: Tensor, candidates: Tensor) -> Tensor:
        return -torch.cdist(queries.float(), candidates.float(), p=float(self.norm))

    def pair_scores(self, queries: Tensor, candidates: Tensor) -> Tensor:
        return -torch.linalg.vector_norm(queries.float() - candidates.float(), ord=self.norm, dim=1)  # type: ignore[no-any-return]

    def relation_query(self, heads: Tensor, tails: Tensor) -> Tensor:
        return tails - heads

    def log_scale(self, dim: int) -> float:
        # Norms of random vectors are spread by about one whatever the width, sums of absolute values by its root.
        return 0.0 if self.norm == 2 else super().log_scale(dim)


@DECODERS.register("rotate")
class RotatE(Decoder):
    """-sum_i |h_i r_i - t_i| over complex coordinates (Sun et al. 2019); computed in float32.

    A relation turns each coordinate by the angle of its vector's; the vector's moduli do not matter.
    """

    inner = False

    def __init__(self, dim: int, config: DecodingConfig, relations: bool) -> None:
        super().__init__()

    def query(self, heads: Tensor, relations: Tensor) -> Tensor:
        relations = relations.float()
        return _complex_product(heads.float(), relations / _moduli(relations).repeat(1, 2))

    def scores(self, queries: Tensor, candidates: Tensor) -> Tensor:
        return -_in_chunks(_modulus_distances, queries, candidates.float())

    def pair_scores(self, queries: Tensor, candidates: Tensor) -> Tensor:
        return -_moduli(queries - candidates.float()).sum(dim=1)

    def relation_scores(self, heads: Tensor, tails: Tensor, relations: Tensor) -> Tensor:
        both = torch.cat([heads.float(), tails.float()], dim=1)
        return -_in_chunks(self._distances_under, both, relations)

    def _distances_under(self, both: Tensor, relations: Tensor) -> Tensor:
        """(n, 2d) heads and tails side by side, (k, d) relation vectors -> (n, k)."""
        heads, tails = both.chunk(2, dim=1)
        n, k = len(heads), len(relations)
        turned = self.query(heads.repeat_interleave(k, dim=0), relations.repeat(n, 1))
        return _moduli(turned - tails.repeat_interleave(k, dim=0)).sum(dim=1).view(n, k)


class Learned(Decoder):
    """A network makes the query of head and relation; another, of head and tail, that for relations.

    The second is there only if relations are trained to be predicted: without, this decoder cannot rank them. Reading
    a score of (h, ?, t) out of the first network would take a pass through it for every relation.
    """

    def __init__(self, kind: str, dim: int, config: DecodingConfig, relations: bool) -> None:
        super().__init__()
        make = PAIRS[kind]
        self.of_relation = make(dim, config)
        self.of_tail = make(dim, config) if relations else None
        if not relations:
            self.tasks = ("tail", "head")

    def query(self, heads: Tensor, relations: Tensor) -> Tensor:
        return self.of_relation(heads, relations)  # type: ignore[no-any-return]

    def relation_query(self, heads: Tensor, tails: Tensor) -> Tensor:
        if self.of_tail is None:
            raise ValueError("relations were not trained to be predicted (model.objective.relation_weight is 0)")
        return self.of_tail(heads, tails)  # type: ignore[no-any-return]


for _kind in PAIRS:
    DECODERS.register(_kind)(partial(Learned, _kind))


def _complex_product(a: Tensor, b: Tensor) -> Tensor:
    """(n, d) x (n, d) -> (n, d), first halves real, second halves imaginary."""
    a_re, a_im = a.chunk(2, dim=-1)
    b_re, b_im = b.chunk(2, dim=-1)
    return torch.cat([a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re], dim=-1)


def _moduli(vectors: Tensor) -> Tensor:
    """(..., d) -> (..., d / 2), never quite 0, where a modulus has no gradient."""
    real, imaginary = vectors.chunk(2, dim=-1)
    return torch.sqrt(real**2 + imaginary**2 + 1e-12)


def _modulus_distances(queries: Tensor, candidates: Tensor) -> Tensor:
    """(q, d), (u, d) -> (q, u) sums of moduli of the differences."""
    return _moduli(queries[:, None] - candidates[None]).sum(dim=2)


def _in_chunks(distances: Callable[[Tensor, Tensor], Tensor], queries: Tensor, candidates: Tensor) -> Tensor:
    """distances(queries, candidates) by so few candidates at once that memory stays flat; each chunk's differences are
    formed again for the gradient instead of being kept."""
    step = max(1, _ELEMENTS // max(1, queries.numel()))
    parts = torch.split(candidates, step)
    if torch.is_grad_enabled() and (queries.requires_grad or candidates.requires_grad):
        found = [checkpoint(distances, queries, p, use_reentrant=False, preserve_rng_state=False) for p in parts]
    else:
        found = [distances(queries, part) for part in parts]
    return torch.cat(found, dim=1)
