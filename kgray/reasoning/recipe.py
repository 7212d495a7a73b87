"""What a ``model`` artifact of mined rules depends on; asked even when all is up to date: it imports nothing heavy."""

from __future__ import annotations

from kgray.artifact import Artifact, Recipe
from kgray.config import to_dict
from kgray.reasoning.config import RulesConfig

FORMAT = 1
"""Raised whenever mining would find something else in the same graph by the same configuration."""
FAMILY = "rules"


def rules_recipe(config: RulesConfig, graph: Artifact) -> Recipe:
    """The recipe of the rules of a ``graph`` artifact."""
    return Recipe("model", FORMAT, (graph.source,), {"family": FAMILY, "rules": to_dict(config)})
