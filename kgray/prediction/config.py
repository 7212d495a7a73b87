"""What the ``predict`` section of a configuration may say. Floor 6."""

from __future__ import annotations

from typing import Literal

from kgray.config import ConfigPath, configuration, option
from kgray.data.config import Format, Paths
from kgray.errors import ConfigError


@configuration
class QueryColumns:
    """The names columns (JSON keys, Parquet columns) have in the files of queries; one of the three may be absent."""

    head: str = option("head", "Where a relation starts.")
    relation: str = option("relation", "The relation.")
    tail: str = option("tail", "Where it ends.")

    def __post_init__(self) -> None:
        names = (self.head, self.relation, self.tail)
        for key, name in zip(("head", "relation", "tail"), names, strict=True):
            if name == "" or names.count(name) > 1:
                raise ConfigError(key, name, "a column name that no other column has")


@configuration
class PredictConfig:
    """Files of queries answered in a batch. A row that leaves one of head, relation, tail open is completed; a whole
    triple is scored, and ranked among all candidates from either end."""

    queries: Paths | None = option(
        None,
        "Files of queries: head, relation, tail by id or unique name, the part asked for empty or `unknown` (TSV, CSV, "
        "JSONL, Parquet, plain or compressed; paths and globs). Null: jobs.predict has nothing to do.",
    )
    output: ConfigPath | None = option(
        None,
        "One Parquet file of all answers, written beside the artifact where the driver runs, or a URI. Null: the "
        "artifact alone.",
    )
    top_k: int = option(10, "Answers a query at most.")
    filter_known: bool = option(False, "Whether answers that train, valid or test hold already are left out.")
    unknown: str = option("?", "What stands in the place of the part asked for, besides nothing at all.")
    columns: QueryColumns = option(QueryColumns, "The names the columns have in the files.")
    format: Format = option("auto", "Format of the files; auto goes by the file name, as data.format does.")
    header: bool | None = option(
        None, "Whether TSV and CSV begin with a line of column names; null: if that line holds two of predict.columns."
    )
    on_bad_row: Literal["fail", "skip"] = option(
        "fail",
        "fail stops at the first row that cannot be answered (an unknown id, two parts open), before anything is "
        "scored; skip sets up to max_bad_rows aside in quarantine.jsonl.",
    )
    max_bad_rows: int = option(1000, "With on_bad_row=skip: more bad rows than this stop the job all the same.")
    shard_rows: int = option(
        8192, "Queries that are answered, written and kept together: what a run that broke loses of each worker."
    )
    workers: int | None = option(
        None, "Processes that each hold the model. Null: the cores of this machine, or the CPUs of the cluster joined."
    )
    score_memory_mb: int = option(
        256,
        "MiB of scores, and copies of them, a worker holds at once. Where that does not hold 16 rows of all entities, "
        "candidates are scored in ranges and merged.",
    )
    holders: int = option(
        0,
        "Processes among which the candidates of entity queries are divided, each with the states of its range in "
        "memory, where a node's memory does not hold all of them; 0: every worker reads what it needs.",
    )

    def __post_init__(self) -> None:
        if self.queries in ([], ""):
            raise ConfigError("queries", self.queries, "at least one path, or null")
        if self.format == "ntriples":
            raise ConfigError("format", self.format, "auto, tsv, csv, jsonl or parquet: N-Triples leave nothing open")
        for key in ("top_k", "shard_rows", "score_memory_mb"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "a positive number")
        if self.workers is not None and self.workers < 1:
            raise ConfigError("workers", self.workers, "null or a positive number")
        if self.holders < 0:
            raise ConfigError("holders", self.holders, "a number of processes, 0 or more")
        if self.max_bad_rows < 0:
            raise ConfigError("max_bad_rows", self.max_bad_rows, "a number of rows, 0 or more")
