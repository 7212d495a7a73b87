"""What the ``evaluate`` and ``ensemble`` sections of a configuration may say."""

from __future__ import annotations

from typing import Literal

from kgray.config import configuration, option
from kgray.errors import ConfigError


@configuration
class SecondLookConfig:
    """A second look at the best candidates of an entity query, by shared words, facts and the members' scores."""

    candidates: int | None = option(None, "Candidates looked at again; null: as many as ensemble.candidates.")
    hidden: int = option(64, "Width of the perceptron that is tried beside a plain sum of features; 0 tries none.")

    def __post_init__(self) -> None:
        if self.candidates is not None and self.candidates < 2:
            raise ConfigError("candidates", self.candidates, "null or at least 2")
        if self.hidden < 0:
            raise ConfigError("hidden", self.hidden, "0 or more")


@configuration
class EnsembleConfig:
    """How several models become one, and its scores probabilities; all of it is fitted on validation triples."""

    second_look: SecondLookConfig | None = option(
        SecondLookConfig, "Whether the best candidates are scored again by features of each; null: never."
    )
    candidates: int = option(100, "Best candidates of each member that the fit looks at, besides the true answer.")
    sampled: int = option(64, "Candidates drawn from the rest, which stand for it in the fit.")
    queries: int = option(10_000, "Validation triples looked at, at most; more are thinned out evenly.")
    folds: int = option(5, "Folds of the cross-validation that chooses the gate and calibrates; at least 2.")
    shrinkage: tuple[float, ...] = option(
        (0.1, 0.3, 1.0),
        "Prior standard deviations tried for the gate's offsets: the smaller, the nearer to one weight for all.",
    )
    alpha: float = option(0.1, "Share of queries whose answer set may miss the true answer; 0.1 covers 90%.")
    group: int = option(200, "Validation queries a relation and direction needs for an own answer-set threshold.")
    seed: int = option(0, "Of folds and samples.")
    score_memory_mb: int = option(128, "MiB of float32 scores a worker holds at once, all members together.")

    def __post_init__(self) -> None:
        for key in ("candidates", "sampled", "queries", "group", "score_memory_mb"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "a positive number")
        look = self.second_look
        if look is not None and look.candidates is not None and look.candidates > self.candidates:
            raise ConfigError("second_look.candidates", look.candidates, f"at most {self.candidates}")
        if self.folds < 2:
            raise ConfigError("folds", self.folds, "2 or more")
        if not self.shrinkage or any(value <= 0 for value in self.shrinkage):
            raise ConfigError("shrinkage", list(self.shrinkage), "at least one number, all above 0")
        if not 0 < self.alpha < 1:
            raise ConfigError("alpha", self.alpha, "a number between 0 and 1")
        if self.seed < 0:
            raise ConfigError("seed", self.seed, "0 or more")


@configuration
class EvaluateConfig:
    """How a model is measured."""

    split: Literal["valid", "test"] = option(
        "test", "Which triples are ranked. valid is filtered by train and valid, test by all three."
    )
    tasks: tuple[Literal["tail", "head", "relation"], ...] = option(
        ("tail", "head", "relation"), "What is asked of each triple; 'both' is the mean over tail and head."
    )
    link_negatives: int = option(
        0,
        "Pairs without a link that each tail and head query is also held against, as many drawn at random as two hops "
        "away: ROC-AUC and average precision, as for social graphs. 0: none.",
    )
    baselines: bool = option(True, "Whether frequency, reverse-edge and marginal baselines are ranked too.")
    ranks: bool = option(True, "Whether ranks.parquet is written, one row a query.")
    ablations: bool = option(False, "Whether text-only and graph-only variants are trained and shown beside the model.")
    workers: int | None = option(
        None, "Ray tasks at a time. Null: the cores of this machine, or the CPUs of the cluster joined."
    )
    batch_size: int | None = option(None, "Queries scored at once. Null: as many as score_memory_mb holds.")
    score_memory_mb: int = option(64, "MiB of float32 scores a worker holds at once.")
    ranged: bool = option(
        False,
        "Whether, where score_memory_mb does not hold 16 rows of all entities, candidates are scored in ranges and "
        "merged exactly. Members of an ensemble are then measured on relation queries alone.",
    )

    def __post_init__(self) -> None:
        if self.ranged and self.link_negatives:
            raise ConfigError("ranged", True, "false where links are held against pairs without one (link_negatives)")
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ConfigError("tasks", list(self.tasks), "at least one of tail, head, relation, each once")
        for key in ("workers", "batch_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(key, value, "null or a positive number")
        if self.score_memory_mb < 1:
            raise ConfigError("score_memory_mb", self.score_memory_mb, "a positive number of MiB")
        if self.link_negatives < 0:
            raise ConfigError("link_negatives", self.link_negatives, "a number of 0 or more")
