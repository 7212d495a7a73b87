"""The embed job: the texts of a graph's entities and relations to a vectors artifact, on a Ray Data actor
pool.

The driver plans units of rows and gets counts back. Actors read their rows from the graph artifact, make
texts, encode what is neither repeated nor known from earlier artifacts, and write the vectors; no text and no
vector passes through the driver. A graph of more than one unit is embedded into chunks under ``runs/``, so
that an interrupted job goes on where it was, and joined into one file a partition at the end.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq

from kgray.artifact import Artifact, Draft, Recipe, Store
from kgray.artifact.filesystem import list_files, read_bytes, resolve
from kgray.config import to_dict
from kgray.errors import ConfigError, UserError
from kgray.text.config import TextConfig
from kgray.text.encoder import resolve_precision
from kgray.text.pieces import Piece, Unit, join_part, plan_units, unit_name
from kgray.text.places import EncoderPlace, find_encoder, tuned_place
from kgray.text.template import template_fields
from kgray.text.vectors import FORMAT, INDEX, entities_file
from kgray.text.worker import Counts, EmbedTask, EmbedUnits

log = logging.getLogger(__name__)

KIND = "vectors"
_DECIDES_A_VECTOR = ("pooling", "normalise", "max_length", "precision")
_DECIDES_A_TEXT = ("template", "relation_template")
_TUNED = "encoder"
_EARLIER = 8
_SAY_EVERY_S = 5.0
_MOST_AUTO_CPUS = 4


def embed_recipe(store: Store, text: TextConfig, graph: Artifact, tuned: Artifact | None = None) -> Recipe:
    """What decides the vectors: the graph, the encoder's files (or the ``tuned`` one, an ``encoder`` artifact), how
    texts are made and read.

    Raises EncoderError when the encoder cannot be found.
    """
    return _recipe(store, text, graph, tuned, place_of(store, text, tuned), _device())


def embed(
    draft: Draft, text: TextConfig, graph: Artifact, store: Store, tuned: Artifact | None = None
) -> dict[str, Any]:
    """Writes the files of a vectors artifact into ``draft`` and returns its counts. Needs a Ray session.

    Raises EncoderError (not found, damaged), ConfigError (``text.template`` names an unknown column,
    ``text.max_length`` beyond the encoder's), StorageError.
    """
    check_columns(text, graph)
    device = _device()
    place = place_of(store, text, tuned)
    recipe = _recipe(store, text, graph, tuned, place, device)
    log.info("embed: encoder %s from %s (%s)", text.encoder, place.how, place.path)
    parts = [(int(start), int(end)) for start, end in graph.read_json("partitions.json")["entities"]]
    relations = int(graph.counts["relations"])
    units = plan_units(parts, relations)
    scratch_name = f"embed-{recipe.version}"
    chunked = len(units) > 1
    out = Draft(store.scratch(scratch_name)) if chunked else draft
    done = _finished(out, units) if chunked else {}
    task = EmbedTask(
        text=text,
        place=place,
        precision=str(recipe.config["precision"]),
        device=device,
        cpus=_cpus_per_worker(text),
        graph=graph,
        earlier=_earlier(store, recipe) if text.reuse else (),
        out=out,
        resumable=chunked,
        tuned=tuned,
    )
    rows = sum(end - start for start, end in parts) + 2 * relations
    counts = Counts()
    for one in done.values():
        counts.add(one)
    if done:
        log.info("embed: %d of %d rows were done by an interrupted run", counts.rows, rows)
    _run([unit for unit in units if unit_name(unit) not in done], task, counts, rows)
    if chunked:
        _join(draft, out, units, counts.dim)
        store.drop_scratch(scratch_name)
    _write_index(draft, text, place, str(recipe.config["precision"]), parts, relations, counts.dim)
    _tell(text, counts)
    return {
        "entities": parts[-1][1] if parts else 0,
        "relations": relations,
        "parts": len(parts),
        "dim": counts.dim,
        "texts": counts.texts,
        "reused": counts.reused,
        "repeated": counts.repeated,
        "truncated": counts.truncated,
        "empty": counts.empty,
        "tokens": counts.tokens,
    }


def place_of(store: Store, text: TextConfig, tuned: Artifact | None = None) -> EncoderPlace:
    """Where the encoder lies on this node, the configured one or the one of an ``encoder`` artifact.

    Raises EncoderError that names every place looked at.
    """
    if tuned is not None:
        return tuned_place(tuned)
    return find_encoder(text, lambda paths: [source.version for source in store.hash_files(paths)])


def _recipe(
    store: Store, text: TextConfig, graph: Artifact, tuned: Artifact | None, place: EncoderPlace, device: str
) -> Recipe:
    config = to_dict(text)
    decides = {key: config[key] for key in (*_DECIDES_A_VECTOR, *_DECIDES_A_TEXT)}
    decides["precision"] = resolve_precision(text.precision, device)
    if tuned is not None:
        # By content too: training again what was removed need not give the same weights under the same version.
        return Recipe(KIND, FORMAT, (graph.source, tuned.source), {**decides, _TUNED: dict(place.files)})
    files = store.hash_files([f"{place.path}/{name}" for name, _ in place.files])
    return Recipe(KIND, FORMAT, (graph.source, *files), decides)


def _device() -> str:
    """Where encoders run; without a session (a dry look at versions) the CPU is assumed."""
    import ray

    from kgray.runtime import device_kind

    return device_kind() if ray.is_initialized() else "cpu"


def check_columns(text: TextConfig, graph: Artifact) -> None:
    """Raises ConfigError for a template that names a column the graph does not have."""
    for key, place in (("template", "entities"), ("relation_template", "relations.parquet")):
        with graph.open(graph.parquet_files(place)[0]) as stream:
            columns = pq.read_schema(stream).names
        for field in template_fields(getattr(text, key)):
            if field not in columns or field == "id":
                known = ", ".join(name for name in columns if name != "id")
                raise ConfigError(
                    f"text.{key}", getattr(text, key), f"columns of the {place.split('.')[0]} ({known})"
                )


def _earlier(store: Store, recipe: Recipe) -> tuple[Artifact, ...]:
    """The newest artifacts whose vectors are the same function of a text: encoder files and reading are
    equal."""
    found = []
    for artifact in store.list(KIND):
        same = all(artifact.config.get(key) == recipe.config.get(key) for key in (*_DECIDES_A_VECTOR, _TUNED))
        files = [source.version for source in artifact.inputs if source.kind == "file"]
        wanted = [source.version for source in recipe.inputs if source.kind == "file"]
        if same and files == wanted and artifact.manifest.get("format") == recipe.format:
            found.append(artifact)
    return tuple(found[:_EARLIER])


def _finished(scratch: Draft, units: Sequence[Unit]) -> dict[str, Counts]:
    """Units that an interrupted run completed: their note was written after their files."""
    import json

    filesystem, path = resolve(scratch.uri)
    there = list_files(filesystem, path)
    done = {}
    for unit in units:
        name = unit_name(unit)
        if name in there and all(piece.name in there for piece in unit):
            done[name] = Counts(**json.loads(read_bytes(filesystem, scratch.path_of(name))))
    return done


def _run(units: Sequence[Unit], task: EmbedTask, counts: Counts, rows: int) -> None:
    """Embeds units on the pool, adds up ``counts``, and says how far it is."""
    begun = said = time.monotonic()
    before = counts.rows
    for one in _stream(units, task) if units else ():
        if isinstance(one, UserError):
            raise one
        counts.add(one)
        now = time.monotonic()
        if now - said >= _SAY_EVERY_S or counts.rows == rows:
            said = now
            rate = (counts.rows - before) / max(now - begun, 1e-9)
            left = (rows - counts.rows) / max(rate, 1e-9)
            log.info("embed: %d of %d rows, %.0f rows/s, %.0f s left", counts.rows, rows, rate, left)


def _stream(units: Sequence[Unit], task: EmbedTask) -> Iterator[Counts | UserError]:
    """Answers of the pool, each as soon as it is there."""
    import ray.data

    gpus = 1 if task.device == "cuda" else 0
    workers = _workers(task, len(units))
    items = [{"unit": pickle.dumps(unit)} for unit in units]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        EmbedUnits,
        fn_constructor_args=(task,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers),
        num_cpus=task.cpus,
        num_gpus=gpus,
    )
    for row in dataset.iter_rows():
        yield pickle.loads(row["done"])


def _cores() -> int:
    """CPUs that compute. Logical CPUs of a single machine may be more than it has cores, and arithmetic gains
    nothing by those."""
    import ray

    from kgray.machine import local_cores
    from kgray.runtime import cluster_cpus

    alone = sum(1 for node in ray.nodes() if node["Alive"]) == 1
    return min(cluster_cpus(), local_cores()) if alone else cluster_cpus()


def _cpus_per_worker(text: TextConfig) -> int:
    """Raises ConfigError for more than any machine of the cluster has."""
    import ray

    most = int(max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]))
    if text.cpus_per_worker is None:
        return max(1, min(_MOST_AUTO_CPUS, most, _cores()))
    if text.cpus_per_worker > most:
        raise ConfigError("text.cpus_per_worker", text.cpus_per_worker, f"at most {most}, the largest node's")
    return text.cpus_per_worker


def _workers(task: EmbedTask, units: int) -> int:
    """Encoders side by side: never more than units, CPUs or GPUs."""
    from kgray.runtime import cluster_gpus

    fit = cluster_gpus() if task.device == "cuda" else _cores() // task.cpus
    return max(1, min(units, fit, task.text.workers or fit))


def _join(draft: Draft, scratch: Draft, units: Sequence[Unit], dim: int) -> None:
    """One file a partition from its chunks, a Ray task each."""
    import ray

    pieces: dict[int, list[Piece]] = {}
    for unit in units:
        for piece in unit:
            pieces.setdefault(piece.part, []).append(piece)
    join_remotely = ray.remote(num_cpus=1, max_retries=0)(_join_guarded)
    answers = [
        join_remotely.remote(draft, scratch, part, sorted(of_part, key=lambda piece: piece.first), dim)
        for part, of_part in pieces.items()
    ]
    for error in ray.get(answers):
        if error is not None:
            raise error


def _join_guarded(
    draft: Draft, scratch: Draft, part: int, pieces: Sequence[Piece], dim: int
) -> UserError | None:
    try:
        join_part(draft, scratch, part, pieces, dim)
    except UserError as error:
        return error
    return None


def _write_index(
    draft: Draft,
    text: TextConfig,
    place: EncoderPlace,
    precision: str,
    parts: Sequence[tuple[int, int]],
    relations: int,
    dim: int,
) -> None:
    index = {
        "dim": dim,
        "relations": relations,
        "encoder": text.encoder,
        "encoder_sha256": place.sha256,
        "encoder_found": place.how,
        "pooling": text.pooling,
        "normalise": text.normalise,
        "max_length": text.max_length,
        "precision": precision,
        "template": text.template,
        "relation_template": text.relation_template,
        "parts": [
            {"file": entities_file(p), "start": start, "end": end} for p, (start, end) in enumerate(parts)
        ],
    }
    draft.write_json(INDEX, index)


def _tell(text: TextConfig, counts: Counts) -> None:
    log.info(
        "embed: %d texts encoded, %d reused, %d repeated, %d rows without text",
        counts.texts,
        counts.reused,
        counts.repeated,
        counts.empty,
    )
    if counts.truncated:
        log.warning(
            "embed: %d of %d texts are longer than text.max_length=%d tokens and were cut",
            counts.truncated,
            counts.texts,
            text.max_length,
        )
