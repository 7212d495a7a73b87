"""Before a training starts anything heavy: what it needs against what the cluster has. Knows Ray through kgray.runtime.

Memory and disk are estimated from counts (estimate.py), time is measured by the workers themselves in their first steps
(probe.py). What does not fit is refused with the numbers and the keys to turn, unless ``train.preflight`` is ``force``.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kgray.artifact import Artifact
from kgray.artifact.filesystem import is_local
from kgray.errors import TrainingError
from kgray.runtime import Room
from kgray.text.config import TextConfig
from kgray.text.places import EncoderPlace, local_place
from kgray.training.config import TrainConfig
from kgray.training.estimate import Estimate, Sizes

log = logging.getLogger(__name__)

CHECKPOINTS = 3
"""Two are kept, and a third is written before the oldest goes."""

_TOKENS = 32  # a text; all of them are counted only where an encoder reads them


@dataclass(frozen=True)
class Disk:
    """A place that is written to. what: for people. needs, free: bytes; free is None where it cannot be asked."""

    what: str
    place: str
    needs: int
    free: int | None


def sizes_of(graph: Artifact, vectors: Artifact | None, text: tuple[TextConfig, EncoderPlace] | None = None) -> Sizes:
    """The counts of a training's artifacts; nothing but manifests is read."""
    counts = graph.counts
    entities = int(counts["entities"])
    encoder = 0
    if text is not None:
        place = Path(local_place(*text).path)
        encoder = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    return Sizes(
        entities=entities,
        relations=int(counts["relations"]),
        triples={k.removeprefix("triples_"): int(v) for k, v in counts.items() if k.startswith("triples_")},
        text_width=0 if vectors is None else int(vectors.counts["dim"]),
        names=sum(graph.bytes_of(name) for name in graph.files("entities")),
        encoder=encoder,
        tokens=_TOKENS * entities if text is not None else 0,
    )


def disks(estimate: Estimate, root: str) -> list[Disk]:
    """What is written to the storage and to the workers' temporary folder, and what is free there."""
    kept = CHECKPOINTS * estimate.checkpoint + estimate.artifact
    found = [Disk("checkpoints and artifact", root, kept, _free(root))]
    scratch = tempfile.gettempdir()
    found.append(Disk("a checkpoint on its way", scratch, estimate.checkpoint, _free(scratch)))
    if all(is_local(disk.place) for disk in found) and _device(root) == _device(scratch):
        return [Disk("checkpoints and artifact", root, kept + estimate.checkpoint, _free(root))]
    return found


def _existing(place: str) -> Path:
    folder = Path(place)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _free(place: str) -> int | None:
    return shutil.disk_usage(_existing(place)).free if is_local(place) else None


def _device(place: str) -> int:
    return _existing(place).stat().st_dev


def table(estimate: Estimate, workers: int, rooms: Sequence[Room], places: Sequence[Disk]) -> str:
    """The estimate as a short text table."""
    lines = [f"{'needs, by estimate':<28}{'':>12}"]
    lines += [f"  {need.name:<26}{size(need.bytes):>12}" for need in estimate.memory]
    lines.append(f"  {'memory of a worker':<26}{size(estimate.total):>12}   {workers} of them")
    if estimate.shared:
        lines.append(f"  {'graph, once a node':<26}{size(estimate.shared):>12}")
    if estimate.closing:
        lines.append(f"  {'who writes the model':<26}{size(estimate.closing):>12}   at the end, with all facts")
    for room in rooms:
        lines.append(f"  {'free on ' + room.node:<26}{size(room.memory):>12}   {room.cpus:g} CPUs")
    for disk in places:
        free = "unknown" if disk.free is None else size(disk.free)
        lines.append(f"  {disk.what:<26}{size(disk.needs):>12}   {free} free at {disk.place}")
    return "\n".join(lines)


def size(number: int) -> str:
    """``1.2 GiB``, ``34 MiB``."""
    if number >= 1 << 30:
        return f"{number / 2**30:.1f} GiB"
    return f"{number / 2**20:.0f} MiB" if number >= 1 << 20 else f"{number / 2**10:.0f} KiB"


def problems(
    estimate: Estimate, train: TrainConfig, share: float, rooms: Sequence[Room], places: Sequence[Disk]
) -> list[str]:
    """What does not fit, each with the numbers and the keys to turn. share: CPUs a worker reserves."""
    found = []
    need = estimate.total
    least = train.least_workers or train.workers
    left = [max(0, room.memory - estimate.shared) for room in rooms]
    holds = sum(min(int(room.cpus // share), int(free // need)) for room, free in zip(rooms, left, strict=True))
    if holds < least:
        largest = sorted((n for n in estimate.memory if n.knobs), key=lambda n: n.bytes, reverse=True)[:2]
        parts = ", ".join(f"{n.name} {size(n.bytes)}" for n in largest)
        knobs = dict.fromkeys(key for n in largest for key in n.knobs)
        fewer = {"train.workers": None} if least > 1 else {}
        where = ", ".join(f"{size(room.memory)} at {room.node}" for room in rooms)
        found.append(
            f"{least} worker{'s' * (least > 1)} of {size(need)} (above all {parts}) cannot be held by the free memory "
            f"({where}): lower {' or '.join(fewer | knobs)}"
        )
    elif max(left) < estimate.closing:
        found.append(
            f"the worker that writes the model loads all facts at the end and needs {size(estimate.closing)} then; no "
            f"node has that free beside the graph ({', '.join(size(free) for free in left)}): a node with more memory"
        )
    for disk in places:
        if disk.free is not None and disk.free < disk.needs:
            found.append(
                f"{disk.what} need {size(disk.needs)} at {disk.place}, where {size(disk.free)} are free: make room "
                "there, point storage.root (or TMPDIR) elsewhere, or lower model.dim"
            )
    return found


def check(
    estimate: Estimate, train: TrainConfig, share: float, rooms: Sequence[Room], places: Sequence[Disk]
) -> None:
    """Log the table; raises TrainingError where something does not fit and ``train.preflight`` is ``check``."""
    log.info("preflight:\n%s", table(estimate, train.workers, rooms, places))
    wrong = problems(estimate, train, share, rooms, places)
    if not wrong:
        return
    if train.preflight == "force":
        log.warning("preflight: %s; training all the same, as train.preflight=force", "; ".join(wrong))
        return
    raise TrainingError(f"{'; '.join(wrong)}. train.preflight=force trains all the same")
