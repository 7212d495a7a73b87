"""The families of models that the training loop trains, by their configuration. No torch: recipes are made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from kgray.model.config import ModelConfig
from kgray.model.paths_config import PathsConfig
from kgray.model.relations_config import RelationsConfig
from kgray.text.tuning_config import TuningConfig

TrainableConfig: TypeAlias = ModelConfig | PathsConfig | RelationsConfig | TuningConfig


@dataclass(frozen=True, slots=True)
class Family:
    """section: what its configuration is called in a recipe. task: ``module:class`` of its Task, not imported here."""

    section: str
    task: str


_FAMILIES: dict[type, Family] = {
    ModelConfig: Family("model", "kgray.training.fused_task:FusedTask"),
    PathsConfig: Family("paths", "kgray.training.paths_task:PathsTask"),
    RelationsConfig: Family("relations", "kgray.training.relations_task:RelationsTask"),
    TuningConfig: Family("tuning", "kgray.training.encoder_task:EncoderTask"),
}


def family_of(config: TrainableConfig) -> Family:
    """The family a configuration belongs to."""
    return _FAMILIES[type(config)]
