"""Rules mined by Ray tasks, some relations each: a relation's rules do not depend on where they are mined. Floor 6."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kgray.artifact import Artifact, Draft
from kgray.reasoning.config import RulesConfig
from kgray.runtime import cluster_cpus, remote_errors

if TYPE_CHECKING:
    from kgray.reasoning.facts import Facts
    from kgray.reasoning.rules import Rules

log = logging.getLogger(__name__)

_LOG_SECONDS = 10.0
_SHARDS_A_WORKER = 8


def mine(draft: Draft, config: RulesConfig, graph: Artifact) -> Mapping[str, Any]:
    """Mine the training facts of a ``graph`` artifact on the connected cluster and write the model; its counts."""
    import ray

    relations = int(graph.counts["relations"])
    # Every so many-th relation: neighbouring ids are often alike in size, and shards should be.
    number = max(1, min(relations, cluster_cpus() * _SHARDS_A_WORKER))
    # Indexed once, and shared by the workers of a node through Ray's object store.
    facts, remote = ray.remote(_facts).remote(graph), ray.remote(_mine_some)
    tasks = [remote.remote(config, facts, list(range(start, relations, number))) for start in range(number)]
    waiting, begin, said = list(tasks), time.monotonic(), time.monotonic()
    with remote_errors():
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            ray.get(done)
            if time.monotonic() - said > _LOG_SECONDS or not waiting:
                said = time.monotonic()
                spent, left = said - begin, len(waiting) / (number - len(waiting))
                log.info("mine: %d of %d shards, %.0f s left", number - len(waiting), number, spent * left)
        return dict(ray.get(ray.remote(_write).remote(draft, config, graph, *tasks)))


def _facts(graph: Artifact) -> Facts:
    from kgray.graph.graph import Graph
    from kgray.reasoning.facts import Facts

    loaded = Graph.load(graph)
    return Facts.build(loaded.triples["train"], loaded.num_entities, loaded.num_relations)


def _mine_some(config: RulesConfig, facts: Facts, relations: Sequence[int]) -> Rules:
    from kgray.reasoning.mining import mine_rules

    return mine_rules(facts, config, relations)


def _write(draft: Draft, config: RulesConfig, graph: Artifact, *parts: Rules) -> Mapping[str, Any]:
    from kgray.graph.graph import Graph
    from kgray.reasoning.artifact import write_rules
    from kgray.reasoning.rules import Rules

    return write_rules(draft, config, Graph.load(graph), Rules.join(list(parts)))
