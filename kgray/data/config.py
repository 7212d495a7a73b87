"""What ``data`` may be told: where the triples, tables and documents lie and how strictly they are read."""

from __future__ import annotations

from typing import Literal

from kgray.config import REQUIRED, ConfigPath, configuration, option
from kgray.errors import ConfigError

Paths = ConfigPath | list[ConfigPath]
"""One path, one glob (``*``, ``?``, ``[...]``, ``**``), or a list of them."""

SPLITS = ("train", "valid", "test")
SUPPORT = "support"
"""The edges of held-out entities that are known when they are asked about, and never trained on."""
STORED = (*SPLITS, SUPPORT)
"""All splits a triple may be in, in the order of their numbers."""


@configuration
class SplitPaths:
    """Triples whose split is given by the file they stand in."""

    train: Paths = option(REQUIRED, "Files of the training triples.")
    valid: Paths | None = option(None, "Files of the validation triples.")
    test: Paths | None = option(None, "Files of the test triples.")


@configuration
class SplitConfig:
    """How triples are divided. A triple's split is a hash of the triple and the seed, so it depends on nothing else:
    not on the order of rows, the files, or the number of workers.

    By triples: one source is divided, given splits stay. By entities: whatever the files say, a share of the entities
    is held out of training, and no training triple holds one. Of their triples a share is ``support``, edges known when
    an entity is asked about; the others are asked. A triple with held-out entities of both kinds is never validation:
    what is chosen on validation must not have seen a fact of a test entity."""

    by: Literal["triples", "entities"] = option(
        "triples",
        "triples: shares of one source of triples are held out; entities: shares of the entities are, and given "
        "splits are pooled and divided again.",
    )
    valid: float = option(0.05, "Share of the triples, or of the entities, that goes to validation.")
    test: float = option(0.05, "Share of the triples, or of the entities, that goes to test.")
    seed: int = option(0, "Another seed, another division.")
    support: float = option(0.5, "by=entities: share of the held-out entities' triples known when they are asked.")
    keep_pairs: bool = option(
        True,
        "by=entities: whether triples of the same two entities, in whichever direction, are all support or all asked; "
        "else support may hold the reverse of a fact that is asked, which answers it where a relation is symmetric.",
    )

    def __post_init__(self) -> None:
        for key in ("valid", "test", "support"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "a share from 0 up to, but not including, 1")
        if self.valid + self.test >= 1:
            raise ConfigError("test", self.test, "valid + test below 1, so that something is left to train on")
        if not 0 <= self.seed < 2**63:
            raise ConfigError("seed", self.seed, "a whole number from 0 to 2**63 - 1")


@configuration
class ColumnsConfig:
    """The names columns (JSON keys, Parquet columns) have in the user's files."""

    head: str = option("head", "Triples: where a relation starts.")
    relation: str = option("relation", "Triples: the relation.")
    tail: str = option("tail", "Triples: where it ends.")
    split: str | None = option(
        None, "Triples: a column holding train, valid or test; without a header it is the fourth."
    )
    id: str = option("id", "Entity and relation tables: the external id.")
    name: str = option("name", "Entity and relation tables: the name shown to people.")
    description: str = option("description", "Entity and relation tables: the text the encoder reads.")
    type: str = option("type", "Entity table: the entity's type.")
    doc_id: str = option("doc_id", "Documents: the document's id.")
    text: str = option("text", "Documents: its text.")

    def __post_init__(self) -> None:
        groups = (
            ("head", "relation", "tail", "split"),
            ("id", "name", "description", "type"),
            ("doc_id", "text"),
        )
        for group in groups:
            names = [getattr(self, key) for key in group]
            for key, name in zip(group, names, strict=True):
                if name == "":
                    raise ConfigError(key, name, "a column name")
                if name is not None and names.count(name) > 1:
                    raise ConfigError(key, name, "a name that no other column of the same file has")


@configuration
class SyntheticConfig:
    """A graph that is drawn (see synthetic.py), where ``data.triples`` is a number."""

    entities: int | None = option(None, "Entities to draw from; null: a tenth of the triples.")
    relations: int = option(50, "Relations; the n-th is drawn with a frequency of 1/n of the first one's.")
    communities: int | None = option(
        None, "Communities of entities, on a ring that every relation turns or reflects; null: one for 100 entities."
    )
    exponent: float = option(
        2.5, "Exponent of the power law of degrees, above 2: the nearer to 2, the larger the hubs."
    )
    noise: float = option(0.1, "Share of the triples whose tail is drawn from all entities: what nobody can learn.")
    seed: int = option(0, "Another seed, another graph.")

    def __post_init__(self) -> None:
        for key, least in (("entities", 1), ("relations", 1), ("communities", 1)):
            value = getattr(self, key)
            if value is not None and not least <= value < 2**31:
                raise ConfigError(key, value, f"a number from {least} to 2**31 - 1")
        if not 2.05 <= self.exponent <= 20:
            raise ConfigError("exponent", self.exponent, "a number from 2.05 to 20")
        if not 0 <= self.noise <= 1:
            raise ConfigError("noise", self.noise, "a share from 0 to 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError("seed", self.seed, "a whole number from 0 to 2**63 - 1")

    def entities_of(self, triples: int) -> int:
        """Entities of a graph of so many triples."""
        return max(1, triples // 10) if self.entities is None else self.entities

    def communities_of(self, entities: int) -> int:
        """Communities of a graph of so many entities."""
        return max(1, entities // 100) if self.communities is None else self.communities


Format = Literal["auto", "tsv", "csv", "jsonl", "parquet", "ntriples"]


@configuration
class DataConfig:
    """The input of the ingest job."""

    triples: Paths | SplitPaths | int = option(
        REQUIRED,
        "Triples: train/valid/test paths, or one source that `data.split` divides; a whole number draws a graph of so "
        "many, as `data.synthetic` says.",
    )
    synthetic: SyntheticConfig = option(SyntheticConfig, "What is drawn where data.triples is a number.")
    split: SplitConfig = option(
        SplitConfig, "How triples are divided; of given splits only where whole entities are held out."
    )
    entities: Paths | None = option(
        None, "Entity table (id, name, description, type, more): then every entity of a triple needs a row."
    )
    relations: Paths | None = option(
        None, "Relation table (id, name, description, more): then every relation of a triple needs a row."
    )
    documents: Paths | None = option(None, "Documents (doc_id, text, more), or plain .txt files, one document each.")
    columns: ColumnsConfig = option(ColumnsConfig, "The names the columns have in the files.")
    format: Format = option(
        "auto",
        "Format of the triples; auto goes by the file name (.tsv .txt .csv .jsonl .parquet .nt, plain or "
        ".gz .bz2 .zst .xz).",
    )
    undirected: bool = option(
        False,
        "Whether (a, r, b) says the same as (b, r, a), as friendship does: both are then one fact, kept once, in one "
        "split, and known whichever end is asked for.",
    )
    header: bool = option(False, "Whether TSV and CSV triples begin with a line of column names.")
    on_bad_row: Literal["fail", "skip"] = option(
        "fail", "fail stops at the first bad row; skip sets up to max_bad_rows aside in quarantine.jsonl."
    )
    max_bad_rows: int = option(1000, "With on_bad_row=skip: more bad rows than this stop the job all the same.")

    def __post_init__(self) -> None:
        if self.max_bad_rows < 0:
            raise ConfigError("max_bad_rows", self.max_bad_rows, "a number of rows, 0 or more")
        for key in ("triples", "entities", "relations", "documents"):
            value = getattr(self, key)
            if value == [] or value == "":
                raise ConfigError(key, value, "at least one path")
        if isinstance(self.triples, int):
            self._check_synthetic(self.triples)
        columns = self.columns.split
        if columns is not None and isinstance(self.triples, SplitPaths):
            raise ConfigError("columns.split", columns, "null where data.triples gives train, valid and test apart")

    def _check_synthetic(self, triples: int) -> None:
        if not 1 <= triples < 2**40:
            raise ConfigError("triples", triples, "a number of synthetic triples from 1 to 2**40 - 1, or paths")
        for key in ("entities", "relations"):
            if getattr(self, key) is not None:
                raise ConfigError(key, getattr(self, key), "null where data.triples is a number: its ids are drawn too")
        if self.columns.split is not None:
            raise ConfigError("columns.split", self.columns.split, "null where data.triples is a number")
        entities = self.synthetic.entities_of(triples)
        if entities >= 2**31:
            raise ConfigError("synthetic.entities", self.synthetic.entities, "below 2**31 entities")
        if self.synthetic.communities_of(entities) > entities:
            expected = f"at most the {entities} entities"
            raise ConfigError("synthetic.communities", self.synthetic.communities, expected)
