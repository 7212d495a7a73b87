"""Slots of the model and the parts that can fill them.

A part is registered once, beside its code; the configuration chooses it by name, and an unknown name is answered
with the known ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from kgray.errors import ConfigError

T = TypeVar("T", bound=Callable[..., object])


class Registry(Generic[T]):
    """Named factories of one slot. ``key`` is where the configuration chooses, e.g. ``model.decoder``."""

    def __init__(self, key: str) -> None:
        self.key = key
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: make a factory available under ``name``."""

        def add(part: T) -> T:
            if name in self._parts:
                raise ValueError(f"{self.key}: {name!r} is registered twice")
            self._parts[name] = part
            return part

        return add

    def get(self, name: str) -> T:
        """The factory of that name; raises ConfigError listing the known names."""
        if name not in self._parts:
            raise ConfigError(self.key, name, f"one of {', '.join(self.names())}")
        return self._parts[name]

    def names(self) -> list[str]:
        return sorted(self._parts)
