"""The model registry: every trained model a version, and which of them is the champion. Floor 3.

The rule, applied when a model is registered: it becomes ``champion`` where there is no champion for its graph
version, or where its selection metric (validation MRR; never anything of test) is at least the champion's on
that same graph version; else it becomes ``challenger``. The reason stands in words in the version's tag
``kgray.alias_reason``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from kgray.lineage.tracking import Run, Tracker

if TYPE_CHECKING:
    from kgray.artifact import Artifact

log = logging.getLogger(__name__)

CHAMPION = "champion"
CHALLENGER = "challenger"


@dataclass(frozen=True)
class Registered:
    """A model's place in the registry."""

    name: str
    number: str
    alias: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} version {self.number}, {self.alias}: {self.reason}"


def selection_metric(metrics: Mapping[str, Any]) -> tuple[str, float] | None:
    """The metric models are chosen by: the validation MRR over both directions where there is one, else the
    first validation MRR by name, else None."""
    names = sorted(
        name
        for name, value in metrics.items()
        if name.startswith("valid.") and name.endswith(".mrr") and isinstance(value, int | float)
    )
    both = [name for name in names if name.startswith("valid.both.")]
    chosen = (both or names)[:1]
    return (chosen[0], float(metrics[chosen[0]])) if chosen else None


def choose_alias(
    value: float | None, metric: str | None, graph_version: str, champion: Mapping[str, str] | None
) -> tuple[str, str]:
    """The alias a new model gets, and why. ``champion``: tags of the present champion, or None."""
    if champion is None:
        return CHAMPION, "the first model registered"
    if champion.get("kgray.graph_version") != graph_version:
        return CHAMPION, (
            f"the first model of graph {graph_version}; the champion before was of graph "
            f"{champion.get('kgray.graph_version', 'unknown')}"
        )
    if value is None:
        return CHALLENGER, "it has no validation MRR to be compared by"
    try:
        if champion["kgray.selection_metric"] != metric:
            raise KeyError
        best = float(champion["kgray.selection_value"])
    except (KeyError, ValueError):
        return CHAMPION, f"the champion before has no {metric} to compare with"
    sign = ">=" if value >= best else "<"
    reason = f"{metric} {value:.4f} {sign} {best:.4f} of the champion, both on graph {graph_version}"
    return (CHAMPION if value >= best else CHALLENGER), reason


def register(tracker: Tracker, run: Run, model: Artifact, metrics: Mapping[str, Any]) -> Registered | None:
    """Register the model unless its version is registered already, and give it its alias.

    metrics: what training measured. Returns None where MLflow is off or unreachable, or no name is set.
    """
    name = tracker.config.registered_model
    if name is None:
        return None
    registered = tracker.call(lambda client: _register(client, name, run.id, model, metrics))
    if registered is not None:
        log.info("registered %s", registered)
    return registered


def _register(
    client: Any, name: str, run_id: str | None, model: Artifact, metrics: Mapping[str, Any]
) -> Registered:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(
            name, description="Predictors of relations; alias champion: the one to serve."
        )
    for old in client.search_model_versions(f"name = '{name}'", max_results=10_000):
        if old.tags.get("kgray.version") == model.version:
            alias = old.tags.get("kgray.alias", "none")
            return Registered(name, str(old.version), alias, old.tags.get("kgray.alias_reason", ""))
    graph_version = graph_of(model)
    selected = selection_metric(metrics)
    tags = {
        "kgray.version": model.version,
        "kgray.artifact": model.uri,
        "kgray.graph_version": graph_version,
    }
    if selected:
        tags |= {"kgray.selection_metric": selected[0], "kgray.selection_value": repr(selected[1])}
    metric, value = selected or (None, None)
    alias, reason = choose_alias(value, metric, graph_version, _champion(client, name))
    tags |= {"kgray.alias": alias, "kgray.alias_reason": reason}
    version = _create(client, name, model.uri, run_id, tags)
    client.set_registered_model_alias(name, alias, version.version)
    return Registered(name, str(version.version), alias, reason)


def _create(client: Any, name: str, uri: str, run_id: str | None, tags: dict[str, str]) -> Any:
    """A new version whose source is the artifact. A tracking server refuses local paths outside its own
    folders; there the run stands as the source, and the tag ``kgray.artifact`` says where the model is."""
    from mlflow.exceptions import MlflowException

    source = uri if "://" in uri else f"file://{uri}"
    try:
        return client.create_model_version(name, source, run_id=run_id, tags=tags, await_creation_for=0)
    except MlflowException:
        if run_id is None or urlsplit(source).scheme != "file":
            raise
        return client.create_model_version(
            name, f"runs:/{run_id}", run_id=run_id, tags=tags, await_creation_for=0
        )


def _champion(client: Any, name: str) -> dict[str, str] | None:
    from mlflow.exceptions import MlflowException

    try:
        return dict(client.get_model_version_by_alias(name, CHAMPION).tags)
    except MlflowException:
        return None


def graph_of(model: Artifact) -> str:
    """The version of the graph the model was trained on, from its manifest; empty where none is named."""
    return next((str(s["version"]) for s in model.manifest["inputs"] if s["kind"] == "graph"), "")


def find_registered(tracker: Tracker, uri: str) -> str | None:
    """The artifact URI behind ``models:/NAME@ALIAS`` or ``models:/NAME/NUMBER``; None without one."""
    name, at, alias = uri.removeprefix("models:/").partition("@")

    def find(client: Any) -> str | None:
        from mlflow.exceptions import MlflowException

        try:
            if at:
                version = client.get_model_version_by_alias(name, alias)
            else:
                version = client.get_model_version(*name.rsplit("/", 1))
        except (MlflowException, TypeError):
            return None
        return str(version.tags.get("kgray.artifact") or version.source)

    return tracker.call(find)
