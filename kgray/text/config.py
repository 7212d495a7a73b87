"""What the text section of a configuration says: which encoder, how it is read, how fast."""

from __future__ import annotations

from typing import Literal

from kgray.config import ConfigPathOrName, configuration, option
from kgray.errors import ConfigError
from kgray.text.template import template_fields
from kgray.text.tuning_config import TuningConfig

Pooling = Literal["mean", "cls", "last", "pooler"]
Precision = Literal["auto", "float32", "bfloat16"]

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@configuration
class TextConfig:
    """How texts become vectors. Only what changes a vector is part of an artifact's version."""

    encoder: ConfigPathOrName = option(
        MINILM,
        "A directory with a Hugging Face encoder (config.json, tokenizer, safetensors weights) or its name. "
        "A name is looked for in the local Hugging Face cache, in the minilm extra, and on the hub.",
    )
    revision: str | None = option(None, "Branch, tag or commit of a named encoder; null is its main branch.")
    offline: bool = option(False, "Never ask the hub (HF_HUB_OFFLINE=1 says the same).")
    pooling: Pooling = option(
        "mean",
        "How token vectors become one: their mean, the first token (cls), the last one (last, for decoders), "
        "or the encoder's own pooler.",
    )
    normalise: bool = option(True, "Scale every vector to length 1.")
    max_length: int = option(128, "Tokens a text is cut to, special ones included.")
    template: str = option(
        "{name}: {description}",
        "An entity's text. Any column of the entity table may stand in braces; an empty one takes its "
        "separator along.",
    )
    relation_template: str = option("{name}: {description}", "A relation's text, in the same way.")
    precision: Precision = option(
        "auto",
        "Arithmetic of the encoder: auto is bfloat16 where the processor computes in it, else float32.",
    )
    batch_tokens: int = option(2048, "Tokens the encoder reads at once, padding included.")
    workers: int | None = option(None, "Most encoders side by side; null is as many as CPUs (or GPUs) allow.")
    cpus_per_worker: int | None = option(
        None,
        "CPUs of one encoder, which reads as many batches at once; null: as many as there are, at most four.",
    )
    reuse: bool = option(True, "Take vectors of unchanged texts from earlier artifacts of the same storage.")
    tuning: TuningConfig | None = option(
        None, "Train the encoder on the training triples first, and embed with what came of it; null: as it is."
    )

    def __post_init__(self) -> None:
        if not self.encoder.strip():
            raise ConfigError("encoder", self.encoder, "a directory or the name of a Hugging Face encoder")
        for key, least, what in (
            ("max_length", 3, "at least 3 tokens"),
            ("batch_tokens", 1, "a positive number of tokens"),
        ):
            if getattr(self, key) < least:
                raise ConfigError(key, getattr(self, key), what)
        if self.workers is not None and self.workers < 1:
            raise ConfigError("workers", self.workers, "a positive number of encoders, or null")
        if self.cpus_per_worker is not None and self.cpus_per_worker < 1:
            raise ConfigError("cpus_per_worker", self.cpus_per_worker, "a positive number of CPUs, or null")
        for key in ("template", "relation_template"):
            value = getattr(self, key)
            try:
                found = template_fields(value)
            except ValueError as error:
                raise ConfigError(
                    key, value, "column names in braces, as in '{name}: {description}'"
                ) from error
            if not found:
                raise ConfigError(key, value, "at least one column in braces, as in '{name}: {description}'")
