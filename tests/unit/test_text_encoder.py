"""TextEncoder against plain transformers, one text at a time, in float32."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from tiny_encoders import WORDS, save_encoder, tiny_bert

from kgray.errors import ConfigError, EncoderError
from kgray.text.config import TextConfig
from kgray.text.encoder import TextEncoder, find_encoder, plan_batches, resolve_precision

TEXTS = ["w1", "w2 w3", "w1 w2 w3 w4 w5", "w9 w8 w7", " ".join(WORDS), "", "w5 unknown w6", "w1"]


@given(st.lists(st.integers(0, 70), max_size=200), st.integers(1, 300))
@settings(deadline=None)
def test_every_text_with_tokens_is_in_one_batch_within_the_budget_and_hardly_padded(
    lengths: list[int], budget: int
) -> None:
    batches = plan_batches(lengths, budget)
    together = [int(row) for batch in batches for row in batch]
    assert sorted(together) == [row for row, length in enumerate(lengths) if length]
    for batch in batches:
        sizes = [lengths[row] for row in batch]
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) == 1 or len(sizes) * sizes[0] <= budget
        assert sizes[0] - sizes[-1] <= max(1, sizes[0] // 8)


def test_many_texts_are_hardly_padded() -> None:
    lengths = [length for length in range(5, 30) for _ in range(200)]
    batches = plan_batches(lengths, 1024)
    read = sum(len(batch) * lengths[batch[0]] for batch in batches)
    assert read < 1.01 * sum(lengths)
    assert len(batches) < 1.3 * sum(lengths) / 1024


def test_precision_is_automatic_only_where_asked() -> None:
    assert resolve_precision("float32") == "float32"
    assert resolve_precision("bfloat16") == "bfloat16"
    assert resolve_precision("auto", "cuda") == "bfloat16"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fast = any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))
    assert resolve_precision("auto") == ("bfloat16" if fast else "float32")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Saves a tiny random encoder with a word tokenizer, and gives its directory."""
    import torch

    def save(model: Any, pad: bool = True, special: bool = True) -> str:
        return save_encoder(tmp_path_factory.mktemp("encoder"), model, pad, special)

    torch.manual_seed(0)
    return save


def one_by_one(path: str, texts: list[str], pooling: str, max_length: int = 128) -> np.ndarray[Any, Any]:
    """The oracle: float32, a batch of one, no padding."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    rows = []
    for text in texts:
        given_ids = tokenizer([text], truncation=True, max_length=max_length, return_tensors="pt")[
            "input_ids"
        ]
        if not text.strip():
            rows.append(np.zeros(model.config.hidden_size, np.float32))
            continue
        with torch.no_grad():
            output = model(input_ids=given_ids.long())
        states = output.last_hidden_state[0]
        vector = {
            "mean": lambda states=states: states.mean(0),
            "cls": lambda states=states: states[0],
            "last": lambda states=states: states[-1],
            "pooler": lambda output=output: output.pooler_output[0],
        }[pooling]()
        rows.append((vector / vector.norm()).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "pooler"])
def test_batches_equal_the_oracle_with_every_pooling(make: Callable[..., str], pooling: Any) -> None:
    path = make(tiny_bert())
    encoded = TextEncoder(path, pooling=pooling, precision="float32", max_length=60, threads=2).encode(
        TEXTS * 3
    )
    np.testing.assert_allclose(encoded.vectors, np.tile(one_by_one(path, TEXTS, pooling), (3, 1)), atol=2e-6)
    assert not encoded.vectors[5].any()
    assert encoded.tokens == 3 * sum(len(text.split()) + 2 for text in TEXTS if text)


def test_padding_changes_nothing(make: Callable[..., str]) -> None:
    path = make(tiny_bert())
    texts = [" ".join(WORDS[:n]) for n in (16, 15, 17, 16, 18)]
    encoded = TextEncoder(path, precision="float32", max_length=60).encode(texts)
    assert encoded.padding > 0
    np.testing.assert_allclose(encoded.vectors, one_by_one(path, texts, "mean"), atol=2e-6)


def test_a_decoder_without_a_padding_token_gives_its_last_token(make: Callable[..., str]) -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=44, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    path = make(LlamaModel(config), pad=False, special=False)
    texts = [*TEXTS, *(" ".join(WORDS[:n]) for n in (16, 15, 17))]
    encoded = TextEncoder(path, pooling="last", precision="float32", max_length=60).encode(texts)
    np.testing.assert_allclose(encoded.vectors, one_by_one(path, texts, "last"), atol=3e-6)


def test_of_an_encoder_decoder_the_encoder_is_used(make: Callable[..., str]) -> None:
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=44, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    vectors = TextEncoder(make(T5Model(config)), precision="float32").encode(TEXTS).vectors
    assert vectors.shape == (len(TEXTS), 32)
    np.testing.assert_allclose(np.linalg.norm(vectors[:5], axis=1), 1, atol=1e-6)


def test_long_texts_are_cut_and_counted(make: Callable[..., str]) -> None:
    path = make(tiny_bert())
    encoder = TextEncoder(path, precision="float32", max_length=10)
    texts = [" ".join(WORDS[:8]), " ".join(WORDS[:9]), " ".join(WORDS) * 50, "w1"]
    encoded = encoder.encode(texts)
    assert encoded.truncated == 2
    assert encoded.tokens == 10 + 10 + 10 + 3
    np.testing.assert_allclose(encoded.vectors, one_by_one(path, texts, "mean", max_length=10), atol=2e-6)


def test_no_texts_and_only_empty_texts(make: Callable[..., str]) -> None:
    encoder = TextEncoder(make(tiny_bert()), precision="float32", max_length=60)
    assert encoder.encode([]).vectors.shape == (0, 32)
    assert not encoder.encode(["", " \n\t"]).vectors.any()


def test_length_that_is_not_normalised_is_kept(make: Callable[..., str]) -> None:
    path = make(tiny_bert())
    raw = TextEncoder(path, precision="float32", normalise=False, max_length=60).encode(TEXTS[:3]).vectors
    assert (np.abs(np.linalg.norm(raw, axis=1) - 1) > 1e-2).all()
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, one_by_one(path, TEXTS[:3], "mean"), atol=2e-6)


def test_more_tokens_than_positions_is_refused_with_the_limit(make: Callable[..., str]) -> None:
    from transformers import RobertaConfig, RobertaModel

    with pytest.raises(ConfigError, match=r"text\.max_length.*at most 64 tokens"):
        TextEncoder(make(tiny_bert()), max_length=65)
    config = RobertaConfig(
        vocab_size=44, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=34, pad_token_id=1,
    )  # fmt: skip
    path = make(RobertaModel(config))
    with pytest.raises(ConfigError, match="at most 32 tokens"):
        TextEncoder(path, max_length=33)
    encoded = TextEncoder(path, max_length=32, precision="float32").encode([" ".join(WORDS)])
    assert np.isfinite(encoded.vectors).all()


def test_a_pooler_that_was_never_trained_is_refused(make: Callable[..., str]) -> None:
    path = make(tiny_bert(add_pooling_layer=False))
    assert TextEncoder(path, max_length=60, precision="float32").encode(["w1"]).vectors.any()
    with pytest.raises(ConfigError, match=r"text\.pooling"):
        TextEncoder(path, max_length=60, pooling="pooler")


def test_damaged_or_incomplete_weights_are_an_encoder_error(make: Callable[..., str]) -> None:
    path = Path(make(tiny_bert()))
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"lacks weights: encoder\.layer\.1"):
        TextEncoder(str(path), max_length=60)
    (path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(EncoderError, match="cannot be loaded"):
        TextEncoder(str(path), max_length=60)


@pytest.fixture(scope="module")
def minilm() -> str:
    return find_encoder(TextConfig(offline=True)).path


ODD = [
    "a virus", "ﬀ ligature, ünïcode, 漢字, עברית, 🦠🧬", "null \x00 and \ufeff marks \u202e turned", "x" * 5000,
    "\ud800 half a pair", "\U0010ffff", "\u0301\u0301\u0301", "tab\tand\nnewline", "long " * 400,
]  # fmt: skip


def test_minilm_in_bfloat16_points_the_way_the_oracle_points(minilm: str) -> None:
    encoder = TextEncoder(minilm, precision="bfloat16", threads=2)
    encoded = encoder.encode(ODD)
    clean = [text.encode("utf-8", "replace").decode() for text in ODD]
    expected = one_by_one(minilm, clean, "mean")
    assert ((encoded.vectors * expected).sum(1) > 0.999).all()
    assert encoded.truncated == 1
    alone = np.concatenate([encoder.encode([text]).vectors for text in ODD])
    assert ((alone * encoded.vectors).sum(1) > 0.9999).all()
