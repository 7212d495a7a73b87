"""A Hugging Face encoder in training: flat token rows, activations of frozen layers stored once, LoRA.

Texts are not padded. All tokens of a batch stand in one (T, d) matrix, so that every linear map is one product, and
attention runs over groups of sequences of equal length. That needs layers of BERT's kind (:data:`FLAT`); any other
encoder is called as it is, a group of equal length at a time.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kgray.errors import ConfigError, StorageError
from kgray.phases import counted, phase
from kgray.text.encoder import check_length, load_encoder, load_tokenizer, position_offset
from kgray.text.tokens import Int64, Packed, Texts, batches, pack
from kgray.text.tuning_config import TuningConfig

FLAT = ("bert", "camembert", "roberta", "xlm-roberta")
"""Values of ``model_type`` whose layers are run here on flat tokens."""

READ_AT_ONCE = 16384
"""Tokens a batch where nothing is learned from it."""

SAY_EVERY_S = 15.0

Groups = Sequence[tuple[int, int]]


class TunedEncoder(nn.Module):
    """The encoder of ``texts``, of which ``tuning`` says what learns; the inverse temperature's logarithm beside it.

    dtype: what frozen layers compute and their activations are stored in (bfloat16 or float32). Raises EncoderError
    (unreadable), ConfigError (a mode this encoder does not have, more layers than there are, peft not installed).
    """

    ids: Tensor

    def __init__(self, texts: Texts, tuning: TuningConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        _, model = load_encoder(texts.encoder, torch.float32, texts.pooling)
        check_length(model, texts.max_length)
        self.texts, self.tuning, self.dtype = texts, tuning, dtype
        self.flat = model.config.model_type in FLAT
        self.frozen_layers = 0
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = tuning.dropout
        if tuning.mode == "last_layers":
            self._freeze_below(model)
        self.wrapped = _with_lora(model, tuning.rank) if tuning.mode == "lora" else model
        self.log_scale = nn.Parameter(torch.tensor(1 / tuning.temperature).log())
        self.register_buffer("ids", torch.from_numpy(texts.tokens.ids), persistent=False)
        self._stored: Tensor | None = None

    @property
    def model(self) -> Any:
        """The Hugging Face model, LoRA's additions inside it."""
        return self.wrapped.base_model.model if self.tuning.mode == "lora" else self.wrapped

    def _freeze_below(self, model: Any) -> None:
        if not self.flat:
            raise ConfigError(
                "text.tuning.mode", "last_layers", f"full or lora, as the encoder is a {model.config.model_type}"
            )
        layers = model.encoder.layer
        if self.tuning.layers > len(layers):
            raise ConfigError("text.tuning.layers", self.tuning.layers, f"at most {len(layers)}, all of this encoder's")
        self.frozen_layers = len(layers) - self.tuning.layers
        model.requires_grad_(False)
        learning = [*layers[self.frozen_layers :], *([model.pooler] if self.texts.pooling == "pooler" else [])]
        for module in learning:
            module.requires_grad_(True)

    def store_lower(self, say: Callable[..., None] = lambda *_: None) -> None:
        """Compute the frozen layers for every text once; nothing to do where none is frozen.

        Raises StorageError where there is no room for them.
        """
        if self.tuning.mode != "last_layers":
            return
        tokens = self.texts.tokens
        stored = _on_disk(len(tokens.ids), int(self.model.config.hidden_size), self.dtype)
        done, said = 0, time.monotonic()
        with torch.no_grad(), _no_dropout(self):
            for part in batches(self.texts, np.arange(len(tokens)), None, READ_AT_ONCE):
                packed = pack(self.texts, part)
                places = torch.from_numpy(packed.places)
                with torch.autocast(self.ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    states = self._layers(self._embedded(places, packed.groups), packed.groups, 0, self.frozen_layers)
                stored[places] = states.to(stored)
                done += len(part)
                if time.monotonic() - said > SAY_EVERY_S or done == len(tokens):
                    said = time.monotonic()
                    say("text: %d of %d texts through the lower %d layers", done, len(tokens), self.frozen_layers)
        self._stored = stored

    def forward(self, packed: Packed) -> Tensor:
        """(n, d) float32 vectors of length 1, zero for a sequence without tokens."""
        if not len(packed.places):
            return self.log_scale.new_zeros(len(packed.back), int(self.model.config.hidden_size))
        with phase("encoding"):
            counted("tokens", len(packed.places))
            states = self._states(packed)
            parts = [self._pooled(part, n, length) for part, (n, length) in _grouped(states, packed.groups)]
            vectors = F.normalize(torch.cat(parts).float(), dim=-1)
            return vectors.index_select(0, torch.from_numpy(packed.back).to(vectors.device))

    def encode(self, rows: Int64, continued: Int64 | None = None) -> Tensor:
        """(n, d) float32 vectors of texts (see :func:`~kgray.text.tokens.pack`), without gradient or dropout."""
        out = torch.zeros((len(rows), int(self.model.config.hidden_size)))
        with torch.no_grad(), _no_dropout(self):
            for part in batches(self.texts, rows, continued, READ_AT_ONCE):
                packed = pack(self.texts, rows[part], None if continued is None else continued[part])
                with torch.autocast(self.ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    out[torch.from_numpy(part)] = self(packed).cpu()
        return out

    def save(self, folder: Path) -> None:
        """Write the encoder as any Hugging Face one: configuration, tokenizer, safetensors. LoRA is merged into it."""
        model = self.wrapped.merge_and_unload() if self.tuning.mode == "lora" else self.wrapped
        model.save_pretrained(folder, safe_serialization=True)
        load_tokenizer(self.texts.encoder).save_pretrained(folder)

    def _states(self, packed: Packed) -> Tensor:
        places = torch.from_numpy(packed.places)
        if self._stored is not None:
            with phase("fetching"):
                counted("rows", len(places))
                states = self._stored[places].to(self.ids.device)
            return self._layers(states, packed.groups, self.frozen_layers, None)
        if self.flat:
            return self._layers(self._embedded(places, packed.groups), packed.groups, 0, None)
        parts = _grouped(self.ids[places.to(self.ids.device)], packed.groups)
        read = [self.model(input_ids=part.view(n, length)) for part, (n, length) in parts if length]
        return torch.cat([output.last_hidden_state.flatten(0, 1) for output in read])

    def _embedded(self, places: Tensor, groups: Groups) -> Tensor:
        ids = self.ids[places.to(self.ids.device)][None]
        at = torch.cat([torch.arange(length).repeat(n) for n, length in groups]) + position_offset(self.model)
        states = self.model.embeddings(
            input_ids=ids, position_ids=at.to(ids.device)[None], token_type_ids=torch.zeros_like(ids)
        )[0]
        # Left in float32, every sum with a residual and every norm after it would be twice as wide.
        kind = ids.device.type
        narrowed: Tensor = states.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else states
        return narrowed

    def _layers(self, states: Tensor, groups: Groups, first: int, last: int | None) -> Tensor:
        for layer in self.model.encoder.layer[first:last]:
            states = _layer(layer, states, groups)
        return states

    def _pooled(self, states: Tensor, n: int, length: int) -> Tensor:
        """(n, d) of (n * length, d)."""
        if not length:
            return states.new_zeros(n, states.shape[-1])
        rows = states.view(n, length, -1)
        if self.texts.pooling == "mean":
            return rows.mean(dim=1, dtype=torch.float32)
        if self.texts.pooling == "pooler":
            return self.model.pooler(rows)  # type: ignore[no-any-return]
        return rows[:, 0 if self.texts.pooling == "cls" else -1]


def _layer(layer: Any, states: Tensor, groups: Groups) -> Tensor:
    """One transformer layer of BERT's kind over flat (T, d) states."""
    attention = layer.attention.self
    query, key, value = attention.query(states), attention.key(states), attention.value(states)
    if states.device.type == "cpu":
        # torch's bfloat16 kernel for short sequences takes six times the float32 one's time, its gradient most of it.
        query, key, value = query.float(), key.float(), value.float()
    rows = [n * length for n, length in groups]
    mixed = []
    with torch.autocast(states.device.type, enabled=False):
        # One split and not a slice a group: the gradient of a slice is a whole matrix of zeros each time.
        for (n, length), *parts in zip(groups, query.split(rows), key.split(rows), value.split(rows), strict=True):
            if length:
                q, k, v = (part.view(n, length, attention.num_attention_heads, -1).transpose(1, 2) for part in parts)
                mixed.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n * length, -1))
    mixture = torch.cat(mixed).to(states.dtype)
    states = layer.attention.output(mixture, states)
    return layer.output(layer.intermediate(states), states)  # type: ignore[no-any-return]


def _grouped(states: Tensor, groups: Groups) -> list[tuple[Tensor, tuple[int, int]]]:
    return list(zip(torch.split(states, [n * length for n, length in groups]), groups, strict=True))


def _on_disk(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """(rows, width), memory-mapped from a file without a name, which goes when the mapping does."""
    narrow: Any = np.int16 if dtype == torch.bfloat16 else np.int32
    size = rows * width * np.dtype(narrow).itemsize
    with tempfile.TemporaryFile() as file:
        try:
            # A hole in the file would only be filled when written to, and a full disk then kills the process.
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise StorageError(
                f"{tempfile.gettempdir()} has no room for {size / 1e9:.1f} GB of activations ({error.strerror}): set "
                "TMPDIR to another place, or text.tuning.mode to lora or full"
            ) from None
        return torch.from_numpy(np.memmap(file, narrow, "r+", shape=(rows, width))).view(dtype)


@contextmanager
def _no_dropout(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)


def _with_lora(model: Any, rank: int) -> Any:
    """The model with low-rank additions to all its linear maps but the pooler's (Hu et al. 2021), which alone learn."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError(
            "text.tuning.mode", "lora", "full or last_layers, or the extra: python3 -m pip install -e '.[lora]'"
        ) from None
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith("pooler.")]
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=names))
    for module in wrapped.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # autocast chooses; peft would widen every input to float32
    return wrapped
