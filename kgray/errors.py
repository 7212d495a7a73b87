"""The exceptions a user sees. Floor 1: imports nothing of kgray.

``UserError`` and its kinds are told in one message without a traceback (exit status 2); everything else is a
failure of ours and keeps its traceback (exit status 1).
"""

from __future__ import annotations

import re
from typing import Any

_RAY_ADVICE = re.compile(r"\nFailed to .* after \d+/\d+ attempts")


class KgrayError(Exception):
    """Base of all errors raised on purpose by kgray."""


class UserError(KgrayError):
    """Something the user can put right: the message says where, what was found, and what would be right."""

    def __str__(self) -> str:
        # Ray Data writes its advice about retries into whatever a worker raises; no retry mends a user's mistake.
        return _RAY_ADVICE.split(super().__str__(), maxsplit=1)[0]


class ConfigError(UserError, ValueError):
    """A configuration key holds something it may not.

    Components raise it with a key relative to themselves (``batch_size``); the loader puts the section in
    front.
    """

    def __init__(
        self, key: str, value: Any = None, expected: str = "", *, problem: str = "", where: str = ""
    ) -> None:
        self.key = key
        self.value = value
        self.expected = expected
        self.problem = problem
        self.where = where
        super().__init__(key, value, expected, problem, where)

    def under(self, prefix: str) -> ConfigError:
        """The same error seen from one level up."""
        key = f"{prefix}.{self.key}" if self.key else prefix
        return ConfigError(key, self.value, self.expected, problem=self.problem, where=self.where)

    def at(self, where: str) -> ConfigError:
        """The same error, told with the place (``file:line``) the key stands in, unless it has one
        already."""
        return ConfigError(
            self.key, self.value, self.expected, problem=self.problem, where=self.where or where
        )

    def __str__(self) -> str:
        value = (
            f"{self.value:.60s}..." if isinstance(self.value, str) and len(self.value) > 60 else self.value
        )
        shown = "null" if value is None else repr(value)
        what = self.problem or f"has the value {shown}"
        tail = f"; expected {self.expected}" if self.expected else ""
        at = f"{self.where}: " if self.where else ""
        return f"{at}configuration key '{self.key}' {what}{tail}"

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions cross process borders inside Ray; the keyword arguments would be lost by the default
        # pickling.
        return (_rebuild_config_error, (self.key, self.value, self.expected, self.problem, self.where))


def _rebuild_config_error(key: str, value: Any, expected: str, problem: str, where: str) -> ConfigError:
    return ConfigError(key, value, expected, problem=problem, where=where)


class ConfigFileError(ConfigError):
    """A configuration file is at fault as a whole: missing, not UTF-8, not YAML, a key given twice."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__("", problem=problem, where=where)

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"

    def at(self, where: str) -> ConfigError:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (ConfigFileError, (self.where, self.problem))


class DataError(UserError):
    """Input data is wrong: the message names file and line (or row), the value, and what would be right."""


class EncoderError(UserError):
    """A text encoder cannot be found or is not what it claims to be."""


class StorageError(UserError):
    """The storage refused: full disk, missing rights, unreachable."""


class ClusterError(UserError):
    """A Ray cluster cannot be joined or started."""


class GraphStoreError(ClusterError):
    """A part of the graph that other machines hold is out of reach, and stayed so."""


class TrainingError(UserError):
    """Training cannot go on, by data or configuration: a non-finite loss, too few resources."""


class OutOfMemoryError(TrainingError):
    """Training does not fit into memory, with its batches halved already."""


class ArtifactError(KgrayError):
    """An artifact is missing, incomplete or damaged."""


class ArtifactNotFoundError(ArtifactError, UserError):
    """No artifact answers to the version or place the user gave, or more than one does."""


class NonFiniteError(KgrayError):
    """A score is NaN or infinite; ranking it would look like a perfect or random answer."""
