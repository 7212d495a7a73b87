"""The artifacts under one storage root: finding them, and building what is missing.

On disk: ``ROOT/KIND/VERSION/`` with the files and ``manifest.json``; on object storage, which cannot rename,
``ROOT/KIND/VERSION.ATTEMPT/``, where of several complete attempts the oldest counts. Beside them
``ROOT/runs/`` (state that lets a broken job resume), ``ROOT/.tmp/`` (drafts and locks) and ``ROOT/.cache/``
(hashes of input files).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from kgray.artifact import filesystem as storage
from kgray.artifact.draft import RESERVED, Draft
from kgray.artifact.filesystem import is_local, join, normalise, resolve, storage_errors
from kgray.artifact.hashing import hash_files
from kgray.artifact.locks import exclusive, is_free
from kgray.artifact.manifest import MANIFEST, Recipe, Source, canonical_json, new_manifest, sha256_stream
from kgray.artifact.published import Artifact, is_artifact
from kgray.errors import ArtifactError, ArtifactNotFoundError

log = logging.getLogger(__name__)
Sources = list[Source]  # inside Store, `list` is the method
Make = Callable[[Draft], Mapping[str, Any] | None]
_DRAFT = "_draft.json"
_ABANDONED = timedelta(days=7)


@dataclass(frozen=True)
class Built:
    """What ``Store.build`` gives back; ``up_to_date``: it was there already."""

    artifact: Artifact
    up_to_date: bool


class Store:
    """The artifacts under ``root``: a local path, or a URI pyarrow or fsspec can open. Pickles to its
    root."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = normalise(root)

    def __repr__(self) -> str:
        return f"Store({self.root!r})"

    def find(self, recipe: Recipe) -> Artifact | None:
        """The artifact of a recipe, sizes verified; None if there is none.

        Raises ArtifactError when it is there but damaged.
        """
        found = self._complete(recipe.kind, recipe.version)
        if found is not None:
            found.verify()
        return found

    def get(self, version_or_uri: str) -> Artifact:
        """The artifact at a URI, or the only one whose version begins so (four digits at least;
        ``kind/version`` narrows it); sizes are verified.

        Raises ArtifactNotFoundError, ArtifactError when it is damaged.
        """
        wanted = version_or_uri.strip()
        if "://" in wanted or is_artifact(wanted):
            return Artifact.load(wanted)
        kind, _, version = wanted.rpartition("/")
        matches: dict[tuple[str, str], Artifact] = {}
        if len(version) >= 4 and "/" not in kind:
            for artifact in self.list(kind or None):
                if artifact.version.startswith(version):
                    matches[artifact.kind, artifact.version] = artifact  # the oldest attempt comes last
        if not matches:
            raise ArtifactNotFoundError(f"no artifact {wanted!r} under {self.root}: give a version or a URI")
        if len(matches) > 1:
            names = ", ".join(f"{kind}/{version}" for kind, version in sorted(matches))
            raise ArtifactNotFoundError(f"{wanted!r} may be any of {names}: give more digits")
        (found,) = matches.values()
        found.verify()
        return found

    def list(self, kind: str | None = None) -> list[Artifact]:
        """All complete artifacts (of a kind), the newest first; damaged manifests are skipped with a
        warning."""
        filesystem, path = resolve(self.root)
        kinds = [kind] if kind else storage.list_folders(filesystem, path)
        found = []
        for one in kinds:
            if one == "runs" or one.startswith("."):
                continue
            for name in storage.list_folders(filesystem, join(path, one)):
                try:
                    found.append(Artifact.peek(join(self.root, one, name)))
                except ArtifactNotFoundError:
                    continue
                except ArtifactError as error:
                    log.warning("%s", error)
        return sorted(found, key=lambda a: (a.manifest["created_at"], a.uri), reverse=True)

    def build(self, recipe: Recipe, make: Make) -> Built:
        """The artifact of a recipe, made by ``make(draft)`` (which returns its counts) if it is not there.

        A second builder of the same version waits for the first where storage knows locks, and uses its
        result. If ``make`` fails nothing becomes visible. Raises what ``make`` raises, and StorageError for
        a full storage.
        """
        with storage_errors(self.root):
            if found := self.find(recipe):
                return Built(found, True)
            if not is_local(self.root):
                return self._build_remote(recipe, make)
            drafts = Path(self.root, ".tmp")
            drafts.mkdir(parents=True, exist_ok=True)
            _clean_local(drafts)
            name = f"{recipe.kind}-{recipe.version}"
            with exclusive(drafts / f"{name}.lock", f"{recipe.kind} {recipe.version}"):
                if found := self.find(recipe):
                    return Built(found, True)
                return self._build_local(recipe, make, drafts / f"{name}.{secrets.token_hex(4)}")

    def hash_files(self, paths: Iterable[str]) -> Sources:
        """Input files (paths or URIs) as sources, in the order given; hashes are remembered by path, size
        and time of change. Raises DataError for a file that is missing or cannot be read."""
        return hash_files(list(paths), join(self.root, ".cache", "sha256"))

    def scratch(self, name: str) -> str:
        """A place for state that survives a crash, so that a rerun resumes; made if it is not there."""
        uri = join(self.root, "runs", storage.checked_relative(name))
        if is_local(uri):
            with storage_errors(self.root):
                Path(uri).mkdir(parents=True, exist_ok=True)
        return uri

    def drop_scratch(self, name: str) -> None:
        """Removes what ``scratch(name)`` held."""
        filesystem, path = resolve(join(self.root, "runs", storage.checked_relative(name)))
        storage.delete_folder(filesystem, path)

    def _complete(self, kind: str, version: str) -> Artifact | None:
        if is_local(self.root):
            candidates = [join(self.root, kind, version)]
        else:
            filesystem, path = resolve(join(self.root, kind))
            names = storage.list_folders(filesystem, path)
            candidates = [join(self.root, kind, n) for n in names if n == version or n.startswith(version + ".")]
        complete = []
        for uri in candidates:
            try:
                complete.append(Artifact.peek(uri))
            except ArtifactNotFoundError:
                continue
        return min(complete, key=lambda a: (a.manifest["created_at"], a.uri), default=None)

    def _build_local(self, recipe: Recipe, make: Make, folder: Path) -> Built:
        folder.mkdir()
        try:
            manifest = _make(recipe, make, Draft(str(folder)))
            storage.write_bytes(pafs.LocalFileSystem(), str(folder / MANIFEST), manifest)
            for file in folder.rglob("*"):
                _sync(file)
            _sync(folder)
            target = Path(self.root, recipe.kind, recipe.version)
            target.parent.mkdir(exist_ok=True)
            if target.exists() and not (target / MANIFEST).exists():
                target.rename(folder.with_name(folder.name + ".replaced"))  # a half-removed artifact in the way
            try:
                folder.rename(target)
            except OSError:
                # Without working locks another builder may have been first.
                if found := self.find(recipe):
                    return Built(found, True)
                raise
            _sync(target.parent)
        finally:
            for leftover in folder.parent.glob(folder.name + "*"):
                storage.delete_folder(pafs.LocalFileSystem(), str(leftover))
        return Built(Artifact.peek(str(target)), False)

    def _build_remote(self, recipe: Recipe, make: Make) -> Built:
        self._clean_remote(recipe)
        uri = join(self.root, recipe.kind, f"{recipe.version}.{secrets.token_hex(4)}")
        filesystem, path = resolve(uri)
        draft = Draft(uri)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "started_at": _now()}
        storage.write_bytes(filesystem, join(path, _DRAFT), json.dumps(owner).encode())
        published = False
        try:
            manifest = _make(recipe, make, draft)
            # Somebody else may have finished while we built. Once a manifest lies there it is seen, and its
            # files are in use: from then on two complete attempts stay side by side.
            if first := self._complete(recipe.kind, recipe.version):
                return Built(first, True)
            filesystem.delete_file(join(path, _DRAFT))
            storage.write_bytes(filesystem, join(path, MANIFEST), manifest)
            published = True
        finally:
            if not published:
                storage.delete_folder(filesystem, path)
        return Built(Artifact.peek(uri), False)

    def _clean_remote(self, recipe: Recipe) -> None:
        """Removes unfinished attempts at this version whose process is dead, or that are a week old."""
        filesystem, parent = resolve(join(self.root, recipe.kind))
        for name in storage.list_folders(filesystem, parent):
            path = join(parent, name)
            if not name.startswith(recipe.version + ".") or storage.exists(filesystem, join(path, MANIFEST)):
                continue
            try:
                owner = json.loads(storage.read_bytes(filesystem, join(path, _DRAFT)))
                started = datetime.fromisoformat(owner["started_at"])
                dead = owner["host"] == socket.gethostname() and not Path(f"/proc/{owner['pid']}").exists()
            except (OSError, ValueError, KeyError):
                continue
            if dead or datetime.now(UTC) - started > _ABANDONED:
                log.info("removing an unfinished %s %s", recipe.kind, name)
                storage.delete_folder(filesystem, path)


def _make(recipe: Recipe, make: Make, draft: Draft) -> bytes:
    """Runs ``make`` and describes what it wrote: the text of the manifest, which is the last file to be
    written."""
    filesystem, path = resolve(draft.uri)
    try:
        counts = make(draft) or {}
        canonical_json(counts)
        draft.upload_local()
    finally:
        draft.drop_local()
    sizes = {name: size for name, size in storage.list_files(filesystem, path).items() if name not in RESERVED}

    def described(name: str) -> tuple[int, str]:
        with filesystem.open_input_stream(join(path, name), compression=None) as stream:
            return sizes[name], sha256_stream(stream)

    with ThreadPoolExecutor(max_workers=4) as pool:
        files = dict(zip(sizes, pool.map(described, sizes), strict=True))
    manifest = new_manifest(recipe, counts, files, _now())
    return json.dumps(manifest, indent=1, ensure_ascii=False).encode()


def _clean_local(drafts: Path) -> None:
    """Removes drafts whose process is dead: nobody holds their lock."""
    dead: dict[Path, bool] = {}
    for draft in [d for d in drafts.iterdir() if d.is_dir()]:
        lock = drafts / (draft.name.partition(".")[0] + ".lock")
        if lock not in dead:
            dead[lock] = is_free(lock)
        if dead[lock]:
            log.info("removing an unfinished draft, %s", draft.name)
            storage.delete_folder(pafs.LocalFileSystem(), str(draft))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
