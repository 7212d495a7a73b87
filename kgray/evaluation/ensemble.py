"""The ensemble job: models of one graph become one ``model`` artifact, fitted on validation triples by Ray tasks.

The driver sees file metadata and the counts, never scores: shards leave what they gathered in Ray's object store,
where the one task that fits takes it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kgray.artifact import Artifact, Draft, Recipe
from kgray.config import to_dict
from kgray.errors import ArtifactError, DataError
from kgray.evaluation.config import EnsembleConfig
from kgray.machine import local_cores
from kgray.runtime import cluster_cpus, ray_session, remote_errors, worker_progress

if TYPE_CHECKING:
    from kgray.evaluation.shards import Piece

log = logging.getLogger(__name__)

FORMAT = 5  # 5: probabilities are fitted to worlds that know the answers which validation does not
_SHARDS_A_WORKER = 2
_NOT_IDENTITY = ("score_memory_mb",)


def ensemble_recipe(config: EnsembleConfig, graph: Artifact, members: Mapping[str, Artifact]) -> Recipe:
    """What the ensemble depends on. members: ``model`` artifacts by the name they go by."""
    how = {key: value for key, value in to_dict(config).items() if key not in _NOT_IDENTITY}
    return Recipe(
        "model",
        FORMAT,
        (graph.source, *(member.source for member in members.values())),
        {"family": "ensemble", "members": list(members), "ensemble": how},
    )


def ensemble(
    draft: Draft, config: EnsembleConfig, graph: Artifact, members: Mapping[str, Artifact]
) -> dict[str, Any]:
    """Fit gate and calibration and write the artifact; returns its counts, cross-validated metrics among them.

    Starts or joins Ray where the process is not connected yet. Raises ArtifactError for a member that is no model or
    of another graph, NonFiniteError for a member's score that cannot be ranked.
    """
    if not members:
        raise ArtifactError("an ensemble needs at least one member")
    for name, member in members.items():
        if member.kind != "model":
            raise ArtifactError(f"member {name}: {member.uri} is a {member.kind}, not a model")
    with ray_session() as session:
        workers = local_cores() if session.embedded else cluster_cpus()
        begin = time.monotonic()
        counts = _fit(draft, config, graph, dict(members), workers)
        log.info("ensemble: %d members fitted in %.1f s", len(members), time.monotonic() - begin)
    return counts


def _fit(
    draft: Draft, config: EnsembleConfig, graph: Artifact, members: dict[str, Artifact], workers: int
) -> dict[str, Any]:
    import ray

    from kgray.evaluation.ensemble_fit import gather, prepare
    from kgray.evaluation.shards import plan

    try:
        parts: list[list[Piece]] = plan(graph, "valid", workers * _SHARDS_A_WORKER)
    except DataError:
        parts = []  # no validation triples: members stand as they are
    total = sum(piece.stop - piece.start for part in parts for piece in part)
    share = min(1.0, config.queries / max(total, 1))
    remote_gather, remote_write = ray.remote(gather), ray.remote(_write)
    with remote_errors():
        shared = ray.remote(prepare).remote(graph)
        gathered: list[Any] = []
        for number, part in enumerate(parts):
            if number >= workers:
                # As many members' rows at a time as there are workers; each shard's memory is bounded, not their sum.
                ray.wait(gathered, num_returns=number - workers + 1, fetch_local=False)
            gathered.append(remote_gather.remote(config, graph, members, shared, part, share))
            log.info("ensemble: shard %d of %d, %d validation triples", number + 1, len(parts), total)
        return dict(ray.get(remote_write.remote(draft, config, graph, members, shared, *gathered)))


def _write(
    draft: Draft,
    config: EnsembleConfig,
    graph: Artifact,
    members: Mapping[str, Artifact],
    shared: Any,
    *gathered: Any,
) -> Mapping[str, Any]:
    """The one task that fits; its log goes to the driver through its stderr."""
    from kgray.evaluation.ensemble_fit import write_ensemble

    worker_progress()
    counts = write_ensemble(draft.local_dir(), config, graph, members, shared, gathered)
    draft.upload_local()
    draft.drop_local()
    return counts
