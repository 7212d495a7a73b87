"""What an artifact is made of (Recipe), what it turned out to be (Manifest), and the hashes both rest on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from kgray.errors import ArtifactError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
VERSION_DIGITS = 16
_KIND = re.compile(r"[a-z][a-z0-9_-]*$")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Source:
    """Something an artifact was made from: another artifact, or an input file (``kind="file"``, ``version``
    the sha256 of its bytes, 64 hex digits)."""

    kind: str
    version: str
    uri: str

    def to_dict(self) -> dict[str, str]:
        return {"kind": self.kind, "version": self.version, "uri": self.uri}


@dataclass(frozen=True)
class Recipe:
    """All that decides what a job would write; two equal recipes need one artifact.

    ``inputs`` count by kind and version, in their order, never by where they lie. ``config`` is the part of
    the configuration that changes the result: no paths, no worker counts. ``format`` is raised whenever the
    code would write something else from the same inputs.
    """

    kind: str
    format: int
    inputs: tuple[Source, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _KIND.match(self.kind) or self.kind in ("runs", "file"):
            raise ArtifactError(f"{self.kind!r} cannot be the kind of an artifact")

    @property
    def version(self) -> str:
        """16 hex digits of the sha256 of the recipe's canonical JSON."""
        content = {
            "kind": self.kind,
            "format": self.format,
            "inputs": [[source.kind, source.version] for source in self.inputs],
            "config": self.config,
        }
        return hashlib.sha256(canonical_json(content)).hexdigest()[:VERSION_DIGITS]


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, the same bytes for the same content in every process.

    Raises ArtifactError for what JSON cannot hold, non-finite numbers among it.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_as_json)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"cannot be part of an artifact's version: {error}") from None
    return text.encode()


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    item = getattr(value, "item", None)  # numpy and torch scalars
    if callable(item) and getattr(value, "ndim", 1) == 0:
        return item()
    raise TypeError(f"{type(value).__name__} {value!r} is not JSON")


def sha256_stream(stream: Any) -> str:
    """sha256 of what is left in a binary stream, read a MiB at a time."""
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def new_manifest(
    recipe: Recipe, counts: Mapping[str, Any], files: Mapping[str, tuple[int, str]], created_at: str
) -> dict[str, Any]:
    """The content of manifest.json; ``files`` maps relative paths to (bytes, sha256)."""
    return {
        "manifest_format": MANIFEST_FORMAT,
        "kind": recipe.kind,
        "version": recipe.version,
        "format": recipe.format,
        "inputs": [source.to_dict() for source in recipe.inputs],
        "config": json.loads(canonical_json(recipe.config)),
        "code_version": code_version(),
        "counts": json.loads(canonical_json(counts)),
        "files": [{"path": path, "bytes": size, "sha256": digest} for path, (size, digest) in sorted(files.items())],
        "created_at": created_at,
    }


def parse_manifest(text: bytes, uri: str) -> dict[str, Any]:
    """A manifest's content; ArtifactError, naming it, when it is damaged or of a newer kind."""
    try:
        manifest = json.loads(text)
        for key, kind in (
            ("kind", str),
            ("version", str),
            ("files", list),
            ("inputs", list),
            ("created_at", str),
        ):
            if not isinstance(manifest[key], kind):
                raise TypeError(f"{key} is no {kind.__name__}")
        for entry in manifest["files"]:
            if not (isinstance(entry["path"], str) and isinstance(entry["bytes"], int)):
                raise TypeError("files hold no path and bytes")
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{uri}/{MANIFEST} is damaged: {error}") from None
    if manifest.get("manifest_format", 0) > MANIFEST_FORMAT:
        raise ArtifactError(f"{uri}/{MANIFEST} was written by a newer kgray")
    return dict(manifest)


@lru_cache(maxsize=1)
def code_version() -> str:
    """The package's version and a hash of its source text, with the git commit where there is one: enough to
    tell whether two artifacts came from the same code even where no repository is (a Ray job's working
    directory)."""
    from importlib import metadata

    package = Path(__file__).resolve().parent.parent
    try:
        version = metadata.version("kgray")
    except metadata.PackageNotFoundError:
        version = "0"
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    text = f"{version}+src.{digest.hexdigest()[:12]}"
    if (package.parent / ".git").exists():
        try:
            commit = subprocess.run(
                ["git", "rev-parse", "--short=12", "HEAD"],
                cwd=package.parent, capture_output=True, text=True, timeout=5, check=True,
            ).stdout.strip()  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            commit = ""
        if commit:
            text += f".git.{commit}"
    return text
