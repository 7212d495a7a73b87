"""Every refusal of the HTTP service in one shape: RFC 9457 ``application/problem+json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

MEDIA_TYPE = "application/problem+json"


class Problem(Exception):  # noqa: N818 - the name RFC 9457 gives it
    """A refusal on its way to the client.

    ``code`` names the kind for programs (it ends the ``type`` URI), ``detail`` says it to people; ``errors``
    point into the request body by JSON pointer (RFC 6901). Never put the inside of the server into any of
    them.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        errors: Sequence[Mapping[str, Any]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = list(errors)
        self.headers = dict(headers or {})

    def body(self, request_id: str) -> bytes:
        """The JSON document; ``instance`` names this one occurrence by its request id, as the logs do."""
        document: dict[str, Any] = {
            "type": f"urn:kgray:problem:{self.code}",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "instance": f"urn:kgray:request:{request_id}",
            "request_id": request_id,
        }
        if self.errors:
            document["errors"] = self.errors
        return json.dumps(document, ensure_ascii=True).encode()


def pointer(*parts: str | int) -> str:
    """RFC 6901 pointer to a member of the request body, ``/triples/3/tail``."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)
