"""N-Triples (https://www.w3.org/TR/n-triples/) to columns of ids.

An IRI's id is the IRI without its angle brackets, escapes undone; a blank node's is its label with ``_:``, so one
label is one node across all files of an ingest. Literals are bad rows: an attribute is no edge.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kgray.data.bad_rows import BadRows

STRING = pa.large_string()
_IRI = r'<[^<>"{}|^`\x00-\x20]+>'
_BLANK = r"_:[\pL\pN_](?:[\pL\pN\pM_.\-·]*[\pL\pN\pM_\-·])?"
_NODE = f"{_IRI}|{_BLANK}"
_LINE = rf"^[ \t]*(?P<h>{_NODE})[ \t]*(?P<r>{_IRI})[ \t]*(?P<t>{_NODE})[ \t]*\.[ \t]*(?:#.*)?\r?\n?$"
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.?))", re.DOTALL)
_LITERAL = re.compile(r'[ \t]*(?:<[^>]*>|_:\S+)[ \t]*<[^>]*>[ \t]*"')


def parse(
    data: bytes, line: int, names: Sequence[str], source: int, bad: BadRows
) -> tuple[dict[str, Any], npt.NDArray[np.int64]]:
    """Triples of a block of whole lines. Returns three (n,) large_string columns by ``names`` and (n,) int64 lines.

    Blank lines and comments are passed over.
    """
    try:
        str(data, "utf-8")
    except UnicodeDecodeError:
        data = _blank_bad_lines(data, line, source, bad)
    texts = _lines(data)
    found = pc.extract_regex(texts, _LINE)
    good = np.asarray(found.is_valid())
    for n in np.flatnonzero(~good):
        text = texts[int(n)].as_py().strip()
        if text and not text.startswith("#"):
            bad.add(source, line + int(n), _problem(text), text)
    found = found.filter(pa.array(good))
    lines = line + np.flatnonzero(good).astype(np.int64)
    columns = [_id(found.field(n)) for n in range(3)]
    broken = np.zeros(len(lines), dtype=bool)
    for column, name in zip(columns, names, strict=True):
        if column.null_count:
            for n in np.flatnonzero(np.asarray(column.is_null()) & ~broken):
                bad.add(source, int(lines[n]), f"a broken escape in the {name}; expected \\uXXXX or \\UXXXXXXXX")
            broken |= np.asarray(column.is_null())
    if broken.any():
        keep = pa.array(~broken)
        columns, lines = [column.filter(keep) for column in columns], lines[~broken]
    return dict(zip(names, columns, strict=True)), lines


def _lines(data: bytes) -> Any:
    """Lines as an array that shares the block's memory, their line ends included."""
    ends = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == 10) + 1
    if not len(ends) or ends[-1] != len(data):
        ends = np.append(ends, len(data))
    offsets = np.concatenate(([0], ends)).astype(np.int64)
    return pa.Array.from_buffers(STRING, len(ends), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def _blank_bad_lines(data: bytes, line: int, source: int, bad: BadRows) -> bytes:
    kept = []
    for n, raw in enumerate(data.split(b"\n")):
        try:
            raw.decode("utf-8")
            kept.append(raw)
        except UnicodeDecodeError as error:
            what = f"byte 0x{raw[error.start]:02x} at position {error.start + 1}"
            bad.add(source, line + n, f"not UTF-8 ({what}); expected UTF-8 text", raw.decode("utf-8", "replace"))
            kept.append(b"")
    return b"\n".join(kept)


def _problem(text: str) -> str:
    if _LITERAL.match(text):
        return "the tail is a literal; expected an IRI or a blank node (an attribute is no edge)"
    if text.startswith('"'):
        return "the head is a literal; expected an IRI or a blank node"
    if not text.endswith(".") and "#" not in text:
        return "no full stop at the end; expected <head> <relation> <tail> ."
    return "not an N-Triples statement; expected <head> <relation> <tail> ."


def _id(terms: Any) -> Any:
    """IRIs without brackets and escapes, blank nodes as they are. Null where an escape is broken."""
    iri = pc.starts_with(terms, "<")
    ids = pc.if_else(iri, pc.utf8_slice_codeunits(terms, 1, -1), terms)
    escaped = np.flatnonzero(np.asarray(pc.match_substring(ids, "\\")))
    if not len(escaped):
        return ids
    values: list[str | None] = ids.to_pylist()
    for n in escaped:
        values[n] = unescape(values[n] or "")
    return pa.array(values, STRING)


def unescape(text: str) -> str | None:
    """``\\uXXXX`` and ``\\UXXXXXXXX`` undone; None where an escape is none of these or no character."""

    def replace(match: re.Match[str]) -> str:
        code = int(match.group(1) or match.group(2) or "110000", 16)
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            raise ValueError
        return chr(code)

    try:
        return _ESCAPE.sub(replace, text)
    except ValueError:
        return None
