"""Texts that a vectors artifact does not hold, read exactly as it read its own: same encoder, template and pooling."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kgray.errors import EncoderError
from kgray.text.config import TextConfig
from kgray.text.places import EncoderPlace, find_encoder
from kgray.text.template import entity_texts, template_fields
from kgray.text.vectors import Half

if TYPE_CHECKING:
    from kgray.text.encoder import TextEncoder


class SameEncoder:
    """The encoder of a vectors artifact, loaded when the first text is read. Thread-safe.

    index: the artifact's index.json. find: where the encoder lies, asked when it is loaded; if None only local places
    are searched: the directory the index names, the Hugging Face cache, the minilm extra.
    """

    def __init__(self, index: Mapping[str, Any], find: Callable[[], EncoderPlace] | None = None) -> None:
        self.index, self._find = index, find
        self._lock = threading.Lock()
        self._encoder: TextEncoder | None = None
        self._last: tuple[str, Half] | None = None  # an entity is often asked about again, with other facts

    def entity(self, name: str, description: str) -> Half:
        """(dim,) float16 vector of an entity's text; zeros where it has none. Other columns of the template are empty.

        Raises EncoderError where the encoder is not at hand, or is another than the one that made the vectors.
        """
        fields = template_fields(self.index["template"])
        columns = {key: [""] for key in {"external_id", *fields}} | {"name": [name], "description": [description]}
        (text,) = entity_texts(columns, self.index["template"])
        if not text:
            return np.zeros(int(self.index["dim"]), dtype=np.float16)
        with self._lock:
            if self._last is None or self._last[0] != text:
                self._last = text, self._read(text)
            return self._last[1]

    def _read(self, text: str) -> Half:
        with np.errstate(over="ignore"):
            half: Half = self._loaded().encode([text]).vectors[0].astype(np.float16)
        if not np.isfinite(half).all():
            raise EncoderError(f"the encoder gives values that float16 cannot hold for {text[:80]!r}")
        return half

    def _loaded(self) -> TextEncoder:
        if self._encoder is None:
            from kgray.text.encoder import TextEncoder

            index = self.index
            found = self._find
            place = find_encoder(TextConfig(encoder=index["encoder"], offline=True)) if found is None else found()
            if place.sha256 != index["encoder_sha256"]:
                raise EncoderError(
                    f"the encoder {index['encoder']} at {place.path} is not the one that read the graph's texts "
                    f"(sha256 {place.sha256[:12]}..., {index['encoder_sha256'][:12]}...)"
                )
            self._encoder = TextEncoder(
                place.path,
                pooling=index["pooling"],
                max_length=int(index["max_length"]),
                normalise=bool(index["normalise"]),
                precision=index["precision"],
            )
        return self._encoder
