"""What ``text.tuning`` says: how the encoder itself learns from the training triples. No torch."""

from __future__ import annotations

from typing import Literal

from kgray.config import configuration, option
from kgray.errors import ConfigError


@configuration
class TuningConfig:
    """Contrastive training of the text encoder before texts are embedded (Wang et al. 2022, "SimKGC").

    What is not said here (workers, devices, precision, checkpoints within an epoch) is as in ``train``.
    """

    mode: Literal["last_layers", "lora", "full"] = option(
        "last_layers",
        "What learns: last_layers, the uppermost ones, over stored activations of those below (the cheapest by far); "
        "lora, low-rank additions to every linear map (needs the extra lora); full, all weights.",
    )
    layers: int = option(2, "last_layers: how many learn.")
    rank: int = option(16, "lora: rank of the additions; they count twice (alpha is 2 x rank).")
    epochs: int = option(3, "Passes over the training triples, at most.")
    epoch_triples: int | None = option(
        None, "Training triples an epoch, drawn anew for each; null takes all. With epochs it bounds the steps."
    )
    batch_size: int = option(
        256, "Triples a step and worker; each is a tail and a head query, and all entities of a step are candidates."
    )
    lr: float = option(1e-4, "Peak learning rate (AdamW); it rises over warmup and then falls linearly.")
    warmup: float = option(0.1, "Share of all steps over which the learning rate rises from zero.")
    weight_decay: float = option(1e-4, "Decoupled weight decay.")
    temperature: float = option(0.05, "What cosines are divided by at first; it is learned.")
    margin: float = option(0.02, "Taken off the cosine of the true answer in training.")
    dropout: float = option(0.0, "Dropout of hidden states in the layers that learn.")
    word_dropout: float = option(0.0, "Share of tokens left out of a text each time it is read in training.")
    mask_mentions: bool = option(
        False,
        "Leave the name of the answer out of the query's text in training, so that finding it there is not all that "
        "is learned.",
    )
    seed: int = option(0, "Seed of order, dropout and the additions' initial weights.")
    patience: int = option(2, "Validations (one an epoch) without a better MRR before training stops early.")
    valid_triples: int | None = option(
        1000, "Validate on this many seeded validation triples, ranked by the encoder alone; null takes all."
    )

    def __post_init__(self) -> None:
        for key in ("layers", "rank", "epochs", "batch_size", "patience"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "a number of 1 or more")
        for key in ("epoch_triples", "valid_triples"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "a number of 1 or more, or null")
        for key in ("lr", "temperature"):
            if getattr(self, key) <= 0:
                raise ConfigError(key, getattr(self, key), "a number above 0")
        for key in ("weight_decay", "margin", "seed"):
            if getattr(self, key) < 0:
                raise ConfigError(key, getattr(self, key), "a number of 0 or more")
        for key in ("warmup", "dropout", "word_dropout"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "a share, 0 to below 1")
