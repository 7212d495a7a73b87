"""Shards of queries and the notes that say which of them are answered. Loads no torch: the driver looks here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kgray.artifact import Artifact, Draft
from kgray.artifact.filesystem import read_bytes, resolve
from kgray.prediction.config import PredictConfig
from kgray.prediction.holders import Holders


@dataclass(frozen=True)
class Shard:
    """One shard of queries. first: number of its first query; rows: how many it has."""

    group: int
    number: int
    first: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.group:05d}-{self.number:05d}"


@dataclass(frozen=True)
class ShardDone:
    """What the driver is told of an answered shard. file: under the scratch folder; asked: different queries."""

    file: str
    bytes: int
    queries: int
    asked: int
    answers: int


def done_name(shard: Shard) -> str:
    """The note that says a shard is answered, written after its file, which it names with its size."""
    return f"answers/{shard.name}.json"


def finished(out: Draft, shards: Sequence[Shard], there: Mapping[str, int]) -> dict[Shard, ShardDone]:
    """Shards that a run before this one answered, their files whole. there: bytes of each file under ``out``."""
    filesystem, _ = resolve(out.uri)
    done = {}
    for shard in shards:
        if done_name(shard) in there:
            try:
                one = ShardDone(**json.loads(read_bytes(filesystem, out.path_of(done_name(shard)))))
            except (ValueError, TypeError):
                continue  # the run died while it wrote the note
            if there.get(one.file) == one.bytes:
                done[shard] = one
    return done


@dataclass(frozen=True)
class PredictTask:
    """What every worker must know; small, as it travels to each. files: of the queries, by number; version: of the
    predictions; out: the scratch folder with the shards; holders: of the candidates, None where a worker is alone."""

    config: PredictConfig
    model: Artifact
    files: tuple[str, ...]
    version: str
    out: Draft
    holders: Holders | None = None

    def metadata(self) -> dict[str, str]:
        """What the Parquet files say of themselves."""
        return {
            "kgray.predictions": self.version,
            "kgray.model": self.model.version,
            "kgray.top_k": str(self.config.top_k),
            "kgray.filter_known": str(self.config.filter_known).lower(),
        }
