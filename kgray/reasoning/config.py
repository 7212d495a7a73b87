"""What the ``rules`` section of a configuration may say."""

from __future__ import annotations

from kgray.config import configuration, option
from kgray.errors import ConfigError

_COUNTS = ("min_support", "max_rules", "max_constant_rules", "max_candidates", "max_walks", "max_groundings", "top")


@configuration
class RulesConfig:
    """How rules are mined and added up."""

    hops: int = option(3, "Longest path body, 1 to 3 atoms.")
    constants: bool = option(True, "Whether rules that name an entity, r(X, c) <- r'(X, c') and the like, are mined.")
    min_support: int = option(2, "Training facts a rule must predict to be kept.")
    min_confidence: float = option(0.001, "Least confidence of a kept rule.")
    pessimism: float = option(5.0, "Wrong predictions every rule is charged beforehand: support / (body + pessimism).")
    max_rules: int = option(300, "Path rules kept for each relation and number of atoms, the most confident.")
    max_constant_rules: int = option(10_000, "Constant rules kept for each relation and direction, the most confident.")
    max_candidates: int = option(500, "Bodies measured for each relation and number of atoms, the most often seen.")
    max_walks: int = option(1_000_000, "Steps spent on looking for the bodies of a relation around its facts.")
    max_groundings: int = option(10_000, "Walks a body is measured on, from start entities drawn by the seed.")
    top: int = option(5, "Fired rules that count for a candidate, the most confident.")
    seed: int = option(0, "Draws the facts and start entities of what is too large to be counted whole.")

    def __post_init__(self) -> None:
        if not 1 <= self.hops <= 3:
            raise ConfigError("hops", self.hops, "1, 2 or 3")
        for key in _COUNTS:
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "a positive number")
        if not 0 <= self.min_confidence < 1:
            raise ConfigError("min_confidence", self.min_confidence, "a number from 0 up to, but not, 1")
        # Without a charge a rule could be certain, and -log(1 - confidence) infinite.
        if self.pessimism <= 0:
            raise ConfigError("pessimism", self.pessimism, "a positive number")
        if self.seed < 0:
            raise ConfigError("seed", self.seed, "a number from 0 up")
