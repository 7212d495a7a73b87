"""What a training will hold in memory and on disk, from counts and configuration alone.

Parameters are counted by making the model on torch's meta device, where nothing is allocated, so that a new slot is in
the estimate the day it is written. Everything else is arithmetic on sizes; what a step keeps for its gradients is the
roughest part of it (see tests/integration/test_preflight_memory.py, which holds the sum against what is used).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from kgray.evaluation.ranking import SCORE_BUDGET
from kgray.graph.config import StoreConfig
from kgray.graph.neighbours import NeighbourIndex
from kgray.machine import resident_memory
from kgray.model.config import GnnConfig, ModelConfig
from kgray.model.fused import FusedModel
from kgray.model.paths import PathModel
from kgray.model.paths_config import PathsConfig
from kgray.model.relations import RelationModel
from kgray.model.relations_config import RelationsConfig
from kgray.model.softmax import KEPT_ON_CPU
from kgray.model.states import ENCODED_AT_ONCE
from kgray.model.towers import Table
from kgray.text.tuning_config import TuningConfig
from kgray.training.config import TrainConfig
from kgray.training.families import TrainableConfig

FLOAT, INDEX = 4, 8


@dataclass(frozen=True)
class Sizes:
    """Counts an estimate is made from.

    triples: by split. text_width: of stored text vectors, 0 without. names: bytes of the entity tables. encoder: bytes
    of the weights of a text encoder that learns, tokens: of all texts; 0 for other models.
    """

    entities: int
    relations: int
    triples: dict[str, int]
    text_width: int = 0
    names: int = 0
    encoder: int = 0
    tokens: int = 0

    @property
    def train(self) -> int:
        return self.triples.get("train", 0)


@dataclass(frozen=True)
class Need:
    """Something that takes memory. knobs: configuration keys that make it smaller."""

    name: str
    bytes: int
    knobs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """memory: of one worker at its peak. checkpoint, artifact: bytes on disk of one of each. shared: bytes that the
    workers of a node have in common. closing: bytes of the one worker that writes the model, at the end."""

    memory: tuple[Need, ...]
    checkpoint: int
    artifact: int
    shared: int = 0
    closing: int = 0

    @property
    def total(self) -> int:
        """Bytes of memory of one worker."""
        return sum(need.bytes for need in self.memory)


def estimate(
    sizes: Sizes,
    model: TrainableConfig,
    train: TrainConfig,
    snapshots: int = 0,
    store: StoreConfig | None = None,
) -> Estimate:
    """What one worker needs to train this. snapshots: weights kept on the way. store: how it reaches the graph; None:
    it holds all of it itself, as models but the fused one do in any case."""
    tables, dense = parameters(sizes, model)
    sparse = isinstance(model, RelationsConfig) or (
        isinstance(model, ModelConfig) and model.objective.kind == "sampled_softmax"
    )
    weights = FLOAT * (tables + dense)
    step, evaluation = _working(sizes, model, train)
    # AdamW keeps two moments of a dense weight, Adagrad one sum of a table's; the gradient of a table that only rows
    # were taken of is rows.
    optimiser = FLOAT * (2 * dense + tables) + FLOAT * (dense + (0 if sparse else tables))
    copies, knobs = weights * (1 + snapshots), _weight_knobs(model)
    shared, closing = 0, 0
    graph = Need("graph, filters, names", _graph(sizes))
    if store is not None and isinstance(model, ModelConfig):
        graph, shared, closing = _reached(sizes, store)
    needs = [
        Need("Python, torch, Ray", resident_memory()),
        graph,
        Need("text", _text(sizes, model), ("text.max_length",)),
        Need("weights", weights, knobs),
        Need("optimisers, gradients", optimiser, knobs),
        Need("best weights, snapshots", copies, (*knobs, "members.snapshots") if snapshots else knobs),
    ]
    closing = closing and closing + sum(need.bytes for need in needs)
    if evaluation > step:
        needs.append(Need("validation", evaluation, _validation_knobs(model)))
    else:
        needs.append(Need("a step", step, _step_knobs(model)))
    checkpoint = weights + FLOAT * (2 * dense + tables) + copies
    states = _states(sizes, model)
    artifact = weights * (1 + snapshots) + states
    return Estimate(tuple(need for need in needs if need.bytes), checkpoint, artifact, shared, closing)


def parameters(sizes: Sizes, model: TrainableConfig) -> tuple[int, int]:
    """How many weights Adagrad moves (tables) and AdamW (all others)."""
    if isinstance(model, TuningConfig):
        return 0, sizes.encoder // FLOAT
    with torch.device("meta"):
        made = _made(sizes, model)
    tables = {id(module.weight): module.weight.numel() for module in made.modules() if isinstance(module, Table)}
    whole = sum(p.numel() for p in made.parameters())
    return sum(tables.values()), whole - sum(tables.values())


def _made(sizes: Sizes, model: ModelConfig | PathsConfig | RelationsConfig) -> nn.Module:
    if isinstance(model, ModelConfig):
        width = sizes.text_width if model.text.kind != "none" else 0
        entity_text = torch.empty((sizes.entities, width), dtype=torch.float16) if width else None
        relation_text = torch.empty((2 * sizes.relations, width), dtype=torch.float16) if width else None
        has_edges = torch.empty(sizes.entities, dtype=torch.bool)
        return FusedModel(model, sizes.relations, has_edges, entity_text, relation_text)
    if isinstance(model, RelationsConfig):
        bodies = model.bodies if model.hops else 0
        text = sizes.text_width if model.text else 0
        return RelationModel(model, sizes.entities, sizes.relations, bodies, text)
    # Nothing in a path model is about entities: a graph of one edge has the same weights.
    with torch.device("cpu"):
        index = NeighbourIndex.build(np.zeros((1, 3), dtype=np.int64), 1, sizes.relations)
        return PathModel(model, index, sizes.relations)


def _graph(sizes: Sizes) -> int:
    """Triples (twice, while columns become rows), message graph with what its sampler keeps, two filter indices."""
    every, train = sum(sizes.triples.values()), sizes.train
    triples = 2 * 3 * INDEX * every
    messages = 2 * 3 * 2 * train * INDEX + 5 * INDEX * sizes.entities
    filters = 2 * 3 * (2 * INDEX + 4) * every
    return triples + messages + filters + 3 * sizes.names


_MAPPED = 100
"""Bytes a triple of a mapped graph with its filters: 97 MiB were measured for a million (benchmarks/resident.py)."""


def _reached(sizes: Sizes, store: StoreConfig) -> tuple[Need, int, int]:
    """What a worker that does not hold the graph itself has of it, what its node maps for all of them, and the whole
    graph, which whoever writes the model loads at the end: all facts are known to it."""
    order = INDEX * sizes.train
    known = 2 * 3 * (2 * INDEX + 4) * sizes.triples.get("valid", 0)
    own = order + known + 5 * INDEX * sizes.entities
    if store.store == "partitioned":
        cache = store.cache_mib << 20
        return Need("graph: order, cache", own + cache, ("graph.cache_mib",)), 4 * sizes.entities, _graph(sizes)
    return Need("graph: order, scratch", own), _MAPPED * sizes.train + 4 * INDEX * sizes.entities, _graph(sizes)


def _text(sizes: Sizes, model: TrainableConfig) -> int:
    """Stored vectors twice: as they are mapped, and as the model holds them. Of an encoder, tokens, and the activations
    of its frozen layers, which are mapped from a file."""
    if isinstance(model, TuningConfig):
        return INDEX * sizes.tokens
    reads = (isinstance(model, ModelConfig) and model.text.kind != "none") or (
        isinstance(model, RelationsConfig) and model.text
    )
    return 2 * 2 * sizes.entities * sizes.text_width if reads else 0


def _working(sizes: Sizes, model: TrainableConfig, train: TrainConfig) -> tuple[int, int]:
    """Bytes at the peak of a step, and of a validation."""
    valid = sizes.triples.get("valid", 0)
    ranked = valid if train.valid_triples is None else min(valid, train.valid_triples)
    # The scores of a batch of queries, and half as much while they are compared.
    scores = 3 * FLOAT * min(SCORE_BUDGET, ranked * sizes.entities) // 2
    if isinstance(model, ModelConfig):
        return _fused_step(sizes, model, train.batch_size), _fused_validation(sizes, model) + scores
    if isinstance(model, PathsConfig):
        return _paths_step(sizes, model, train.batch_size), _paths_step(sizes, model, 1) + scores
    if isinstance(model, RelationsConfig):
        views = 2 + 3 * model.identity + 1 + 3 * (model.text and sizes.text_width > 0)
        row = 4 * views * model.dim + 4 * model.hidden + 6 * sizes.relations + 2 * sizes.text_width
        return FLOAT * train.batch_size * row, scores
    # Some sixteen widths a token and layer are kept for the gradient; texts are short beside a batch's number of them.
    tokens = 4 * train.batch_size * 32
    width = 384
    return FLOAT * tokens * width * 16 * model.layers, scores + FLOAT * sizes.entities * width


def _fused_step(sizes: Sizes, model: ModelConfig, batch: int) -> int:
    queries = 2 * batch
    if model.objective.kind == "one_vs_all":
        own, seeds = 0, sizes.entities
    else:
        own = min(queries, sizes.entities)
        seeds = min(sizes.entities, queries + model.objective.negatives)
    nodes, edges = _neighbourhood(sizes, model.gnn, model.gnn.fanouts, seeds, own)
    width = sizes.text_width if model.text.kind != "none" else 0
    views = 1 if model.structure_alone or not model.late_structure else 2
    vectors = nodes * (2 * width + 6 * model.dim) + edges * 8 * model.dim * max(model.gnn.layers, 1)
    vectors += seeds * 6 * model.dim * views + queries * (6 * model.dim + 3 * model.query_hidden)
    if model.decoder in ("distmult", "complex") and model.objective.loss == "softmax":
        kept = min(queries * seeds, max(KEPT_ON_CPU, 128 * seeds))
    else:
        kept = 5 * queries * seeds * views
    return FLOAT * (vectors + kept)


def _fused_validation(sizes: Sizes, model: ModelConfig) -> int:
    """States of all entities (parts, joined, of several views joined again), and the batch that is encoded."""
    views = 1 if model.structure_alone or not model.late_structure else 2
    states = sizes.entities * model.dim * 2 * views * (2 if views == 1 else 3)
    at_once = min(ENCODED_AT_ONCE, sizes.entities)
    nodes, edges = _neighbourhood(sizes, model.gnn, model.gnn.inference_fanouts, at_once, 0)
    return FLOAT * (states + nodes * 3 * model.dim + edges * 5 * model.dim)


def _neighbourhood(
    sizes: Sizes, gnn: GnnConfig, fanouts: Sequence[int], seeds: int, own: int
) -> tuple[int, int]:
    """Nodes and edges sampled for seeds, ``own`` of which stand in the batch's triples and so have many neighbours."""
    nodes, edges = seeds, 0
    if gnn.kind == "none":
        return nodes, edges
    mean = 2 * sizes.train / max(sizes.entities, 1)
    for fanout in fanouts:
        most = math.inf if fanout == -1 else fanout
        busy = min(most, 4 * mean)  # who is drawn by its triples has more than others
        drawn = int(own * busy + (nodes - own) * min(most, mean))
        drawn = min(drawn, 2 * sizes.train)
        edges += drawn
        own, nodes = min(sizes.entities, own + drawn), min(sizes.entities, nodes + drawn)
    return nodes, edges


def _paths_step(sizes: Sizes, model: PathsConfig, batch: int) -> int:
    """Each hop keeps the edges out of the states that live on; the last hop's answers are all kept."""
    mean = 2 * sizes.train / max(sizes.entities, 1)
    alive, edges = 1.0, 0.0
    for _ in range(model.layers):
        drawn = min(alive * max(mean, 1.0) * 2, 2 * sizes.train)
        edges += drawn
        alive = min(alive + drawn, sizes.entities)
        if model.keep is not None:
            alive = min(alive, model.keep)
    rows = 2 * batch * (edges + min(alive * max(mean, 1.0), sizes.entities))
    return int(FLOAT * rows * (5 * model.dim + 2 * INDEX // FLOAT))


def _states(sizes: Sizes, model: TrainableConfig) -> int:
    """Bytes of what an artifact holds besides weights: states of entities, and the known facts."""
    facts = 3 * (2 * INDEX + 4) * sum(sizes.triples.values()) + sizes.names
    if isinstance(model, ModelConfig):
        views = 1 if model.structure_alone or not model.late_structure else 2
        return facts + 2 * FLOAT * views * sizes.entities * model.dim
    return facts


def _weight_knobs(model: TrainableConfig) -> tuple[str, ...]:
    return ("text.tuning.mode",) if isinstance(model, TuningConfig) else ("model.dim",)


def _step_knobs(model: TrainableConfig) -> tuple[str, ...]:
    if isinstance(model, TuningConfig):
        return ("text.tuning.batch_size",)
    fused = isinstance(model, ModelConfig) and model.gnn.kind != "none"
    return ("train.batch_size", "model.gnn.fanouts", "model.dim") if fused else ("train.batch_size", "model.dim")


def _validation_knobs(model: TrainableConfig) -> tuple[str, ...]:
    fused = isinstance(model, ModelConfig) and model.gnn.kind != "none"
    return ("model.gnn.inference_fanouts", "model.dim") if fused else ("model.dim",)
