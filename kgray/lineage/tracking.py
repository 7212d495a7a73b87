"""Runs in MLflow: what went in, what came out, how the numbers moved. Floor 3.

Lineage proper is in the manifests and does not need MLflow (see chain.py); MLflow is where people look. So it
may be absent: whatever goes wrong with it is said once, and every later call does nothing. ``mlflow`` is
imported (5 s) when the first run begins, never earlier, and only ``MlflowClient`` is used: no process-wide
state, one writer.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from kgray.lineage.config import LineageConfig

if TYPE_CHECKING:
    from kgray.artifact import Artifact, Source

log = logging.getLogger(__name__)
T = TypeVar("T")

_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
_PARAMS_A_BATCH = 100  # MLflow's own limits on one log_batch
_METRICS_A_BATCH = 1000
_LONGEST_PARAM = 6000
_LONGEST_DIGEST = 36


class Unreachable(Exception):  # noqa: N818  (never leaves this module)
    """MLflow does not answer; the message says why."""


def tracking_uri(config: LineageConfig, storage_root: str) -> str:
    """Where runs go: the configured URI, else $MLFLOW_TRACKING_URI, else a SQLite file in the storage.

    SQLite needs a local file, so storage on a remote filesystem falls back to ``~/.kgray/mlflow.db``.
    """
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri
    root = storage_root.removeprefix("file://")
    folder = Path.home() / ".kgray" if "://" in root else Path(root).expanduser()
    return f"sqlite:///{folder.absolute() / 'mlflow.db'}"


@dataclass
class Run:
    """One MLflow run; ``id`` is None where MLflow is off or out of reach, and then nothing is recorded."""

    tracker: Tracker
    id: str | None
    name: str

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Record numbers at a step (an epoch). What is not a number is left out."""
        self.tracker._log_metrics(self.id, step, values)

    def tag(self, **tags: str) -> None:
        """Set tags, named ``kgray.<name>``."""
        if self.id is not None:
            self.tracker._log_tags(self.id, {f"kgray.{name}": value for name, value in tags.items()})

    def output(self, artifact: Artifact) -> None:
        """Record the artifact the run wrote: its kind, version and place as tags, its manifest as a file."""
        self.tag(kind=artifact.kind, version=artifact.version, artifact=artifact.uri)
        run_id = self.id
        if run_id is not None:
            manifest = dict(artifact.manifest)
            self.tracker.call(lambda client: client.log_dict(run_id, manifest, "manifest.json"))


@dataclass
class Tracker:
    """Records runs in MLflow as long as MLflow answers.

    The first failure, whatever it is, is logged as one warning (``problem`` keeps it) and ends the recording.
    """

    config: LineageConfig
    storage_root: str
    problem: str | None = None
    _client: Any = field(default=None, repr=False)
    _experiment: str | None = field(default=None, repr=False)

    @property
    def uri(self) -> str:
        return tracking_uri(self.config, self.storage_root)

    @property
    def active(self) -> bool:
        """Whether a call would still be tried."""
        return self.config.enabled and self.problem is None

    def call(self, do: Callable[[Any], T]) -> T | None:
        """``do(client)``, or None where MLflow is off or fails. Never raises an Exception."""
        if not self.active:
            return None
        try:
            return do(self._connect())
        except Exception as error:
            first = str(error).strip().splitlines()
            self.problem = first[0][:300] if first else type(error).__name__
            log.warning(
                "MLflow at %s cannot be used, so this run is not recorded there (%s). The artifacts' "
                "manifests hold the lineage all the same.",
                _without_password(self.uri),
                self.problem,
            )
            return None

    @contextlib.contextmanager
    def run(
        self,
        name: str,
        *,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        inputs: Sequence[Source] = (),
        parent: Run | None = None,
    ) -> Iterator[Run]:
        """A run named ``name``, nested under ``parent``; FINISHED, or FAILED or KILLED as the block is left.

        params: nested plain values, recorded under dotted names. inputs: artifacts (or files) by version.
        """
        run = Run(self, self.call(lambda client: self._start(client, name, tags or {}, parent)), name)
        self._log_params(run.id, params or {})
        self._log_inputs(run.id, inputs)
        try:
            yield run
        except Exception as error:
            run.tag(error=f"{type(error).__name__}: {error}"[:1000])
            self._end(run.id, "FAILED")
            raise
        except BaseException:
            self._end(run.id, "KILLED")
            raise
        self._end(run.id, "FINISHED")

    # -- the parts of a run ----------------------------------------------------------------------------------

    def _connect(self) -> Any:
        if self._client is None:
            probe(self.uri, self.config.timeout_s)
            self._client = _client(self.uri, self.config.timeout_s)
        return self._client

    def _start(self, client: Any, name: str, tags: Mapping[str, str], parent: Run | None) -> str:
        if self._experiment is None:
            self._experiment = _experiment(client, self.config.experiment, self.uri)
        every = {"mlflow.source.type": "JOB", **tags}
        if parent is not None and parent.id is not None:
            every["mlflow.parentRunId"] = parent.id
        run = client.create_run(self._experiment, tags=every, run_name=name)
        return str(run.info.run_id)

    def _end(self, run_id: str | None, status: str) -> None:
        if run_id is not None:
            self.call(lambda client: client.set_terminated(run_id, status=status))

    def _log_params(self, run_id: str | None, params: Mapping[str, Any]) -> None:
        flat = [(key, str(value)[:_LONGEST_PARAM]) for key, value in flatten(params).items()]
        if run_id is None or not flat:
            return

        def do(client: Any) -> None:
            from mlflow.entities import Param

            for at in range(0, len(flat), _PARAMS_A_BATCH):
                client.log_batch(run_id, params=[Param(*pair) for pair in flat[at : at + _PARAMS_A_BATCH]])

        self.call(do)

    def _log_metrics(self, run_id: str | None, step: int, values: Mapping[str, Any]) -> None:
        numbers = {metric_name(key): value for key, value in numeric(values).items()}
        if run_id is None or not numbers:
            return
        now = int(time.time() * 1000)

        def do(client: Any) -> None:
            from mlflow.entities import Metric

            metrics = [Metric(key, value, now, step) for key, value in numbers.items()]
            for at in range(0, len(metrics), _METRICS_A_BATCH):
                client.log_batch(run_id, metrics=metrics[at : at + _METRICS_A_BATCH])

        self.call(do)

    def _log_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        def do(client: Any) -> None:
            from mlflow.entities import RunTag

            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

        self.call(do)

    def _log_inputs(self, run_id: str | None, inputs: Sequence[Source]) -> None:
        if run_id is None or not inputs:
            return

        def do(client: Any) -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            datasets = [
                DatasetInput(
                    # A digest has 36 characters: a file's sha256 is cut, `source` has it all.
                    Dataset(
                        name=source.kind if source.kind != "file" else Path(source.uri).name,
                        digest=source.version[:_LONGEST_DIGEST],
                        source_type="kgray",
                        source=json.dumps(
                            {"kind": source.kind, "version": source.version, "uri": source.uri}
                        ),
                    ),
                    [InputTag("mlflow.data.context", "input")],
                )
                for source in inputs
            ]
            client.log_inputs(run_id, datasets)

        self.call(do)


def job_tags() -> dict[str, str]:
    """Tags that say where a run came from: the Ray submission and the git commit, where there are such."""
    tags = {}
    submission = ray_submission_id()
    if submission:
        tags["ray.submission_id"] = submission
    commit = git_commit()
    if commit:
        tags["mlflow.source.git.commit"] = commit
    return tags


def ray_submission_id() -> str | None:
    """The id under which ``ray job submit`` started this process, or None."""
    try:
        config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        return config.get("metadata", {}).get("job_submission_id")  # type: ignore[no-any-return]
    except (ValueError, AttributeError):
        return None


def git_commit() -> str | None:
    """The commit of the checkout this package lies in, ``-dirty`` where files differ; None without git."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, name))
        else:
            flat[name] = value
    return flat


def numeric(values: Mapping[str, Any]) -> dict[str, float]:
    """The entries, at any depth, that are finite numbers (int or float); keys dotted."""
    return {
        key: value
        for key, value in flatten(values).items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def metric_name(name: str) -> str:
    """A name MLflow takes: ``hits@10`` becomes ``hits_at_10``."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


# -- reaching MLflow --------------------------------------------------------------------------------


def probe(uri: str, timeout_s: float) -> None:
    """Fail early where MLflow cannot be reached; its own clients retry for minutes before they say so.

    Raises Unreachable.
    """
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    if _is_sqlite(uri):
        _probe_sqlite(uri)
    elif parts.hostname and scheme in _PORTS:
        try:
            port = parts.port or _PORTS[scheme]
            with socket.create_connection((parts.hostname, port), timeout=timeout_s):
                return
        except (OSError, ValueError) as error:
            raise Unreachable(f"{parts.hostname}: {error}") from None
    elif scheme in _PORTS:
        raise Unreachable("the URI names no host")


def _probe_sqlite(uri: str) -> None:
    path = _sqlite_path(uri)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path)
        try:
            connection.execute("pragma schema_version").fetchone()
            if not os.access(path, os.W_OK):
                raise Unreachable(f"{path} is not writable")
        finally:
            connection.close()
    except (OSError, sqlite3.Error) as error:
        raise Unreachable(f"{path}: {error}") from None


def _is_sqlite(uri: str) -> bool:
    return urlsplit(uri).scheme.partition("+")[0] == "sqlite"


def _sqlite_path(uri: str) -> Path:
    """The file of ``sqlite:///relative`` or ``sqlite:////absolute``."""
    return Path(uri.partition("://")[2].partition("?")[0][1:] or ":memory:").absolute()


def _client(uri: str, timeout_s: float) -> Any:
    """An MlflowClient that neither retries for minutes nor reports usage home."""
    defaults = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, math.ceil(timeout_s))),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    for noisy in ("alembic", "mlflow.store.db.utils"):  # a line for each migration of a new file
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(uri, registry_uri=uri)


def _experiment(client: Any, name: str, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            # A SQLite file keeps its runs' files beside itself; MLflow would put them into ./mlruns.
            beside = (_sqlite_path(uri).parent / "mlflow").as_uri() if _is_sqlite(uri) else None
            return str(client.create_experiment(name, artifact_location=beside))
        except MlflowException:  # another job made it in between
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise Unreachable(f"the experiment {name!r} is deleted there")
    return str(found.experiment_id)


def _without_password(uri: str) -> str:
    return re.sub(r"//([^/@:]*):[^/@]*@", r"//\1:***@", uri)
