"""What sets one training apart from the plain one of the same configuration. Cheap to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kgray.artifact import Artifact
from kgray.config import to_dict
from kgray.training.config import PseudoConfig


class Variation(Protocol):
    """sources: the artifacts it reads besides. told: what it adds to the recipe."""

    @property
    def sources(self) -> Sequence[Artifact]: ...
    @property
    def told(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Lesson:
    """Pseudo-labels to train on besides the training triples: a ``model`` artifact, and what it is asked."""

    teacher: Artifact
    pseudo: PseudoConfig

    @property
    def sources(self) -> Sequence[Artifact]:
        return (self.teacher,)

    @property
    def told(self) -> Mapping[str, Any]:
        return {"pseudo": to_dict(self.pseudo)}


@dataclass(frozen=True)
class Cycles:
    """A learning rate that falls and rises anew so many times, the weights at the end of each fall but the last kept
    (Huang et al. 2017, "Snapshot Ensembles: Train 1, Get M for Free")."""

    kept: int

    @property
    def sources(self) -> Sequence[Artifact]:
        return ()

    @property
    def told(self) -> Mapping[str, Any]:
        return {"snapshots": self.kept}


@dataclass(frozen=True)
class Snapshot:
    """No training: the weights that another one, with :class:`Cycles`, kept. number: from 1."""

    training: Artifact
    number: int

    @property
    def sources(self) -> Sequence[Artifact]:
        return (self.training,)

    @property
    def told(self) -> Mapping[str, Any]:
        return {"snapshot": self.number}

    @property
    def file(self) -> str:
        return snapshot_file(self.number)


def snapshot_file(number: int) -> str:
    """Where in a ``model`` artifact the weights of a snapshot lie."""
    return f"snapshot-{number}.safetensors"
