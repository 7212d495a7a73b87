"""What ``lineage`` may be told: where MLflow is and under which names runs and models go there."""

from __future__ import annotations

from kgray.config import configuration, option
from kgray.errors import ConfigError


@configuration
class LineageConfig:
    """Runs and models in MLflow. The chain of artifacts itself needs none of it: manifests hold that."""

    enabled: bool = option(True, "Whether runs are recorded in MLflow at all.")
    tracking_uri: str | None = option(
        None,
        "MLflow tracking URI; null: $MLFLOW_TRACKING_URI, else the SQLite file mlflow.db in storage.root.",
    )
    experiment: str = option("kgray", "MLflow experiment of the runs.")
    registered_model: str | None = option(
        "kgray", "Name trained models are registered under; null registers none."
    )
    timeout_s: float = option(
        5.0,
        "Seconds to wait for MLflow; one that does not answer is named once and the job goes on without it.",
    )

    def __post_init__(self) -> None:
        if self.timeout_s <= 0:
            raise ConfigError("timeout_s", self.timeout_s, "a number of seconds above 0")
        for key in ("tracking_uri", "experiment", "registered_model"):
            if getattr(self, key) == "":
                raise ConfigError(
                    key, "", "text that is not empty" + ("" if key == "experiment" else ", or null")
                )
