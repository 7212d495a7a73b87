"""How the workers of a training reach its graph: what the driver prepares, and what each worker opens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kgray.artifact import Artifact, Store
from kgray.errors import ConfigError
from kgray.graph.config import StoreConfig
from kgray.model.config import ModelConfig
from kgray.training.families import TrainableConfig, family_of
from kgray.training.variations import Lesson, Variation

if TYPE_CHECKING:
    from kgray.graph.actors import Owners
    from kgray.graph.graph import Graph

log = logging.getLogger(__name__)


class Access(Protocol):
    """Travels from the driver to every worker."""

    def open(self, rank: int) -> Graph:
        """The graph, as this worker is to train on it."""
        ...


@dataclass(frozen=True)
class ResidentAccess:
    """The whole graph, mapped by all workers of a node. ahead: batches made before they are used."""

    graph: Artifact
    ahead: int

    def open(self, rank: int) -> Graph:
        """See :class:`Access`."""
        from kgray.graph.graph import Graph
        from kgray.graph.resident import open_resident

        store = open_resident(self.graph)
        store.ahead = self.ahead
        return Graph.for_training(self.graph, store)


@dataclass(frozen=True)
class PartitionedAccess:
    """The graph as its owners hold it."""

    graph: Artifact
    owners: Owners

    def open(self, rank: int) -> Graph:
        """See :class:`Access`."""
        from kgray.graph.graph import Graph

        return Graph.for_training(self.graph, self.owners.connect(rank))


@contextmanager
def reaching(
    store: Store, graph: Artifact, config: StoreConfig, model: TrainableConfig, variation: Variation | None = None
) -> Iterator[Access]:
    """What a training's workers open the graph by; owners of partitions live as long as the ``with``.

    Raises ConfigError for a model that a partitioned graph cannot train, and what :func:`kgray.graph.actors.owners`
    raises.
    """
    if config.store == "partitioned" and not isinstance(model, ModelConfig):
        log.warning(
            "%s is trained on the whole graph: graph.store=partitioned does not hold for it, every node maps all of it",
            family_of(model).section,
        )
    if config.store == "resident" or not isinstance(model, ModelConfig):
        yield ResidentAccess(graph, config.prefetch)
        return
    if "triples_support" in graph.counts:
        raise ConfigError("graph.store", config.store, "resident, as entities of this graph are held out of training")
    if isinstance(variation, Lesson):
        raise ConfigError("graph.store", config.store, "resident, as members.pseudo asks for all training triples")
    from kgray.graph.actors import owners
    from kgray.graph.shard_build import build_shards

    with owners(build_shards(store, graph), config) as held:
        yield PartitionedAccess(graph, held)
