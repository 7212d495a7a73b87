"""What the relation classifier is made of."""

from __future__ import annotations

from typing import Literal

from kgray.config import configuration, option
from kgray.errors import ConfigError


@configuration
class RelationsConfig:
    """The relation of a pair, from what stands around its ends and what runs between them."""

    dim: int = option(128, "Width of each view of a pair: its ends' relations, their vectors, the paths, the texts.")
    hidden: int = option(512, "Width of the hidden layer that puts the views together.")
    hops: int = option(3, "Longest path between the two entities that is looked at, 1 to 3; 0 looks at none.")
    bodies: int = option(20_000, "Kinds of paths (sequences of relations) that are told apart, the most telling.")
    text: bool = option(True, "Whether texts are read, where there are any.")
    identity: bool = option(True, "Whether every entity has a vector of its own; without, new entities are no worse.")
    remove: Literal["edge", "pair"] = option(
        "edge",
        "What a pair's features leave out. edge: a training triple itself, both ways; pair: every triple between the "
        "two entities, in training and in answering, right for graphs whose test pairs are never adjacent (FB15k-237).",
    )
    dropout: float = option(0.2, "Dropout of every view and of the hidden layer.")
    drop: float = option(0.3, "Share of entities' own vectors withheld in a step.")

    def __post_init__(self) -> None:
        for key in ("dim", "hidden", "bodies"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "a number of 1 or more")
        if not 0 <= self.hops <= 3:
            raise ConfigError("hops", self.hops, "a number from 0 to 3")
        for key in ("dropout", "drop"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "a number from 0 up to, but not including, 1")
