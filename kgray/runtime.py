"""The Ray session: the one place that calls ``ray.init``, sets Ray's environment variables and DataContext.
Floor 2.

``with ray_session(config) as session:`` joins the Ray this process is already connected to, else the cluster
that ``config.address`` or RAY_ADDRESS names (inside ``ray job submit`` that is set), else starts one on this
machine and stops it at the end. A variable the user has set is never overwritten; what was set here is taken
back at the end.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

from kgray.config import ConfigPath, configuration, option
from kgray.errors import ClusterError, ConfigError, KgrayError
from kgray.machine import available_memory, local_cores, physical_memory

log = logging.getLogger(__name__)

# Ray Data and one Train worker hold a CPU each at the same time, and a reader and a writer want one too;
# with fewer logical CPUs the worker waits for ever for what its own input occupies. Logical CPUs only count;
# cores are shared.
LEAST_LOGICAL_CPUS = 4
_GIB = 1 << 30
_MOST_OBJECT_STORE = 2 * _GIB
_LEAST_OBJECT_STORE = 80 << 20  # Ray refuses less than 75 MiB

_JOIN_TIMEOUT_S = 5.0  # a head may be starting

# Read by Ray when it is imported or when its processes start; workers of an embedded cluster inherit them.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every print in a training loop appears twice
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # else a relative path in a training worker is lost work
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; silences a warning a task
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",  # 32 processes to read footers is for thousands of files
    # Lines of Ray Train's own, between which a reader would look for kgray's: its watcher asks the dashboard once a
    # second whether training lives, in vain without one; every report is told with all its numbers; a word on an actor.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "Failed to query Ray Train Controller actor state|Reporting training result|"
    "Actor with class name: 'PreemptionWatcher'",
}
_QUIET = {"RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_TQDM": "0"}


@configuration
class RayConfig:
    """Where the work runs."""

    address: str | None = option(
        None,
        "A cluster to join: host:port, ray://host:port, 'auto' for the one on this machine, or 'local' to "
        "start one whatever RAY_ADDRESS says. Null: RAY_ADDRESS if set, else start one here.",
    )
    num_cpus: int | None = option(
        None, "Logical CPUs of a cluster started here. Null: the cores of this machine, four at least."
    )
    num_gpus: int | None = option(None, "GPUs of a cluster started here. Null: all that Ray finds.")
    object_store_memory: int | None = option(
        None, "Bytes of shared memory of a cluster started here. Null: a fifth of the memory, 2 GiB at most."
    )
    include_dashboard: bool = option(False, "Whether a cluster started here has Ray's dashboard.")
    dashboard_port: int | None = option(None, "Port of that dashboard. Null: 8265 or the next free one.")
    metrics_port: int | None = option(
        None, "Port on which a cluster started here offers Prometheus metrics. Null: any free one."
    )
    temp_dir: ConfigPath | None = option(
        None, "Where a cluster started here keeps sockets, logs and spilled objects; short. Null: Ray's own."
    )
    progress: bool | None = option(None, "Progress bars of Ray Data. Null: where stderr is a terminal.")
    log_to_driver: bool = option(True, "Whether what workers print is shown here too.")

    def __post_init__(self) -> None:
        for key, least in (("num_cpus", 1), ("num_gpus", 0), ("object_store_memory", _LEAST_OBJECT_STORE)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ConfigError(key, value, f"null or at least {least}")
        for key in ("dashboard_port", "metrics_port"):
            port = getattr(self, key)
            if port is not None and (not 1024 <= port <= 65535 or 10002 <= port <= 19999):
                raise ConfigError(key, port, "null or a port in 1024..65535, not in Ray's own 10002..19999")
        if self.temp_dir is not None and len(self.temp_dir) > 40:
            # Sockets lie some 65 characters below it, and their paths may have 107.
            raise ConfigError("temp_dir", self.temp_dir, "a path of at most 40 characters")


@dataclass(frozen=True)
class RaySession:
    """What a program is connected to.

    ``embedded``: the cluster was started by this process, and ends with it. ``owner``: by this very session.
    """

    address: str
    embedded: bool
    owner: bool


_embedded_address: str | None = None


@contextmanager
def ray_session(config: RayConfig | None = None) -> Iterator[RaySession]:
    """Connects to Ray for the length of the ``with``; may be nested.

    Raises ClusterError when the cluster to join does not answer, or none can be started here.
    """
    global _embedded_address
    config = config or RayConfig()
    with ExitStack() as stack:
        progress = sys.stderr.isatty() if config.progress is None else config.progress
        stack.enter_context(_environment(_ENVIRONMENT | ({} if progress else _QUIET)))
        import ray

        if ray.is_initialized():
            address = str(ray.get_runtime_context().gcs_address)
            stack.enter_context(_data_context(progress))
            yield RaySession(address, embedded=address == _embedded_address, owner=False)
            return
        joined = config.address or os.environ.get("RAY_ADDRESS") or "local"
        embedded = joined == "local"
        if embedded:
            stack.enter_context(_private_token(config))
        stack.callback(_stop)
        if embedded:
            _start(config)
        else:
            _join(joined, config)
        address = str(ray.get_runtime_context().gcs_address)
        if embedded:
            _embedded_address = address
        stack.enter_context(_data_context(progress))
        log.info("%s Ray at %s, %d logical CPUs", "started" if embedded else "joined", address, cluster_cpus())
        yield RaySession(address, embedded=embedded, owner=embedded)


def cluster_cpus() -> int:
    """Logical CPUs of the connected cluster, at least 1."""
    return max(1, int(_resources().get("CPU", 0)))


def cluster_gpus() -> int:
    """GPUs of the connected cluster."""
    return int(_resources().get("GPU", 0))


@dataclass(frozen=True)
class Room:
    """What a node of the cluster has. memory: bytes that processes there could still have."""

    node: str
    cpus: float
    memory: int


def cluster_rooms() -> list[Room]:
    """The nodes of the connected cluster that have CPUs, each asked itself; one that dies meanwhile is left out."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = ray.remote(num_cpus=0)(available_memory)
    found = []
    for node in ray.nodes():
        cpus = node["Resources"].get("CPU", 0.0)
        if node["Alive"] and cpus:
            here = node["NodeID"] == ray.get_runtime_context().get_node_id()
            # No process need be started to ask the machine this one runs on.
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            memory = available_memory() if here else asked.options(scheduling_strategy=strategy).remote()
            found.append((str(node["NodeManagerAddress"]), float(cpus), memory))
    rooms = []
    for name, cpus, memory in found:
        with suppress(RayError):
            rooms.append(Room(name, cpus, memory if isinstance(memory, int) else ray.get(memory)))
    return rooms


def device_kind() -> Literal["cuda", "cpu"]:
    """What workers of the connected cluster should compute on."""
    return "cuda" if cluster_gpus() > 0 else "cpu"


@contextmanager
def remote_errors() -> Iterator[None]:
    """What kgray raises in a Ray task is raised as if it had happened here: a user's mistake stays one line. Anything
    else keeps the task's traceback."""
    from ray.exceptions import RayTaskError

    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, KgrayError):
            raise error.cause from None
        raise


def worker_progress() -> None:
    """In a worker process: kgray's log goes to stderr, which Ray shows the driver."""
    logger = logging.getLogger("kgray")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # Ray's own handler would say every line twice


def _resources() -> dict[str, float]:
    import ray

    if not ray.is_initialized():
        raise RuntimeError("not connected to Ray: this belongs inside a ray_session")
    return dict(ray.cluster_resources())


def _start(config: RayConfig) -> None:
    import ray

    memory = config.object_store_memory
    if memory is None:
        memory = max(_LEAST_OBJECT_STORE, min(_MOST_OBJECT_STORE, physical_memory() // 5))
    options: dict[str, Any] = {
        "address": "local",
        "num_cpus": config.num_cpus or max(local_cores(), LEAST_LOGICAL_CPUS),
        "num_gpus": config.num_gpus,
        "object_store_memory": memory,
        "include_dashboard": config.include_dashboard,
        "dashboard_port": config.dashboard_port,
        "log_to_driver": config.log_to_driver,
        "logging_level": logging.WARNING,
    }
    if config.temp_dir is not None:
        options["_temp_dir"] = config.temp_dir
    if config.metrics_port is not None:
        options["_metrics_export_port"] = config.metrics_port
    for attempt in (1, 2):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises a bare Exception when its node is not up within 30 s
            _kill_half_started(error)
            if attempt == 2 or "timed out during startup" not in str(error):
                raise ClusterError(f"cannot start Ray on this machine: {_one_line(error)}") from error
            log.warning("Ray did not come up in time, the machine is busy; trying once more")


def _kill_half_started(error: BaseException) -> None:
    """Ends the processes of a node that failed to start. ``ray.init`` forgets such a node, and its processes
    would stay until this one ends; only the traceback still knows it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node: Any = frame.f_locals.get("self")
        if type(node).__name__ == "Node" and hasattr(node, "kill_all_processes"):
            node.kill_all_processes(check_alive=False, allow_graceful=False)


def _join(address: str, config: RayConfig) -> None:
    import ray

    _knock(address)
    try:
        ray.init(address=address, log_to_driver=config.log_to_driver, logging_level=logging.WARNING)
    except (ConnectionError, OSError, TimeoutError, RuntimeError, ValueError) as error:
        reason = _one_line(error)
        if "authentication" in f"{error} {error.__cause__}".lower():
            reason = (
                "it demands a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH "
                "unless ~/.ray/auth_token holds it"
            )
        raise _cannot_join(address, reason) from error


def _cannot_join(address: str, reason: str) -> ClusterError:
    return ClusterError(
        f"cannot join the Ray cluster at {address} (ray.address or RAY_ADDRESS names it; ray.address=local "
        f"starts one here): {reason}"
    )


def _knock(address: str) -> None:
    """Ray itself tries an address where nobody listens for many minutes, silently."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    give_up = time.monotonic() + _JOIN_TIMEOUT_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_JOIN_TIMEOUT_S).close()
            return
        except OSError as error:
            if time.monotonic() > give_up or isinstance(error, socket.gaierror):
                raise _cannot_join(address, _one_line(error)) from error
            time.sleep(0.5)


def _stop() -> None:
    """Disconnects, and stops the cluster where this process started it."""
    global _embedded_address
    import ray

    ray.shutdown()
    _embedded_address = None


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets those that are not set, and takes them back."""
    mine = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in mine})
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


@contextmanager
def _private_token(config: RayConfig) -> Iterator[None]:
    """Lets only this process tree talk to the cluster it starts.

    By itself Ray would write a token to ``~/.ray/auth_token``, and from then on a plain ``ray start --head``
    on this machine demands it of ``ray job submit``. The token here lives in the environment and dies with
    the session. With the dashboard a person must be able to log in, so there Ray's way is kept.
    """
    if config.include_dashboard or os.environ.keys() & {
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
    }:
        yield
        return
    with _environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}):
        _reread_authentication()
        yield
    _reread_authentication()


def _reread_authentication() -> None:
    """Ray keeps mode and token in C++ from the first look at the environment."""
    import ray._raylet as core

    native: Any = core
    native.Config.initialize("")
    native.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _data_context(progress: bool) -> Iterator[None]:
    """Ray Data's settings, for the length of the session."""
    from ray.data import DataContext

    context = DataContext.get_current()
    blocks = max(2, cluster_cpus())
    wanted: dict[str, Any] = {
        "enable_progress_bars": progress,
        "enable_operator_progress_bars": progress,
        "print_on_execution_start": progress,
        # 200 blocks by default: on small data all overhead. Steps with large data say their own number.
        "default_hash_shuffle_parallelism": blocks,
        "read_op_min_num_blocks": blocks,
        # A DataError raised in a worker reaches the user as itself.
        "raise_original_map_exception": True,
    }
    before = {name: getattr(context, name) for name in wanted}
    for name, value in wanted.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
