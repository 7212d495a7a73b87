"""The whole configuration: one section a component, declared beside that component. Floor 6."""

from __future__ import annotations

import re
from dataclasses import replace

from kgray.config import REQUIRED, ConfigPath, configuration, option
from kgray.data.config import DataConfig
from kgray.data.partition import GraphConfig
from kgray.errors import ConfigError
from kgray.evaluation.config import EnsembleConfig, EvaluateConfig
from kgray.lineage.config import LineageConfig
from kgray.model.config import Ablation, ModelConfig, ablation
from kgray.model.paths_config import PathsConfig
from kgray.model.relations_config import RelationsConfig
from kgray.prediction.config import PredictConfig
from kgray.reasoning.config import RulesConfig
from kgray.runtime import RayConfig
from kgray.serving.config import ServeConfig
from kgray.text.config import TextConfig
from kgray.training.config import PseudoConfig, TrainConfig


@configuration
class StorageConfig:
    """Where artifacts lie."""

    root: ConfigPath = option(
        REQUIRED,
        "Folder or URI (s3://, gs://, whatever pyarrow or fsspec open) of all artifacts; on a cluster every "
        "node must reach it, and it must outlive the job, because the service reads the model from it.",
    )

    def __post_init__(self) -> None:
        if not self.root.strip():
            raise ConfigError("root", self.root, "a folder or URI")


@configuration
class PathsMember:
    """A path model mixed in. It learns from smaller batches at a higher rate than the main one: say 32 and 0.005."""

    model: PathsConfig = option(PathsConfig, "The path model.")
    train: TrainConfig = option(TrainConfig, "How it is trained.")


@configuration
class ModelMember:
    """A model of the main one's kind with settings of its own."""

    model: ModelConfig = option(ModelConfig, "The model; what is not said takes its default, not the main model's.")
    train: TrainConfig | None = option(None, "How it is trained; null: as the main model.")


RESERVED = ("fused", "text_only", "graph_only", "pseudo", "paths", "relations", "rules")
"""Names members have by themselves."""


@configuration
class RelationsMember:
    """A relation classifier mixed into the answers to (head, ?, tail)."""

    model: RelationsConfig = option(RelationsConfig, "The classifier.")
    train: TrainConfig = option(TrainConfig, "How it is trained; validated by the MRR of relations.")


@configuration
class MembersConfig:
    """The models that are mixed with the main one; see ensemble."""

    variants: tuple[Ablation, ...] = option(
        (), "Variants of the model trained beside it: text_only (no graph), graph_only (no text)."
    )
    seeds: tuple[int, ...] = option((), "Seeds of further trainings of the same model (bagging).")
    snapshots: int = option(
        0,
        "Further members from the one training of the main model: its learning rate falls and rises anew so many times "
        "before it falls for the last time, and the weights reached are kept each time (snapshot ensemble, Huang et "
        "al. 2017). It does not stop early then.",
    )
    models: dict[str, ModelMember] = option({}, "Further models, by a name of your own; null takes one of a base away.")
    pseudo: PseudoConfig | None = option(
        None,
        "The main model once more, on its own surest predictions besides the training triples (semi-supervised); "
        "null: none.",
    )
    rules: RulesConfig | None = option(RulesConfig, "Rules mined from training facts; null: none.")
    paths: PathsMember | None = option(
        None, "A path model: messages from the entity a query names along every path at once; null: none."
    )
    relations: RelationsMember | None = option(
        None,
        "A classifier of the relation of a pair, by the relations around its ends and the paths between them; it has a "
        "say in relation queries alone; null: none.",
    )

    def __post_init__(self) -> None:
        for key in ("variants", "seeds"):
            given = getattr(self, key)
            if len(set(given)) != len(given):
                raise ConfigError(key, list(given), "each of them once")
        if self.snapshots < 0:
            raise ConfigError("snapshots", self.snapshots, "a number of 0 or more")
        if any(seed < 0 for seed in self.seeds):
            raise ConfigError("seeds", list(self.seeds), "numbers from 0 up")
        for name in self.models:
            if name in RESERVED or not re.fullmatch(r"\w[\w-]*", name):
                expected = f"a word of letters, digits, _ and -, other than {', '.join(RESERVED)}"
                raise ConfigError("models", name, expected)


@configuration
class Settings:
    """All that a configuration file may say."""

    storage: StorageConfig = option(REQUIRED, "Where artifacts lie.")
    data: DataConfig = option(REQUIRED, "Input files, and how they are read.")
    graph: GraphConfig = option(GraphConfig, "How the graph is laid out.")
    text: TextConfig | None = option(TextConfig, "How texts become vectors; null trains without text.")
    model: ModelConfig = option(ModelConfig, "The model.")
    train: TrainConfig = option(TrainConfig, "How it is trained.")
    members: MembersConfig = option(MembersConfig, "Models mixed with the main one.")
    ensemble: EnsembleConfig = option(EnsembleConfig, "How models are mixed, and their scores calibrated.")
    evaluate: EvaluateConfig = option(EvaluateConfig, "How it is measured.")
    serve: ServeConfig = option(ServeConfig, "The HTTP service.")
    predict: PredictConfig = option(PredictConfig, "Files of queries answered in a batch.")
    lineage: LineageConfig = option(LineageConfig, "Runs and models in MLflow.")
    ray: RayConfig = option(RayConfig, "The Ray cluster to start or to join.")

    def __post_init__(self) -> None:
        # `text: null` alone must do: a model that would read text is then the same model without its text
        # side. Frozen only towards others: this is the one place where the tree is still being made.
        if self.train.seed in self.members.seeds:
            expected = f"seeds other than train.seed={self.train.seed}"
            raise ConfigError("members.seeds", list(self.members.seeds), expected)
        if self.members.snapshots >= self.train.epochs:
            expected = f"fewer than train.epochs={self.train.epochs}: each takes an epoch at least"
            raise ConfigError("members.snapshots", self.members.snapshots, expected)
        if self.text is None:
            object.__setattr__(self, "model", _without_text(self.model))
            models = {k: replace(m, model=_without_text(m.model)) for k, m in self.members.models.items()}
            relations = self.members.relations
            if relations is not None:
                relations = replace(relations, model=replace(relations.model, text=False))
            object.__setattr__(self, "members", replace(self.members, models=models, relations=relations))


def _without_text(model: ModelConfig) -> ModelConfig:
    return model if model.text.kind == "none" else ablation(model, "graph_only")
