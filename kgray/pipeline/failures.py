"""Finding the user's mistake inside what Ray raises. Floor 6.

An exception of a task, actor or Train worker reaches the driver wrapped, sometimes twice, sometimes as text
only. A :class:`~kgray.errors.UserError` in there is what the user must read; all around it is noise to them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from kgray import errors
from kgray.errors import UserError

_IN_TEXT = re.compile(r"\bkgray\.errors\.(\w+): (.+)$", re.MULTILINE)


def user_error(error: BaseException) -> str | None:
    """The one message the user must read, or None where the failure is ours.

    Looks through causes, contexts raised on purpose, and what Ray keeps (``RayTaskError.cause``,
    ``WorkerGroupError.worker_failures``, ``ControllerError.controller_failure``); last into tracebacks kept
    as text.
    """
    seen = list(_within(error))
    for one in seen:
        # Ray's dual exceptions are UserErrors too, but their text is a traceback; their cause tells it.
        if isinstance(one, UserError) and not _is_wrapper(one):
            return message(one)
    for one in seen:
        if _is_wrapper(one) and (found := _from_text(str(one))):
            return found
    return None


def message(error: BaseException) -> str:
    """The error's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _within(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [_attribute(one, "cause"), _attribute(one, "controller_failure"), one.__cause__]
        failures = getattr(one, "worker_failures", None)
        if isinstance(failures, dict):
            waiting += [f for f in failures.values() if isinstance(f, BaseException)]
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
        if not one.__suppress_context__ and _is_wrapper(one):
            waiting.append(one.__context__)


def _attribute(error: BaseException, name: str) -> BaseException | None:
    value = getattr(error, name, None)
    return value if isinstance(value, BaseException) else None


def _is_wrapper(error: BaseException) -> bool:
    return any(base.__module__.partition(".")[0] == "ray" for base in type(error).__mro__)


def _from_text(text: str) -> str | None:
    for match in _IN_TEXT.finditer(text):
        kind = getattr(errors, match.group(1), None)
        if isinstance(kind, type) and issubclass(kind, UserError):
            return " ".join(match.group(2).split())
    return None
