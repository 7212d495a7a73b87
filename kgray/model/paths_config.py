"""What the query-conditioned path model is made of."""

from __future__ import annotations

from typing import Literal

from kgray.config import configuration, option
from kgray.errors import ConfigError


@configuration
class PathsConfig:
    """The path model: messages run from the entity a query names, along every path at once."""

    layers: int = option(5, "Hops a message can run: the longest path that can speak for an answer.")
    dim: int = option(32, "Width of the hidden state of an entity in a query.")
    patterns: int = option(
        4,
        "How many ways of weighing relations a state can choose between as it speaks on (attention); 0: every relation "
        "always counts the same.",
    )
    keep: int | None = option(
        200,
        "Entities a query keeps after each hop, the promising ones by a learned priority; null keeps all that were "
        "reached. Cost grows with it; a small graph needs no pruning.",
    )
    dropout: float = option(0.1, "Dropout of what a hop adds to a state.")
    remove: Literal["edge", "pair"] = option(
        "edge",
        "What a training query may not run over. edge: its own triple, both ways; pair: every triple between its two "
        "entities, right for graphs whose test pairs are never adjacent (FB15k-237).",
    )
    remove_batch: bool = option(
        False, "Whether the triples a step asks for are withheld from all its queries, not each from its own only."
    )
    edge_drop: float = option(0.0, "Share of the training triples withheld from a step's messages, both ways.")

    def __post_init__(self) -> None:
        for key in ("layers", "dim"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "a number of 1 or more")
        if self.patterns < 0:
            raise ConfigError("patterns", self.patterns, "a number of 0 or more")
        if self.keep is not None and self.keep < 1:
            raise ConfigError("keep", self.keep, "a number of 1 or more, or null for all")
        for key in ("dropout", "edge_drop"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "a number from 0 up to, but not including, 1")
