"""Texts to vectors with any Hugging Face encoder: torch and transformers, no Ray.

What makes it fast on a CPU: bfloat16 products (oneDNN on avx512_bf16 or amx, twice the float32 rate); batches
of texts with the same number of tokens, so that almost nothing is padding and no attention mask is needed;
and whole batches side by side, each on one thread (products this small gain little from several threads, and
threads that wait for each other at every product lose much on a busy machine).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from kgray.errors import ConfigError, EncoderError
from kgray.machine import computes_bfloat16
from kgray.text.config import Pooling, Precision
from kgray.text.places import EncoderPlace, find_encoder

__all__ = [
    "EncodedTexts",
    "EncoderPlace",
    "TextEncoder",
    "check_length",
    "find_encoder",
    "load_encoder",
    "load_tokenizer",
    "plan_batches",
    "position_offset",
    "resolve_precision",
    "tokenise",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedTexts:
    """``vectors``: (n, dim) float32, a zero row for a text without tokens; ``truncated``: texts cut at
    max_length; ``tokens``: tokens read, without padding; ``padding``: tokens of padding read besides."""

    vectors: NDArray[np.float32]
    truncated: int
    tokens: int
    padding: int


def resolve_precision(precision: Precision, device: str = "cpu") -> Literal["float32", "bfloat16"]:
    """What ``auto`` means here: bfloat16 where the processor multiplies in it. Imports nothing heavy."""
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bfloat16"
    return "bfloat16" if computes_bfloat16() else "float32"


def plan_batches(lengths: Sequence[int] | NDArray[np.int64], budget: int) -> list[NDArray[np.int64]]:
    """Indices of the texts in each batch; texts of length 0 are in none.

    Texts are taken by length, longest first, so that a batch that fits is followed only by smaller ones. A
    batch ends where the length changes, unless it holds less than a quarter of ``budget`` tokens: then the
    next shorter texts join it, padded by at most an eighth. No batch holds more than ``budget`` tokens,
    padding included, but for a single text longer than that.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    batches: list[NDArray[np.int64]] = []
    begin = 0
    while begin < order.size:
        longest = int(sizes[order[begin]])
        most = max(1, budget // longest)
        window = sizes[order[begin : begin + most]]
        same = int(np.searchsorted(-window, -longest, side="right"))
        if same * longest * 4 >= budget:
            count = same
        else:
            count = int(np.searchsorted(-window, -(longest - max(1, longest // 8)), side="right"))
        batches.append(order[begin : begin + count])
        begin += count
    return batches


class TextEncoder:
    """A loaded encoder.

    ``path``: its directory; ``precision``: float32, bfloat16 or auto; ``threads``: batches at once on a CPU;
    ``device``: cpu or cuda. Raises EncoderError for a directory that transformers cannot read, ConfigError
    for a ``max_length`` beyond what the encoder has positions for, or a pooling it does not have.
    """

    def __init__(
        self,
        path: str,
        *,
        pooling: Pooling = "mean",
        max_length: int = 128,
        normalise: bool = True,
        precision: Precision = "auto",
        batch_tokens: int = 2048,
        threads: int = 1,
        device: str = "cpu",
    ) -> None:
        import torch

        self.precision = resolve_precision(precision, device)
        self.pooling, self.max_length, self.normalise = pooling, max_length, normalise
        self.batch_tokens, self.device = batch_tokens, device
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        self._tokenizer, self._model = load_encoder(path, dtype, pooling)
        self._model.to(device)
        self._pad = self._tokenizer.pad_token_id
        if self._pad is None:  # decoders often have none; what is padded is masked, so any token will do
            self._pad = self._tokenizer.eos_token_id or 0
        self.dim = int(self._model.config.hidden_size)
        check_length(self._model, max_length)
        # OpenMP keeps its number of threads by thread: these few compute alone, the caller's setting stays.
        workers = threads if device == "cpu" else 1
        self._pool = ThreadPoolExecutor(workers, "encode", initializer=torch.set_num_threads, initargs=(1,))

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Vectors of texts, in their order; the same text gives the same vector whatever stands beside it (to
        rounding)."""
        tokens, truncated = tokenise(self._tokenizer, texts, self.max_length)
        out = np.zeros((len(texts), self.dim), dtype=np.float32)

        def read(rows: NDArray[np.int64]) -> int:
            batch = [tokens[row] for row in rows]
            out[rows] = self._forward(batch)
            return len(batch) * len(batch[0]) - sum(map(len, batch))

        padding = sum(self._pool.map(read, plan_batches([len(ids) for ids in tokens], self.batch_tokens)))
        return EncodedTexts(out, truncated, sum(map(len, tokens)), padding)

    def _forward(self, batch: list[list[int]]) -> NDArray[np.float32]:
        """(B, dim) float32 vectors of token lists, longest first."""
        import torch

        with torch.inference_mode():
            vectors = self._read_tokens(batch)
            if self.normalise:
                vectors = torch.nn.functional.normalize(vectors, dim=-1)
            return cast("NDArray[np.float32]", vectors.cpu().numpy())

    def _read_tokens(self, batch: list[list[int]]) -> Any:
        import torch

        longest, shortest = len(batch[0]), len(batch[-1])
        ids = torch.tensor([row + [self._pad] * (longest - len(row)) for row in batch], device=self.device)
        lengths = torch.tensor([len(row) for row in batch], device=self.device)
        mask = None
        if shortest < longest:
            mask = torch.arange(longest, device=self.device)[None, :] < lengths[:, None]
        # Without padding a mask of ones only costs time; transformers takes its absence for "all are tokens".
        given = {} if mask is None else {"attention_mask": mask.long()}
        output = self._model(input_ids=ids, **given)
        return self._pooled(output, mask, lengths)

    def _pooled(self, output: Any, mask: Any, lengths: Any) -> Any:
        import torch

        if self.pooling == "pooler":
            return output.pooler_output.float()
        states = output.last_hidden_state
        if self.pooling == "cls":
            return states[:, 0].float()
        if self.pooling == "last":
            return states[torch.arange(len(states), device=states.device), lengths - 1].float()
        if mask is None:
            return states.float().mean(dim=1)
        return (states.float() * mask[:, :, None]).sum(dim=1) / lengths[:, None]


def tokenise(tokenizer: Any, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], int]:
    """Token ids of each text, cut at ``max_length``, none for an empty one; and how many were cut."""
    kept = [row for row, text in enumerate(texts) if text.strip()]
    tokens: list[list[int]] = [[] for _ in texts]
    if not kept:
        return tokens, 0
    # A lone surrogate cannot be written as UTF-8, which the tokenizer needs.
    clean = [texts[row].encode("utf-8", "replace").decode("utf-8") for row in kept]
    encoded = tokenizer(clean, truncation=True, max_length=max_length, return_attention_mask=False, verbose=False)
    for row, ids in zip(kept, encoded["input_ids"], strict=True):
        tokens[row] = ids
    return tokens, _count_truncated(tokenizer, clean, encoded, max_length)


def _count_truncated(tokenizer: Any, texts: list[str], encoded: Any, max_length: int) -> int:
    if encoded.encodings is not None:
        return sum(1 for encoding in encoded.encodings if encoding.overflowing)
    full = [text for text, ids in zip(texts, encoded["input_ids"], strict=True) if len(ids) >= max_length]
    if not full:
        return 0
    whole = tokenizer(full, truncation=False, verbose=False)["input_ids"]
    return sum(1 for ids in whole if len(ids) > max_length)


def position_offset(model: Any) -> int:
    """The number of the first position: RoBERTa and its kin number theirs from the padding token on."""
    embeddings = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(embeddings, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def check_length(model: Any, max_length: int) -> None:
    """Raises ConfigError where texts of ``max_length`` tokens have more positions than the encoder."""
    positions = getattr(model.config, "max_position_embeddings", None)
    limit = (int(positions) if positions else 2**31) - position_offset(model)
    if max_length > limit:
        raise ConfigError("text.max_length", max_length, f"at most {limit} tokens with this encoder")


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a directory; EncoderError for one that transformers cannot read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> EncoderError:
    # transformers raises whatever the faulty file made it raise; the user needs place and reason.
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return EncoderError(f"the encoder at {path} cannot be loaded: {reason[:300]}")


def load_encoder(path: str, dtype: Any, pooling: str) -> tuple[Any, Any]:
    """Tokenizer and model (in evaluation mode) of a directory.

    Raises EncoderError for one that transformers cannot read, ConfigError for a pooling it does not have.
    """
    import transformers
    from transformers import AutoModel

    tokenizer = load_tokenizer(path)
    transformers.utils.logging.disable_progress_bar()
    noise = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what the checkpoint lacks is told below
    try:
        model, info = AutoModel.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise _unreadable(path, error) from error
    finally:
        transformers.utils.logging.set_verbosity(noise)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise EncoderError(
            f"the encoder at {path} lacks weights: {', '.join(missing[:3])} ({len(missing)} in all)"
        )
    has_pooler = getattr(model, "pooler", None) is not None
    if pooling == "pooler" and (
        not has_pooler or any(key.startswith("pooler.") for key in info["missing_keys"])
    ):
        raise ConfigError("text.pooling", pooling, "mean, cls or last: this encoder has no trained pooler")
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    model.config.use_cache = False  # decoders would keep keys and values of every layer for nothing
    if not hasattr(model.config, "hidden_size"):
        raise EncoderError(f"the model at {path} ({model.config.model_type}) is no text encoder")
    return tokenizer, model.eval()
