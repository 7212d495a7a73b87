"""How the model is trained."""

from __future__ import annotations

from typing import Literal

from kgray.config import configuration, option
from kgray.errors import ConfigError


@configuration
class OptimiserConfig:
    """AdamW for the dense weights, Adagrad for the structural table (and for relations where it stands alone)."""

    lr: float = option(1e-3, "Peak learning rate of the dense weights.")
    table_lr: float = option(0.05, "Peak learning rate of the structural table (Adagrad).")
    weight_decay: float = option(0.01, "Decoupled weight decay of the dense weights.")
    warmup: float = option(0.05, "Share of all steps over which learning rates rise from zero.")
    schedule: Literal["linear", "cosine", "constant"] = option("cosine", "How they fall after that.")
    clip_norm: float | None = option(1.0, "Largest norm of the dense gradient; null does not clip.")

    def __post_init__(self) -> None:
        for key in ("lr", "table_lr"):
            if getattr(self, key) <= 0:
                raise ConfigError(key, getattr(self, key), "a number above 0")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError("clip_norm", self.clip_norm, "a number above 0, or null")
        if not 0 <= self.warmup < 1:
            raise ConfigError("warmup", self.warmup, "a share of the steps, 0 to below 1")


@configuration
class PseudoConfig:
    """Pseudo-labels: the surest predictions of a trained model, taken as further training targets."""

    share: float = option(0.05, "How many, as a share of the training triples.")
    queries: int = option(50_000, "Queries drawn and answered to find them.")
    seed: int = option(0, "Of the queries.")

    def __post_init__(self) -> None:
        if self.share <= 0:
            raise ConfigError("share", self.share, "a number above 0")
        if self.queries < 1:
            raise ConfigError("queries", self.queries, "a number of 1 or more")
        if self.seed < 0:
            raise ConfigError("seed", self.seed, "a number of 0 or more")


@configuration
class TrainConfig:
    """The training loop and where it runs."""

    epochs: int = option(20, "Passes over the training triples, at most.")
    batch_size: int = option(512, "Triples a step and worker; each is a tail query and a head query.")
    accumulate: int = option(1, "Steps whose gradients are summed before the weights move.")
    optimiser: OptimiserConfig = option(OptimiserConfig, "Optimisers.")
    adversarial: float = option(
        0.0,
        "Length by which the vectors of entities are moved to where the loss grows fastest, for a second loss in every "
        "step (FGM, Miyato et al. 2017); 0 is off. A step takes twice as long.",
    )
    seed: int = option(0, "Seed of initial weights, order, samples and dropout.")
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "Autocast; auto is bfloat16 on GPUs and on processors that compute in it."
    )
    evaluate_every: int = option(1, "Epochs between validations.")
    patience: int = option(5, "Validations without a better MRR before training stops early.")
    valid_triples: int | None = option(None, "Validate on this many seeded validation triples; null takes all.")
    checkpoint_steps: int = option(0, "Steps between checkpoints within an epoch; 0 writes one an epoch only.")
    workers: int = option(1, "Ray Train workers.")
    least_workers: int | None = option(
        None,
        "Fewest workers to go on with where the cluster cannot hold all; each then computes the shares of several, and "
        "the model is the same up to rounding. Null: all or none.",
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Where workers compute; auto takes GPUs where there are enough."
    )
    cpus_per_worker: float | None = option(None, "Logical CPUs a worker reserves; null shares what the cluster has.")
    max_failures: int = option(2, "Worker failures survived by restarting from the last checkpoint.")
    preflight: Literal["check", "force", "off"] = option(
        "check",
        "Before training: what memory, disk and time it needs, against what is there. check: refuses what does not "
        "fit; force: only tells; off: does not look.",
    )

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "accumulate", "evaluate_every", "patience", "workers"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "a number of 1 or more")
        for key in ("checkpoint_steps", "max_failures", "seed"):
            if getattr(self, key) < 0:
                raise ConfigError(key, getattr(self, key), "a number of 0 or more")
        if self.adversarial < 0:
            raise ConfigError("adversarial", self.adversarial, "a length of 0 or more")
        if self.valid_triples is not None and self.valid_triples < 1:
            raise ConfigError("valid_triples", self.valid_triples, "a number of 1 or more, or null")
        if self.least_workers is not None and not 1 <= self.least_workers <= self.workers:
            expected = f"null, or a number from 1 to train.workers={self.workers}"
            raise ConfigError("least_workers", self.least_workers, expected)
        if self.cpus_per_worker is not None and self.cpus_per_worker <= 0:
            raise ConfigError("cpus_per_worker", self.cpus_per_worker, "a number above 0, or null")
