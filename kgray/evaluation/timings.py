"""Where the time of training went, as the models themselves tell it (``phases.json``), for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kgray.artifact import Artifact
from kgray.errors import ArtifactNotFoundError
from kgray.phases import PHASES, total

FILE = "phases.json"


def timings(model: Artifact, members: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Of a model, and of the members of an ensemble, the sum of all rows it kept (:func:`kgray.phases.total`), by name;
    what was not trained over epochs, or by an older kgray, is left out.

    members: versions by name, as an ensemble keeps them.
    """
    names = {version: name for name, version in members.items()}
    found = {}
    sources = {model.version: model.uri} | {s.version: s.uri for s in model.inputs if s.kind == "model"}
    for version, uri in sources.items():
        try:
            artifact = Artifact.peek(uri)
        except ArtifactNotFoundError:
            continue  # the storage has moved; the report does without
        if FILE in artifact.files():
            found[names.get(version, "model")] = total(artifact.read_json(FILE))
    return found


def columns(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The phases that any model spent time in, in their order, what stands in none last."""
    used = {name for row in found.values() for name, seconds in row["seconds"].items() if seconds[1] > 0}
    order = {name: place for place, name in enumerate(PHASES)}
    return sorted(used, key=lambda name: (name not in order, order.get(name, 0), name))
