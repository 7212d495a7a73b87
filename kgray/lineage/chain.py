"""The chain from an artifact down to the input files it rests on, read from manifests alone. Floor 3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kgray.artifact import Artifact, Source, Store
from kgray.artifact.filesystem import normalise, resolve
from kgray.artifact.manifest import sha256_stream
from kgray.artifact.published import is_artifact
from kgray.errors import ArtifactError, ArtifactNotFoundError, StorageError

_SHOWN_COUNTS = 4
_SHORTEST = 4


@dataclass
class Node:
    """An artifact or an input file, and what it was made from.

    version: 16 hex digits of an artifact, the whole sha256 (64) of a file. problem: what is wrong with it, as
    far as it was looked at; None where nothing is. checked: whether content was compared with its hashes.
    """

    kind: str
    version: str
    uri: str
    created_at: str = ""
    counts: dict[str, Any] = field(default_factory=dict)
    inputs: list[Node] = field(default_factory=list)
    problem: str | None = None
    checked: bool = False

    def walk(self) -> Iterator[Node]:
        """This node and all below it, each once."""
        seen: set[tuple[str, str, str]] = set()
        stack = [self]
        while stack:
            node = stack.pop()
            key = (node.kind, node.version, node.uri)
            if key not in seen:
                seen.add(key)
                yield node
                stack += reversed(node.inputs)

    def files(self) -> list[Node]:
        """The input files the chain ends at."""
        return [node for node in self.walk() if node.kind == "file"]


def trace(target: str, stores: Sequence[Store], *, verify: bool = False) -> Node:
    """The chain of an artifact given by URI or by (a beginning of) its version.

    stores: where versions are looked up, and inputs that no longer lie where the manifest says. verify: also
    hash every file of every artifact and every input file, and note what differs in ``problem``.

    Raises ArtifactNotFoundError when no artifact answers to ``target``.
    """
    return _Tracer(stores, verify).artifact_node(find(target, stores))


def find(target: str, stores: Sequence[Store]) -> Artifact:
    """The artifact of a URI, a version, ``kind/version``, or an unmistakable beginning of a version (four
    digits at least), from the first store that has it. Damaged ones are found too: the chain shows what is
    wrong with them.

    Raises ArtifactNotFoundError.
    """
    if "://" in target or is_artifact(target):
        return Artifact.peek(normalise(target))
    kind, _, version = target.strip().rpartition("/")
    for store in stores:
        matches = _matches(store, kind, version)
        if len(matches) > 1:
            names = ", ".join(sorted(f"{a.kind}/{a.version}" for a in matches))
            raise ArtifactNotFoundError(f"{target!r} may be any of {names} in {store.root}: give more of it")
        if matches:
            return matches[0]
    places = ", ".join(store.root for store in stores) or "no storage at all"
    raise ArtifactNotFoundError(f"no artifact {target!r}, looked for in {places}: give a version or a URI")


def _matches(store: Store, kind: str, version: str) -> list[Artifact]:
    if len(version) < _SHORTEST or "/" in kind:
        return []
    found = [a for a in store.list(kind or None) if a.version.startswith(version)]
    # Of several attempts at one version the oldest counts, and it comes last.
    return list({(a.kind, a.version): a for a in found}.values())


@dataclass
class _Tracer:
    stores: Sequence[Store]
    verify: bool
    done: dict[tuple[str, str, str], Node] = field(default_factory=dict)

    def artifact_node(self, artifact: Artifact) -> Node:
        key = (artifact.kind, artifact.version, artifact.uri)
        if key not in self.done:
            node = Node(
                artifact.kind,
                artifact.version,
                artifact.uri,
                str(artifact.manifest.get("created_at", "")),
                dict(artifact.manifest.get("counts") or {}),
            )
            self.done[key] = node
            try:
                artifact.verify(hashes=self.verify)
                node.checked = self.verify
            except ArtifactError as error:
                node.problem = str(error)
            node.inputs = [self.source_node(source) for source in artifact.inputs]
        return self.done[key]

    def source_node(self, source: Source) -> Node:
        if source.kind == "file":
            key = (source.kind, source.version, source.uri)
            if key not in self.done:
                self.done[key] = self._file_node(source)
            return self.done[key]
        artifact = self._locate(source)
        if artifact is None:
            return Node(
                source.kind, source.version, source.uri, problem="is gone; its own inputs are unknown"
            )
        return self.artifact_node(artifact)

    def _locate(self, source: Source) -> Artifact | None:
        try:
            found = Artifact.peek(source.uri)
            if (found.kind, found.version) == (source.kind, source.version):
                return found
        except (ArtifactError, StorageError, OSError):
            pass  # moved or removed: a store may have it elsewhere
        for store in self.stores:
            for found in _matches(store, source.kind, source.version):
                return found
        return None

    def _file_node(self, source: Source) -> Node:
        node = Node("file", source.version, source.uri)
        if not self.verify:
            return node
        try:
            filesystem, path = resolve(source.uri)
            with filesystem.open_input_stream(path, compression=None) as stream:
                digest = sha256_stream(stream)
        except (OSError, StorageError) as error:
            node.problem = "is gone" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
            return node
        node.checked = True
        if digest != source.version:
            node.problem = f"has changed: its sha256 is now {digest}"
        return node


def render(node: Node) -> str:
    """The chain as an indented tree; what was shown in full further up is only named again."""
    lines: list[str] = []
    _render(node, "", "", set(), lines)
    return "\n".join(lines)


def _render(node: Node, first: str, rest: str, shown: set[tuple[str, str, str]], lines: list[str]) -> None:
    key = (node.kind, node.version, node.uri)
    if node.kind == "file":
        text = f"file {node.uri}"
        detail = f"sha256 {node.version}"
    else:
        text = f"{node.kind} {node.version}"
        counts = ", ".join(f"{k} {_number(v)}" for k, v in _plain_counts(node.counts))
        detail = "  ".join(part for part in (node.uri, node.created_at, counts) if part)
    again = key in shown
    shown.add(key)
    mark = "  [verified]" if node.checked and not node.problem else ""
    lines.append(f"{first}{text}{'  (as above)' if again else mark}")
    if again:
        return
    bar = "│  " if node.inputs else "   "
    lines.append(f"{rest}{bar}{detail}")
    if node.problem:
        lines.append(f"{rest}{bar}PROBLEM: {node.problem}")
    for n, child in enumerate(node.inputs):
        last = n == len(node.inputs) - 1
        _render(child, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "), shown, lines)


def _plain_counts(counts: dict[str, Any]) -> list[tuple[str, Any]]:
    plain = [(k, v) for k, v in counts.items() if isinstance(v, int | float) and not isinstance(v, bool)]
    return plain[:_SHOWN_COUNTS]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
