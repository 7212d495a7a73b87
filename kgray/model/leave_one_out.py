"""Which training facts next to the entities of a query carry the fused model's scores: leave-one-out.

The entities a query names are encoded again with each fact next to them left out in turn, its edge and its reciprocal
on every hop, over the very neighbourhood (fan-outs, sampled hubs) their stored states were computed from; what a
candidate's score falls by is the effect of the fact. The candidates' states and all trained weights stay: it says what
the answer hangs on, not what a model trained without the fact would answer.

All variants of a neighbourhood go through the network together, as copies that share no node, each lacking its fact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kgray.graph.graph import Graph
from kgray.graph.neighbours import Int64
from kgray.graph.sampler import Block, NeighbourSampler, step_generator
from kgray.model.bundle import Bundle
from kgray.model.fused import FusedModel, Neighbourhood
from kgray.model.states import ENCODED_AT_ONCE, INFERENCE_SEED, StateScorer, join
from kgray.text.vectors import Vectors

_EDGES = 1 << 16
"""Edges of all copies encoded at once: 64 MiB a tensor of 256 float32."""


class NotExplainableError(ValueError):
    """Facts cannot be left out, in words for people."""


@dataclass(frozen=True)
class Effects:
    """Of F facts next to the query's entities on K candidates.

    facts: (F, 3) int64 head, relation, tail. scores: (K,) float32 of the candidates with all facts. changes: (F, K)
    float32, score with all facts minus score without this one: positive where the fact speaks for the candidate.
    """

    facts: Int64
    scores: Tensor
    changes: Tensor


class LeaveOneOut:
    """Leaves out facts of one fused model.

    model: restored weights, on the CPU. scorer: its stored states. triples: (T, 3) facts messages run over.
    """

    def __init__(self, model: FusedModel, scorer: StateScorer, graph: Graph) -> None:
        if model.gnn is None:
            raise NotExplainableError("the model reads no neighbours (model.gnn.kind is none)")
        self.model = model
        self.scorer = scorer
        self.triples = graph.context
        self.index = graph.inference_index()
        self.fanouts = model.config.gnn.inference_fanouts
        self.sampler = NeighbourSampler(self.index, self.fanouts)

    @classmethod
    def of(cls, bundle: Bundle, graph: Graph, vectors: Vectors | None) -> LeaveOneOut:
        """Restore the fused model of ``bundle``. vectors: those of the artifact its config.json names.

        Raises NotExplainableError where it is of another family or graph, reads no neighbours, or its text vectors
        are not there.
        """
        family = bundle.info.get("family", "fused")
        if family != "fused" or not isinstance(bundle.scorer, StateScorer):
            raise NotExplainableError(f"a model of family {family} encodes no neighbourhoods")
        if graph.version != bundle.graph_version:
            raise NotExplainableError(f"graph {graph.version} is not {bundle.graph_version}, on which it was trained")
        text = bundle.info.get("vectors")
        if text is not None and vectors is None:
            raise NotExplainableError(f"the text vectors {text} it was trained on are not there")
        entity_text = relation_text = None
        if text is not None and vectors is not None:
            entity_text = torch.from_numpy(np.array(vectors.entities))
            relation_text = torch.from_numpy(np.array(vectors.relations))
        has_edges = torch.from_numpy(graph.message_index().degrees > 0)
        return cls(bundle.restore(has_edges, entity_text, relation_text), bundle.scorer, graph)

    def effects(self, task: str, first: int, second: int, candidates: Sequence[int]) -> Effects:
        """Of every fact next to the query's entity, or next to either entity of a relation query, that a message of
        their neighbourhood comes over. first, second: the given parts in the order head, relation, tail."""
        seeds = {"tail": [first], "head": [second]}.get(task, list(dict.fromkeys((first, second))))
        blocks = self._neighbourhood(np.array(seeds))
        facts = self._facts(np.array(seeds), blocks)
        heads, tails = self.encode_without(np.array(seeds), blocks, facts)
        wanted = torch.as_tensor(list(candidates), dtype=torch.int64)
        states = dict(zip(seeds, zip(heads, tails, strict=True), strict=True))
        scores = self._scores(task, first, second, states, wanted)
        return Effects(facts, scores[0], scores[0] - scores[1:])

    @torch.no_grad()
    def encode_without(self, seeds: Int64, blocks: list[Block], facts: Int64) -> tuple[list[Tensor], list[Tensor]]:
        """States of the seeds as heads and as tails, by seed (1 + F, w): with every fact, then without each of
        ``facts`` (F, 3)."""
        keys = np.concatenate([[-1], self._keys(facts)])
        edges = max(1, sum(len(block.source) for block in blocks))
        step = max(1, _EDGES // edges)
        heads, tails = [], []
        for start in range(0, len(keys), step):
            part = keys[start : start + step]
            views = self.model.encode(self._copies(seeds, blocks, part))
            shape = (len(part), len(seeds), -1)
            heads.append(join([states.head for _, states in views]).float().reshape(shape))
            tails.append(join([states.tail for _, states in views]).float().reshape(shape))
        return list(torch.cat(heads).unbind(1)), list(torch.cat(tails).unbind(1))

    def _scores(
        self, task: str, first: int, second: int, states: dict[int, tuple[Tensor, Tensor]], candidates: Tensor
    ) -> Tensor:
        """(1 + F, K) as :class:`StateScorer` scores, with these states of the query's entities."""
        scorer, real = self.scorer, self.scorer.num_relations
        if task == "relation":
            (heads, as_tails), (heads_back, tails) = states[first], states[second]
            forward = scorer.state_relation_scores(heads, tails, scorer.relations[candidates])
            backward = scorer.state_relation_scores(heads_back, as_tails, scorer.relations[candidates + real])
            return (forward + backward) * 0.5
        entity, relation = (first, second) if task == "tail" else (second, first + real)
        heads = states[entity][0]
        vectors = scorer.relations[relation].expand(len(heads), -1)
        return scorer.state_scores(heads, vectors, scorer.tails[candidates])

    def _neighbourhood(self, seeds: Int64) -> list[Block]:
        """The blocks of the seeds as they were drawn when all entities were encoded."""
        if all(fanout == -1 for fanout in self.fanouts):
            return self.sampler.sample(seeds, step_generator(INFERENCE_SEED, 0, 0, 0))
        # What a hub's neighbours are depends on the batch it was encoded in, so that is drawn again.
        parts = []
        for seed in seeds.tolist():
            start = seed // ENCODED_AT_ONCE * ENCODED_AT_ONCE
            batch = np.arange(start, min(start + ENCODED_AT_ONCE, self.index.num_entities))
            drawn = self.sampler.sample(batch, step_generator(INFERENCE_SEED, 0, start, 0))
            parts.append(restrict(drawn, np.array([seed - start])))
        return side_by_side(parts)

    def _facts(self, seeds: Int64, blocks: list[Block]) -> Int64:
        """The facts next to the seeds that some message comes over; the others change nothing."""
        spans = [self.index.triples[self.index.offsets[e] : self.index.offsets[e + 1]] for e in seeds.tolist()]
        facts = np.unique(self.triples[np.concatenate(spans)], axis=0).reshape(-1, 3)
        used = np.concatenate([self._edge_keys(block) for block in blocks])
        found: Int64 = facts[np.isin(self._keys(facts), used)]
        return found

    def _keys(self, facts: Int64) -> Int64:
        """(F,) one number a fact."""
        n, r = self.index.num_entities, self.scorer.num_relations
        keys: Int64 = (facts[:, 0] * r + facts[:, 1]) * n + facts[:, 2]
        return keys

    def _edge_keys(self, block: Block) -> Int64:
        """(E,) the key of the fact each edge of a block stands for, forwards or backwards."""
        r = self.scorer.num_relations
        source, target = block.nodes[block.source], block.nodes[block.target]
        forward = block.relation < r
        columns = (np.where(forward, source, target), block.relation % r, np.where(forward, target, source))
        return self._keys(np.stack(columns, axis=1))

    def _copies(self, seeds: Int64, blocks: list[Block], without: Int64) -> Neighbourhood:
        """One neighbourhood of len(without) copies of the seeds', in each of which one fact (by its key) is lacking."""
        count = len(without)
        place = np.arange(count * len(seeds)).reshape(count, len(seeds))
        hops: list[tuple[int, Tensor, Tensor, Tensor]] = []
        for block in blocks[::-1]:
            fresh = len(block.nodes) - block.num_targets
            # Targets of all copies come first, as the next hop inward wants them.
            added = count * block.num_targets + np.arange(count * fresh).reshape(count, fresh)
            outer = np.concatenate([place, added], axis=1)
            copy, edge = np.nonzero(self._edge_keys(block)[None] != without[:, None])
            source, target = outer[copy, block.source[edge]], place[copy, block.target[edge]]
            ends = torch.from_numpy(source), torch.from_numpy(target), torch.from_numpy(block.relation[edge])
            hops.append((count * block.num_targets, *ends))
            place = outer
        nodes = np.empty(place.size, dtype=np.int64)
        nodes[place] = blocks[0].nodes
        return Neighbourhood(torch.from_numpy(nodes), hops[::-1])


def restrict(blocks: list[Block], seeds: Int64) -> list[Block]:
    """What of ``blocks`` (outermost hop first) the seeds at the given positions need."""
    found = []
    wanted = seeds
    for block in blocks[::-1]:
        local = np.full(len(block.nodes), -1, dtype=np.int64)
        local[wanted] = np.arange(len(wanted))
        edges = np.flatnonzero(local[block.target] >= 0)
        source = block.source[edges]
        fresh = np.unique(source[local[source] < 0])
        local[fresh] = np.arange(len(wanted), len(wanted) + len(fresh))
        nodes = np.concatenate([wanted, fresh])
        target = local[block.target[edges]]
        found.append(Block(block.nodes[nodes], len(wanted), local[source], target, block.relation[edges]))
        wanted = nodes
    return found[::-1]


def side_by_side(parts: Sequence[list[Block]]) -> list[Block]:
    """Neighbourhoods of different seeds as one, no node shared between them."""
    if len(parts) == 1:
        return parts[0]
    found = []
    places = _offsets([part[-1].num_targets for part in parts])
    for hop in range(1, len(parts[0]) + 1):
        blocks = [part[-hop] for part in parts]
        targets = sum(block.num_targets for block in blocks)
        fresh = [block.nodes[block.num_targets :] for block in blocks]
        added = [targets + extra for extra in _offsets([len(nodes) for nodes in fresh])]
        outer = [np.concatenate(pair) for pair in zip(places, added, strict=True)]
        found.append(
            Block(
                np.concatenate([_targets(blocks, places), *fresh]),
                targets,
                np.concatenate([place[block.source] for place, block in zip(outer, blocks, strict=True)]),
                np.concatenate([place[block.target] for place, block in zip(places, blocks, strict=True)]),
                np.concatenate([block.relation for block in blocks]),
            )
        )
        places = outer
    return found[::-1]


def _targets(blocks: Sequence[Block], places: Sequence[Int64]) -> Int64:
    """The targets of all blocks in the order their places say."""
    nodes = np.empty(sum(len(place) for place in places), dtype=np.int64)
    for block, place in zip(blocks, places, strict=True):
        nodes[place] = block.nodes[: block.num_targets]
    return nodes


def _offsets(sizes: Sequence[int]) -> list[Int64]:
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end) for size, end in zip(sizes, ends.tolist(), strict=True)]
