"""What can be said of a candidate answer beside the scores of the models: facts it is in, and words it shares.

Every feature is of the pair (anchor of the query, candidate) under the query's relation, counted from training facts
and texts alone. They are cheap, so they are computed only for the candidates a first ranking leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kgray.graph.filter_index import FilterIndex
from kgray.graph.graph import Graph
from kgray.model.bags import Bags, Float32, Int64, TextBags, overlap

_MOST_NEIGHBOURS = 128

FACTS = (
    "degree of the candidate",
    "answers the candidate is to this relation",
    "facts of this relation the candidate begins",
    "edges between anchor and candidate",
    "neighbours in common",
    "rare neighbours in common",
)
WORDS = (
    "same name",
    "letters of the names in common",
    "candidate's name in the anchor's text",
    "candidate's name early in the anchor's text",
    "anchor's name in the candidate's text",
    "anchor's name early in the candidate's text",
    "words of the texts in common",
)


@dataclass(frozen=True)
class CandidateFeatures:
    """Features of pairs over one graph.

    facts: what is known when a question is asked (``Graph.context``). neighbours: bags of entities adjacent there, rare
    ones weighing more. texts: None where no entity has a name of its own or a description.
    """

    facts: FilterIndex
    neighbours: Bags
    texts: TextBags | None

    @classmethod
    def of(cls, graph: Graph, names: Sequence[str], descriptions: Sequence[str]) -> CandidateFeatures:
        """From a graph's known facts and the texts of its N entities, empty where there are none."""
        known = FilterIndex.build(graph.context, graph.num_entities, graph.num_relations)
        texts = TextBags.build(names, descriptions) if any(names) or any(descriptions) else None
        return cls(known, _neighbour_bags(graph.context, graph.num_entities), texts)

    @property
    def names(self) -> tuple[str, ...]:
        """What each column means."""
        return FACTS if self.texts is None else FACTS + WORDS

    def __call__(self, anchors: Int64, relations: Int64, candidates: Int64, *, tails: bool) -> Float32:
        """(B,) anchors and real relations, (B, K) candidates -> (B, K, len(names)) float32.

        tails: the candidates are tails and the anchors heads; otherwise the other way round.
        """
        columns = self._facts(anchors, relations, candidates, tails=tails)
        if self.texts is not None:
            columns += self._words(self.texts, anchors, candidates)
        return np.stack(columns, axis=-1)

    def _facts(self, anchors: Int64, relations: Int64, candidates: Int64, *, tails: bool) -> list[Float32]:
        facts, shape = self.facts, candidates.shape
        flat = candidates.reshape(-1)
        wide = np.repeat(relations, shape[1])
        begun = facts.by_head_relation.spans(flat * facts.num_relations + wide)[1]
        ended = facts.by_relation_tail.spans(wide * facts.num_entities + flat)[1]
        answers, others = (ended, begun) if tails else (begun, ended)
        source = np.repeat(anchors, shape[1])
        n = facts.num_entities
        edges = facts.by_head_tail.spans(source * n + flat)[1] + facts.by_head_tail.spans(flat * n + source)[1]
        bags = self.neighbours
        degree = bags.offsets[flat + 1] - bags.offsets[flat]
        # Hubs are cut to their rarest neighbours' end of the list by entity id: a sample, the same every time.
        common = overlap(self._even_neighbours, anchors, bags, candidates, most=_MOST_NEIGHBOURS)
        rare = overlap(bags, anchors, bags, candidates, most=_MOST_NEIGHBOURS)
        counts = [np.log1p(x).astype(np.float32).reshape(shape) for x in (degree, answers, others, edges)]
        return [*counts, np.log1p(common).astype(np.float32), rare]

    @cached_property
    def _even_neighbours(self) -> Bags:
        """Every neighbour counting one."""
        bags = self.neighbours
        return Bags(bags.offsets, bags.items, bags.values, np.ones_like(bags.weights))

    @cached_property
    def _whole(self) -> tuple[Bags, Float32, Float32, Float32]:
        """The words of texts wherever they stand, and the weights of whole names, of their letters, of texts. A bag
        of no weight shares nothing with anyone."""
        if self.texts is None:
            raise ValueError("there are no texts")
        bags = self.texts.texts
        even = Bags(bags.offsets, bags.items, np.ones_like(bags.values), bags.weights)
        totals = (np.maximum(b.totals(), 1e-6) for b in (self.texts.names, self.texts.grams, bags))
        return (even, *totals)  # type: ignore[return-value]  # three totals

    def _words(self, bags: TextBags, anchors: Int64, candidates: Int64) -> list[Float32]:
        even, name, gram, text = self._whole
        grams = overlap(bags.grams, anchors, bags.grams, candidates)
        alike = grams / (gram[anchors][:, None] + gram[candidates] - grams)
        own, theirs = name[anchors][:, None], name[candidates]
        said = overlap(even, anchors, bags.names, candidates) / theirs
        early = overlap(bags.texts, anchors, bags.names, candidates) / theirs
        says = overlap(bags.names, anchors, even, candidates) / own
        says_early = overlap(bags.names, anchors, bags.texts, candidates) / own
        shorter = np.minimum(text[anchors][:, None], text[candidates])
        shared = overlap(even, anchors, even, candidates) / shorter
        same = (alike > 0.999).astype(np.float32)
        columns: list[NDArray[Any]] = [same, alike, said, early, says, says_early, shared]
        return [column.astype(np.float32) for column in columns]

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Flat arrays, what :meth:`from_arrays` takes."""
        arrays: dict[str, NDArray[Any]] = {f"facts.{k}": v for k, v in self.facts.to_arrays().items()}
        arrays |= self.neighbours.to_arrays("neighbours")
        return arrays if self.texts is None else arrays | self.texts.to_arrays()

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> CandidateFeatures:
        """What :meth:`to_arrays` gave; arrays are used as they are."""
        facts = {k.removeprefix("facts."): v for k, v in arrays.items() if k.startswith("facts.")}
        texts = TextBags.from_arrays(arrays) if "names.offsets" in arrays else None
        return cls(FilterIndex.from_arrays(facts), Bags.from_arrays("neighbours", arrays), texts)


def _neighbour_bags(facts: Int64, num_entities: int) -> Bags:
    """Distinct entities adjacent in the facts; a neighbour of degree d weighs 1 / log(1 + d) (Adamic & Adar 2003)."""
    rows = np.concatenate([facts[:, 0], facts[:, 2]])
    items = np.concatenate([facts[:, 2], facts[:, 0]])
    degree = np.bincount(rows, minlength=num_entities)
    weights = (1.0 / np.log(2.0 + degree)).astype(np.float32)
    return Bags.build(rows, items, np.ones(len(rows), dtype=np.float32), num_entities, weights)
