"""The actor that embeds units of rows: one loaded encoder, used for many units. Also runs without Ray."""

from __future__ import annotations

import logging
import pickle
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kgray.artifact import Artifact, Draft
from kgray.errors import EncoderError, UserError
from kgray.text.config import TextConfig
from kgray.text.encoder import TextEncoder
from kgray.text.pieces import RELATION_PART, Piece, Unit, read_piece, unit_name, write_vectors
from kgray.text.places import EncoderPlace, local_place, tuned_place
from kgray.text.reuse import Keys, Known, keys_table, text_keys
from kgray.text.template import entity_texts, relation_texts, template_fields
from kgray.text.vectors import Half

log = logging.getLogger(__name__)

_REMEMBERED = 65536


@dataclass
class Counts:
    """What embedding counted. ``texts``: read by the encoder; ``reused``: taken from earlier artifacts;
    ``repeated``: texts met before in this run; ``truncated``: of ``texts``, cut at max_length; ``empty``:
    rows without text, whose vector is zero."""

    rows: int = 0
    texts: int = 0
    reused: int = 0
    repeated: int = 0
    truncated: int = 0
    empty: int = 0
    tokens: int = 0
    dim: int = 0

    def add(self, other: Counts) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, value if name == "dim" else getattr(self, name) + value)


@dataclass(frozen=True)
class EmbedTask:
    """All an actor must know; small, since it travels to each. ``out``: where files go; ``resumable``:
    whether a unit says in a file of its own that it is done; ``tuned``: the artifact whose encoder reads, None for the
    configured one."""

    text: TextConfig
    place: EncoderPlace
    precision: str
    device: str
    cpus: int
    graph: Artifact
    earlier: tuple[Artifact, ...]
    out: Draft
    resumable: bool
    tuned: Artifact | None = None


class EmbedUnits:
    """Callable on Ray Data batches ``{"unit": [pickled Unit]}``; gives ``{"done": [pickled Counts or
    UserError]}``.

    The encoder is loaded with the first unit, so that what is wrong with it reaches the driver as the answer
    to a unit and not as a dead actor.
    """

    def __init__(self, task: EmbedTask) -> None:
        self._task = task
        self._encoder: TextEncoder | None = None
        self._known: Known | None = None
        self._recent: dict[bytes, Half] = {}

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"done": [pickle.dumps(self._guarded(pickle.loads(unit))) for unit in batch["unit"]]}

    def _guarded(self, unit: Unit) -> Counts | UserError:
        try:
            return self.embed(unit)
        except UserError as error:
            return error

    def embed(self, unit: Unit) -> Counts:
        """Embeds a unit's pieces together and writes their files.

        Raises EncoderError, ConfigError, StorageError.
        """
        texts = [self._texts(piece) for piece in unit]
        vectors, keys, counts = self._vectors([text for part in texts for text in part])
        at = 0
        for piece, part in zip(unit, texts, strict=True):
            rows = slice(at, at + len(part))
            write_vectors(self._task.out, piece.name, vectors[rows])
            if piece.keys:
                self._task.out.write_table(piece.keys, keys_table(keys[rows]))
            at += len(part)
        if self._task.resumable:
            self._task.out.write_json(unit_name(unit), asdict(counts))
        return counts

    def _texts(self, piece: Piece) -> list[str]:
        text = self._task.text
        template = text.relation_template if piece.part == RELATION_PART else text.template
        columns = read_piece(
            self._task.graph, piece, sorted({"name", "external_id", *template_fields(template)})
        )
        return (
            relation_texts(columns, template)
            if piece.part == RELATION_PART
            else entity_texts(columns, template)
        )

    def _vectors(self, texts: list[str]) -> tuple[Half, Keys, Counts]:
        """(n, dim) float16 vectors, keys and counts; a text is encoded once, and not at all if it is
        known."""
        encoder = self._loaded()
        keys = text_keys(texts)
        unique, first, inverse = np.unique(keys.view("V16").ravel(), return_index=True, return_inverse=True)
        rows = np.zeros((unique.size, encoder.dim), dtype=np.float16)
        if self._known is None:
            self._known = Known(self._task.earlier)
        found = self._known.find(keys[first])
        rows[found >= 0] = self._known.take(found[found >= 0], encoder.dim)
        new = []
        for at in np.flatnonzero(found < 0):
            seen = self._recent.get(unique[at].tobytes())
            if seen is None:
                new.append(at)
            else:
                rows[at] = seen
        encoded = encoder.encode([texts[first[at]] for at in new])
        if new:
            rows[new] = self._halved(encoded.vectors, [texts[first[at]] for at in new])
            self._remember({unique[at].tobytes(): rows[at].copy() for at in new})
        reused = int((found >= 0).sum())
        counts = Counts(
            rows=len(texts),
            texts=len(new),
            reused=reused,
            repeated=len(texts) - len(new) - reused,
            truncated=encoded.truncated,
            empty=sum(1 for text in texts if not text),
            tokens=encoded.tokens,
            dim=encoder.dim,
        )
        return rows[inverse], keys, counts

    def _remember(self, rows: dict[bytes, Half]) -> None:
        # Names repeat over a whole graph; bounded, since what is not remembered is only encoded again.
        if len(self._recent) + len(rows) > _REMEMBERED:
            self._recent.clear()
        self._recent.update(rows)

    def _halved(self, vectors: np.ndarray[Any, np.dtype[np.float32]], texts: list[str]) -> Half:
        with np.errstate(over="ignore"):
            half = vectors.astype(np.float16)
        bad = np.flatnonzero(~np.isfinite(half).all(axis=1))
        if bad.size:
            raise EncoderError(
                f"the encoder {self._task.text.encoder} gives values that float16 cannot hold, first for "
                f"{texts[bad[0]][:80]!r}; set text.normalise=true or text.precision=float32"
            )
        return half

    def _loaded(self) -> TextEncoder:
        if self._encoder is None:
            text, tuned = self._task.text, self._task.tuned
            place = local_place(text, self._task.place) if tuned is None else tuned_place(tuned)
            self._encoder = TextEncoder(
                place.path,
                pooling=text.pooling,
                max_length=text.max_length,
                normalise=text.normalise,
                precision=self._task.precision,  # type: ignore[arg-type]
                batch_tokens=text.batch_tokens,
                threads=self._task.cpus,
                device=self._task.device,
            )
        return self._encoder
