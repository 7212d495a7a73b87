"""The ensemble: several models as one, each answer the exact sum of what every member says to it.

Beside what every family has (:mod:`kgray.model.bundle`) its artifact holds

config.json       also: ``members`` (name, kind, version, uri), ``gate`` (which one, and why)
gate.safetensors  the gates of entity and of relation queries, and what they know of the training split
rerank*.safetensors  the second look at the best candidates, where one is taken (:mod:`kgray.model.reranking`)
calibration.json  what makes scores probabilities and answer sets (:mod:`kgray.evaluation.calibration`)

The members stay artifacts of their own, inputs of this one, opened where the ensemble is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from kgray.artifact import Artifact
from kgray.errors import ArtifactError, ArtifactNotFoundError
from kgray.evaluation.counts import SIDES
from kgray.model.bundle import Bundle, Scorer
from kgray.model.gate import Gate, Queries, TrainingFacts, part_of, row_features
from kgray.model.reranking import Reranker

GATES = "gate.safetensors"
BELOW = "not among the best"

_CELLS = 1 << 25
"""Scores of members held at once (128 MiB of float32), so that five members need no more memory than one."""


class EnsembleScorer:
    """Implements ``Scorer`` over ``members``. gates: by part ("entity", "relation"), over members that can do it.

    A whole triple is scored by the mean of its two directions, as every family does; so are its addends.
    """

    def __init__(
        self,
        members: Mapping[str, Scorer],
        gates: Mapping[str, Gate],
        facts: TrainingFacts,
        reranker: Reranker | None = None,
    ) -> None:
        self.members = dict(members)
        self.reranker = reranker
        self.gates = dict(gates)
        self.facts = facts
        self.tasks = tuple(task for task in SIDES if part_of(task) in self.gates)

    @property
    def num_entities(self) -> int:
        return self.facts.num_entities

    @property
    def num_relations(self) -> int:
        return self.facts.num_relations

    def score_tails(self, heads: Tensor, relations: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, N)."""
        return self._score("tail", heads, relations)

    def score_heads(self, relations: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, N)."""
        return self._score("head", relations, tails)

    def score_relations(self, heads: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 2 -> (B, R)."""
        return self._score("relation", heads, tails)

    def score_triples(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """(B,) int64 x 3 -> (B,). Costs a row of all entities a triple: weights may depend on whole rows."""
        forward, backward = self.score_tails(heads, relations), self.score_heads(relations, tails)
        return 0.5 * (forward.gather(1, tails[:, None]) + backward.gather(1, heads[:, None])).squeeze(1)

    def rows(self, task: str, first: Tensor, second: Tensor, *, everyone: bool = False) -> dict[str, Tensor]:
        """Raw scores (B, C) of each member that has a say at the task; of every one that can do it if asked.

        first, second (B,): the given parts in the order head, relation, tail.
        """
        names = self.gate(task).members if everyone else self.asked(task)
        return {name: score(self.members[name], task, first, second) for name in names}

    def asked(self, task: str) -> tuple[str, ...]:
        """The members whose scores an answer needs."""
        gate = self.gate(task)
        return gate.members if self.looks_again(task) or gate.features is not None else gate.used(task)

    def looks_again(self, task: str) -> bool:
        """Whether the best candidates of a first ranking are scored again."""
        return self.reranker is not None and task != "relation"

    def weights(self, task: str, first: Tensor, second: Tensor, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(B,) by member with a say: what its raw score is multiplied by. rows: from :meth:`rows`."""
        gate = self.gate(task)
        features = None
        if gate.features is not None:
            features = torch.stack([row_features(rows[name]) for name in gate.members], dim=1)
        return self.weigh(task, first, second, features)

    def weigh(self, task: str, first: Tensor, second: Tensor, features: Tensor | None) -> dict[str, Tensor]:
        """:meth:`weights` from the features (B, M, 3) of the rows of the gate's members, None where it reads none."""
        gate = self.gate(task)
        side = torch.full((len(first),), SIDES.index(task))
        levels, directions = self.facts.levels(task, first, second), self.facts.directions(task, first, second)
        weights = gate.weights(Queries(side, levels, directions, features))
        return {name: weights[:, gate.members.index(name)] for name in gate.used(task)}

    def fuse(self, weights: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> Tensor:
        """The sum of the weighted rows, (B, C)."""
        total: Tensor | None = None
        for name, weight in weights.items():
            addend = rows[name].float() * weight[:, None]
            total = addend if total is None else total.add_(addend)
        if total is None:
            raise ValueError("no member has a say")
        return total

    def finish(self, task: str, first: Tensor, second: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """(B, C) final scores from the rows of :meth:`rows`: mixed, and looked at again where that is done."""
        mixed = self.fuse(self.weights(task, first, second, rows), rows)
        if self.reranker is None or task == "relation":
            return mixed
        return self.reranker.apply(task, first, second, mixed, rows)

    def decompose(self, task: str, first: Tensor, second: Tensor, candidates: Tensor) -> dict[str, Tensor]:
        """What makes up the score of candidates (B, K) of B queries: addends (B, K) by name; they sum to the score.

        Without a second look, what each member adds; one without a say adds nothing and is left out. With it, what
        the first ranking, each member and each feature adds to candidates looked at again; to the others, what each
        member adds and, as "not among the best", how far they were moved down.
        """
        rows = self.rows(task, first, second)
        weights = self.weights(task, first, second, rows)
        parts = {name: rows[name].gather(1, candidates).float() * w[:, None] for name, w in weights.items()}
        if self.reranker is None or task == "relation":
            return parts
        mixed = self.fuse(weights, rows)
        final = self.reranker.apply(task, first, second, mixed, rows).gather(1, candidates)
        picked = self.reranker.pick(task, first, second, mixed)
        again = self.reranker.addends(task, first, second, mixed, rows, picked)
        match = (candidates[:, :, None] == picked.ids[:, None, :]) & picked.valid[:, None, :]
        inside, where = match.any(2), match.byte().argmax(2)
        looked = again.gather(1, where[..., None].expand(-1, -1, again.shape[-1])) * inside[..., None]
        outside = {name: part * ~inside for name, part in parts.items()}
        found = {name: looked[..., i] for i, name in enumerate(self.reranker.names)}
        for name, part in outside.items():
            found[name] = found[name] + part if name in found else part
        found[BELOW] = (final - torch.stack(list(parts.values())).sum(0)) * ~inside
        return found

    def _score(self, task: str, first: Tensor, second: Tensor) -> Tensor:
        width = self.num_relations if task == "relation" else self.num_entities
        step = max(1, _CELLS // (max(width, 1) * len(self.gate(task).members)))
        out = torch.empty(len(first), width)
        for start in range(0, len(first), step):
            part = first[start : start + step], second[start : start + step]
            out[start : start + step] = self.finish(task, *part, self.rows(task, *part))
        return out

    def gate(self, task: str) -> Gate:
        """How members are weighed at a task; ValueError where none can do it."""
        if task not in self.tasks:
            raise ValueError(f"no member of this ensemble answers {task} queries")
        return self.gates[part_of(task)]


def score(scorer: Scorer, task: str, first: Tensor, second: Tensor) -> Tensor:
    """All candidates (B, C) of a task; first and second (B,) are the given parts in the order head, relation, tail."""
    if task == "tail":
        return scorer.score_tails(first, second)
    return scorer.score_heads(first, second) if task == "head" else scorer.score_relations(first, second)


def write_gates(folder: Path, gates: Mapping[str, Gate], facts: TrainingFacts) -> None:
    """Write gate.safetensors."""
    arrays = {f"facts.{name}": value for name, value in facts.to_arrays().items()}
    for part, gate in gates.items():
        arrays |= {f"{part}.{name}": value for name, value in gate.to_arrays().items()}
    save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, folder / GATES)


def load_ensemble(artifact: Artifact, info: Mapping[str, Any]) -> EnsembleScorer:
    """What :func:`write_gates` wrote, with the members opened; ArtifactError where they do not fit together."""
    members = {entry["name"]: open_member(artifact, entry, info["graph"]) for entry in info["members"]}
    arrays = load_file(artifact.local_path("") / GATES)
    facts = TrainingFacts.from_arrays(_below(arrays, "facts"))
    gates = {
        part: Gate.from_arrays(tuple(names), _below(arrays, part)) for part, names in info["gate"]["members"].items()
    }
    for name, member in members.items():
        if (member.num_entities, member.num_relations) != (facts.num_entities, facts.num_relations):
            raise ArtifactError(f"{artifact.uri}: member {name} has another number of entities or relations")
    look = info["gate"].get("second_look")
    reranker = None if look is None else Reranker.load(artifact.local_path(""), look)
    return EnsembleScorer({name: bundle.scorer for name, bundle in members.items()}, gates, facts, reranker)


def open_member(artifact: Artifact, entry: Mapping[str, str], graph_version: str) -> Bundle:
    """A member by what config.json says of it; ArtifactError as :func:`locate`, or when it is of another graph."""
    bundle = Bundle.load(locate(artifact, entry))
    check_graph(entry["name"], bundle, graph_version)
    return bundle


def locate(artifact: Artifact, entry: Mapping[str, str]) -> Artifact:
    """What an artifact was made from, by kind, version and uri: there, or in the same storage where that has moved.

    Raises ArtifactError when it is nowhere or another version.
    """
    uri = entry["uri"].rstrip("/")
    try:
        found = Artifact.load(uri)
    except ArtifactNotFoundError:
        storage = artifact.uri.rstrip("/").rsplit("/", 2)[0]
        found = Artifact.load("/".join([storage, *uri.rsplit("/", 2)[1:]]))
    if found.version != entry["version"]:
        raise ArtifactError(f"{artifact.uri}: {found.uri} is not {entry['kind']} {entry['version']}")
    return found


def check_graph(name: str, bundle: Bundle, graph_version: str) -> None:
    """ArtifactError unless the member was trained on that graph."""
    if bundle.graph_version != graph_version:
        raise ArtifactError(
            f"member {name}: model {bundle.model_version} was trained on graph {bundle.graph_version}, "
            f"not on {graph_version}"
        )


def describe(members: Mapping[str, Artifact], tasks: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """What config.json says of each member."""
    return [{"name": name, **a.source.to_dict(), "tasks": list(tasks[name])} for name, a in members.items()]


def _below(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    beginning = prefix + "."
    return {name.removeprefix(beginning): value for name, value in arrays.items() if name.startswith(beginning)}
