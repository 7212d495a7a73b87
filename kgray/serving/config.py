"""What may be told to the HTTP service. Every limit is a number here; none is a default of Ray Serve."""

from __future__ import annotations

import ipaddress

from kgray.config import configuration, option
from kgray.errors import ConfigError


@configuration
class ExampleQuery:
    """A question that `deploy` asks the service and prints: two of head, relation, tail."""

    head: str | None = option(None, "External id or unique name of the head entity; null asks for it.")
    relation: str | None = option(None, "External id or unique name of the relation; null asks for it.")
    tail: str | None = option(None, "External id or unique name of the tail entity; null asks for it.")
    top_k: int = option(5, "How many answers to ask for.")
    filter_known: bool = option(False, "Leave out facts of the graph itself.")

    def __post_init__(self) -> None:
        given = sum(part is not None for part in (self.head, self.relation, self.tail))
        if given != 2:
            raise ConfigError("", f"{given} of head, relation, tail", "exactly two of them")
        if self.top_k < 1:
            raise ConfigError("top_k", self.top_k, "at least 1")


@configuration
class ServeConfig:
    """The `serve` section."""

    name: str = option("kgray", "Name of the Serve application and of the model in answers.")
    host: str = option("127.0.0.1", "Address the HTTP server listens on.")
    insecure: bool = option(False, "Allow a host that others can reach, though there is no login.")
    port: int = option(8000, "Port of the HTTP server; Ray's workers use 10002-19999.")
    replicas: int = option(1, "Processes that answer; they map the same files of the model.")
    num_cpus: float = option(0.2, "CPUs Ray reserves a replica; small, so that a laptop can train and serve.")
    threads: int = option(1, "Threads a replica computes with.")
    max_top_k: int = option(1000, "Most answers to one query; more is refused with 422.")
    max_triples: int = option(256, "Most triples in one request to score; more is refused with 422.")
    max_body_bytes: int = option(2 * 1024 * 1024, "Largest request body; larger is refused with 413.")
    max_batch_size: int = option(32, "Requests that are scored together at most.")
    batch_wait_s: float = option(0.005, "Seconds a request waits at most for others to be scored with.")
    max_ongoing_requests: int = option(64, "Requests a replica works on at once.")
    max_queued_requests: int = option(128, "Requests that wait at a replica beyond those; more get 429.")
    retry_after_s: int = option(1, "Seconds a client is asked to wait after 429 or 503.")
    request_timeout_s: float = option(30.0, "Seconds until a request is answered 504.")
    startup_timeout_s: float = option(180.0, "Seconds a deployment may take until it answers.")
    examples: tuple[ExampleQuery, ...] = option((), "Questions asked and printed after deploying.")

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("name", self.name, "a name")
        if not self.insecure and not _is_loopback(self.host):
            raise ConfigError("host", self.host, "a loopback address, or insecure=true: the service asks for no login")
        if not 1 <= self.port <= 65535 or 10002 <= self.port <= 19999:
            raise ConfigError("port", self.port, "1 to 65535, outside 10002-19999 (Ray's worker ports)")
        for key in (
            "replicas",
            "threads",
            "max_top_k",
            "max_triples",
            "max_body_bytes",
            "max_batch_size",
            "max_ongoing_requests",
            "retry_after_s",
        ):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "at least 1")
        for key in ("num_cpus", "request_timeout_s", "startup_timeout_s"):
            if getattr(self, key) <= 0:
                raise ConfigError(key, getattr(self, key), "more than 0")
        for key in ("max_queued_requests", "batch_wait_s"):
            if getattr(self, key) < 0:
                raise ConfigError(key, getattr(self, key), "0 or more")
        for number, example in enumerate(self.examples):
            if example.top_k > self.max_top_k:
                raise ConfigError(f"examples[{number}].top_k", example.top_k, f"at most max_top_k, {self.max_top_k}")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
