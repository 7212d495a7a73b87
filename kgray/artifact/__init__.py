"""What lies on disk: content-hashed, immutable artifacts, the only thing jobs pass to each other. Floor 2."""

from kgray.artifact.draft import Draft
from kgray.artifact.manifest import Recipe, Source
from kgray.artifact.published import Artifact
from kgray.artifact.store import Built, Store

__all__ = ["Artifact", "Built", "Draft", "Recipe", "Source", "Store"]
