"""The outermost layer of the service: headers, limits and the last word on errors, as plain ASGI.

It stands outside FastAPI because these rules must hold for answers that no handler writes (unknown paths,
bodies that never end, failures), and because a body must be measured before anything parses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from kgray.serving.problems import MEDIA_TYPE, Problem

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_DRAIN = 4
"""A body that is too large is still read up to this many times the limit: a client that is busy sending
would see a broken connection instead of the answer if nobody read."""

log = logging.getLogger("kgray.serving")


@dataclass(frozen=True, slots=True)
class GuardRules:
    """``open_paths`` are answered at any load; ``own_request_id``: X-Request-Id is ours to write."""

    version: Callable[[], str]
    max_body_bytes: int
    max_ongoing: int
    max_queued: int
    timeout_s: float
    retry_after_s: int
    own_request_id: bool
    open_paths: frozenset[str] = frozenset({"/healthz", "/readyz"})


class _DisconnectedError(Exception):
    """The client went away while sending."""


class Guard:
    """ASGI middleware; see the module."""

    def __init__(self, app: App, rules: GuardRules) -> None:
        self.app = app
        self.rules = rules
        self._inside = 0
        self._slots = asyncio.Semaphore(rules.max_ongoing)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send, self.rules, _request_id(scope))
        scope.setdefault("state", {})["request_id"] = answer.request_id
        try:
            await self._admit(scope, receive, answer)
        except Problem as problem:
            await answer.refuse(problem)
        except _DisconnectedError:
            return
        except Exception:
            log.exception("request %s failed", answer.request_id)
            await answer.refuse(Problem(500, "internal", "The server failed; its log names this request id."))

    async def _admit(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        rules = self.rules
        if scope["path"] in rules.open_paths:
            await self._run(scope, receive, answer)
            return
        if self._inside >= rules.max_ongoing + rules.max_queued:
            raise Problem(
                429,
                "overload",
                f"The server is busy with {self._inside} requests; try again in {rules.retry_after_s} s.",
                headers={"retry-after": str(rules.retry_after_s)},
            )
        self._inside += 1
        try:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    async with asyncio.timeout(rules.timeout_s):
                        await stack.enter_async_context(self._slots)
                except TimeoutError:
                    raise _too_slow(rules.timeout_s) from None
                await self._run(scope, receive, answer)
        finally:
            self._inside -= 1

    async def _run(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        rules = self.rules
        if scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
            try:
                async with asyncio.timeout(rules.timeout_s):
                    receive = _replay(await _read(scope, receive, rules.max_body_bytes), receive)
            except TimeoutError:
                raise Problem(408, "slow-client", f"The body did not arrive within {rules.timeout_s:g} s.") from None
        try:
            async with asyncio.timeout(rules.timeout_s) as clock:
                await self.app(scope, receive, answer.send)
        except TimeoutError:
            if clock.expired():
                raise _too_slow(rules.timeout_s) from None
            raise


class _Answer:
    """Sends a response with the headers that every answer carries; knows whether one has begun."""

    def __init__(self, send: Send, rules: GuardRules, request_id: str) -> None:
        self._send = send
        self._rules = rules
        self._started = False
        self.request_id = request_id

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            headers = list(message.get("headers", ()))
            headers.append((b"x-kgray-model-version", self._rules.version().encode("latin-1", "replace")))
            if self._rules.own_request_id:
                headers.append((b"x-request-id", self.request_id.encode("latin-1", "replace")))
            message = {**message, "headers": headers}
        await self._send(message)

    async def refuse(self, problem: Problem) -> None:
        if self._started:
            return  # half an answer is out; closing the connection is all that is left
        body = problem.body(self.request_id)
        headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
        headers += [(name.encode(), value.encode("latin-1")) for name, value in problem.headers.items()]
        await self.send({"type": "http.response.start", "status": problem.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _too_slow(seconds: float) -> Problem:
    return Problem(504, "timeout", f"No answer within {seconds:g} s.")


def _request_id(scope: Scope) -> str:
    """The X-Request-Id that came in (Serve's proxy adds one), if short and printable; else a new one."""
    given = _header(scope, b"x-request-id")
    if given and len(given) <= 128 and given.isascii() and given.isprintable():
        return given
    return str(uuid.uuid4())


def _header(scope: Scope, name: bytes) -> str | None:
    for key, value in scope["headers"]:
        if key.lower() == name:
            return bytes(value).decode("latin-1")
    return None


async def _read(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body; Problem 413 when it is larger than ``limit`` bytes, whatever its headers say."""
    declared = _header(scope, b"content-length")
    if declared is not None and declared.isdecimal() and int(declared[:20]) > _DRAIN * limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    while size <= _DRAIN * limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _DisconnectedError
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        else:
            chunks.clear()
        if not message.get("more_body", False):
            break
    if size > limit:
        raise _too_large(limit)
    return b"".join(chunks)


def _too_large(limit: int) -> Problem:
    return Problem(413, "body-too-large", f"The request body is larger than this server's limit of {limit} bytes.")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read already, then what the connection still has to say."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
