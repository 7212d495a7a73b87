"""New entities asked of a whole model: which of its members can answer, and their answers mixed.

Of an ensemble the fused members answer. Rules and paths are grounded on the graph's own facts, and the second look
compares with what the graph says of an anchor: of an entity the graph lacks they know nothing, and are left out. The
gate weighs the others as it weighs them for an entity that training did not see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kgray.artifact import Artifact
from kgray.errors import UserError
from kgray.evaluation.counts import SIDES
from kgray.graph.graph import Graph
from kgray.graph.neighbours import NeighbourIndex
from kgray.model.bundle import Bundle
from kgray.model.ensemble import EnsembleScorer, locate
from kgray.model.fused import States
from kgray.model.gate import Gate, Queries, TrainingFacts, part_of, row_features
from kgray.model.newcomer import FusedNewcomers, Newcomer, Part
from kgray.model.states import StateScorer
from kgray.text.places import EncoderPlace, tuned_place
from kgray.text.same import SameEncoder
from kgray.text.vectors import Half, load_vectors


class NoNewcomersError(UserError):
    """The model cannot answer for this new entity, in words for people."""


@dataclass(frozen=True)
class NewAnswer:
    """scores (C,) float32 of all candidates, the sum of ``addends`` (C,) by member."""

    scores: Tensor
    addends: Mapping[str, Tensor]


class Newcomers:
    """New entities asked of one model artifact. members: its fused models by name; ensemble: None for a single one."""

    def __init__(self, members: Mapping[str, FusedNewcomers], ensemble: EnsembleScorer | None = None) -> None:
        self.members, self.ensemble = dict(members), ensemble

    @classmethod
    def open(cls, artifact: Artifact, bundle: Bundle) -> Newcomers:
        """Of the model ``artifact`` opened as ``bundle``: weights, text vectors and, for deep networks, facts are read.

        Raises ArtifactError where what a member was made from is gone.
        """
        inputs = _Inputs()
        if isinstance(bundle.scorer, EnsembleScorer):
            entries = {entry["name"]: entry for entry in bundle.info["members"]}
            found: dict[str, FusedNewcomers] = {}
            for name, scorer in bundle.scorer.members.items():
                if isinstance(scorer, StateScorer):
                    member = locate(artifact, entries[name])
                    found[name] = inputs.fused(member, Bundle.load(member), scorer)
            return cls(found, bundle.scorer)
        if isinstance(bundle.scorer, StateScorer):
            return cls({"fused": inputs.fused(artifact, bundle, bundle.scorer)})
        return cls({})

    def answer(self, task: str, first: Part, second: Part) -> NewAnswer:
        """Scores of the part that ``task`` asks for; first, second: the given ones in the order head, relation, tail.

        Raises NoNewcomersError where no member knows anything of a new entity, EncoderError where its text cannot be
        read.
        """
        new = [part for part in (first, second) if isinstance(part, Newcomer)]
        asked = {name: one for name, one in self.members.items() if task in one.scorer.tasks}
        if self.members and not asked:
            raise NoNewcomersError(f"this model has no member that tells the {task} of a new entity")
        able = {name: one for name, one in asked.items() if all(map(one.knows, new))}
        if not able:
            raise NoNewcomersError(self._why())
        rows: dict[str, Tensor] = {}
        for name, one in able.items():
            a, b = (_given(one, part) for part in (first, second))
            rows[name] = one.score(task, a, b)
        weights = dict.fromkeys(rows, 1.0) if self.ensemble is None else self._weights(task, first, second, rows)
        addends = {name: rows[name] * weight for name, weight in weights.items()}
        return NewAnswer(torch.stack(list(addends.values())).sum(0), addends)

    def _why(self) -> str:
        if all(one.model.text is None and one.model.gnn is None for one in self.members.values()):
            return "this model has no member that makes an entity of text and facts"
        return "this model reads no text: a new entity needs facts"

    def _weights(self, task: str, first: Part, second: Part, rows: Mapping[str, Tensor]) -> dict[str, float]:
        """Of the members that answer and have a say; of the first alone where none of them has."""
        if self.ensemble is None or task not in self.ensemble.tasks:
            return {next(iter(rows)): 1.0}
        gate, facts = self.ensemble.gates[part_of(task)], self.ensemble.facts
        n, none = facts.num_entities, np.empty(0, dtype=np.int64)
        unseen = np.append(facts.seen, False)
        answers = {side: (none, none.astype(np.int32)) for side in SIDES}
        strangers = TrainingFacts(facts.num_relations, n + 1, facts.cardinality, unseen, answers)
        a, b = (torch.tensor([n if isinstance(part, Newcomer) else part]) for part in (first, second))
        side = torch.tensor([SIDES.index(task)])
        features = _features(gate, rows)
        queries = Queries(side, strangers.levels(task, a, b), strangers.directions(task, a, b), features)
        weights = gate.weights(queries)[0]
        said = {name: float(weights[gate.members.index(name)]) for name in gate.used(task) if name in rows}
        return said or {next(iter(rows)): 1.0}


def _given(member: FusedNewcomers, part: Part) -> int | States:
    return member.states(part) if isinstance(part, Newcomer) else part


def _features(gate: Gate, rows: Mapping[str, Tensor]) -> Tensor | None:
    """(1, M, 3) what the gate reads of the members' scores, of those that do not answer what is usual of them."""
    if gate.features is None or gate.centre is None:
        return None
    usual = gate.centre.reshape(len(gate.members), -1)
    found = [
        row_features(rows[name][None])[0] if name in rows else usual[number] for number, name in enumerate(gate.members)
    ]
    return torch.stack(found)[None]


def _tuned(vectors: Artifact) -> Callable[[], EncoderPlace] | None:
    """Where to find the ``encoder`` artifact that read the texts; None where it was the configured encoder itself."""
    source = next((source for source in vectors.inputs if source.kind == "encoder"), None)
    return None if source is None else lambda: tuned_place(locate(vectors, source.to_dict()))


class _Inputs:
    """What fused models were made from, each read once however many members share it."""

    def __init__(self) -> None:
        self._vectors: dict[str, tuple[SameEncoder, Tensor, Tensor]] = {}
        self._context: dict[str, NeighbourIndex] = {}

    def fused(self, artifact: Artifact, bundle: Bundle, scorer: StateScorer) -> FusedNewcomers:
        inputs = {source.kind: source.to_dict() for source in artifact.inputs}
        read: Callable[[str, str], Half] | None = None
        entities = relations = None
        if "vectors" in inputs:
            encoder, entities, relations = self._text(locate(artifact, inputs["vectors"]))
            read = encoder.entity
        no_edges = torch.zeros(bundle.num_entities, dtype=torch.bool)  # which entities have one comes with the weights
        model = bundle.restore(no_edges, entities, relations)
        context = None
        if model.config.gnn.layers > 1:
            context = self._facts(locate(artifact, inputs["graph"]))
        return FusedNewcomers(model, scorer, read, context)

    def _text(self, artifact: Artifact) -> tuple[SameEncoder, Tensor, Tensor]:
        """A reader of further texts, and the vectors (N, width) and (2R, width) of the graph's own."""
        if artifact.uri not in self._vectors:
            vectors = load_vectors(artifact)
            own = torch.from_numpy(np.array(vectors.entities)), torch.from_numpy(np.array(vectors.relations))
            self._vectors[artifact.uri] = (SameEncoder(vectors.index, _tuned(artifact)), *own)
        return self._vectors[artifact.uri]

    def _facts(self, artifact: Artifact) -> NeighbourIndex:
        if artifact.uri not in self._context:
            self._context[artifact.uri] = Graph.load(artifact).inference_index()
        return self._context[artifact.uri]
