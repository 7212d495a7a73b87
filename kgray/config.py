"""Typed configuration: declared beside each component, read from YAML, strict. Floor 2, stdlib only at
import.

A component declares what it may be told::

    @configuration
    class TextConfig:
        pooling: Literal["mean", "cls"] = option("mean", "How token vectors become one text vector.")
        max_length: int = option(128, "Tokens a text is cut to.")

        def __post_init__(self) -> None:
            if self.max_length <= 0:
                raise ConfigError("max_length", self.max_length, "a positive number of tokens")

and ``load_config(Settings, "configs/quickstart.yaml", ["text.max_length=64"])`` fills a tree of them. Types
that may be used: bool, int, float, str, ``Literal``, ``X | None``, unions, ``list``, ``tuple``, ``dict[str,
X]``, other configurations, :data:`ConfigPath` and :data:`ConfigPathOrName`. Values are taken as they are
typed: no text becomes a number; only a whole number may stand for a float. Errors are
:class:`~kgray.errors.ConfigError` with the full dotted key, and file and line where the key came from a
file.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin

from kgray.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class PathMark:
    """Marks text that names a place. ``or_name``: it may as well be a name, and is a path only if it looks
    like one (starts with ``/``, ``.`` or ``~``) or exists."""

    or_name: bool = False


ConfigPath = Annotated[str, PathMark()]
"""A path or URI. Relative ones are relative to the YAML they stand in (on the command line: to where it is
run)."""

ConfigPathOrName = Annotated[str, PathMark(or_name=True)]
"""A path, or else a name such as that of a Hugging Face model."""


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()
"""Default of an option that must be given: ``root: ConfigPath = option(REQUIRED, "...")``."""


def option(default: Any, description: str) -> Any:
    """A described field of a configuration.

    ``default`` may be a configuration class (a section, built from its own defaults), a list or dict
    (copied), a plain value, or ``REQUIRED``.
    """
    metadata = {"description": description}
    if default is REQUIRED:
        return field(metadata=metadata)
    if isinstance(default, type) and is_dataclass(default):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def configuration(cls: type[T]) -> type[T]:
    """Make a class a configuration: a frozen, keyword-only, slotted dataclass that this module can read."""
    return dataclass(frozen=True, kw_only=True, slots=True)(cls)


def load_config(cls: type[T], path: str, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file (over its ``base``, where it names one), the one of its ``recipes`` that fits this machine, and
    dotted overrides (``train.epochs=3``) into ``cls``.

    ``${VAR}`` and ``${VAR:-default}`` are replaced in every text (``$${`` stands for ``${``). Override
    values are YAML: ``text=null``, ``data.triples={train: a.tsv}``.

    Raises ConfigError: unreadable file, bad YAML, a key that is unknown, given twice or missing, a wrong
    value.
    """
    from kgray.config_text import read_settings

    found = []
    for raw, origin in read_settings(str(path), overrides):
        try:
            found.append(typing.cast(T, _value(cls, raw, "", origin.place)))
        except ConfigError as error:
            # Of a recipe that is not taken only what stands in it counts: the command line may fit the other alone.
            if not found or error.key in origin.recipe - origin.overridden:
                raise _elsewhere(cls, error).at(origin.where(error.key)) from None
    return found[0]


def show_config(config: Any) -> str:
    """The configuration as YAML, each option's description above it; reading it back gives an equal one."""
    from kgray.config_text import show

    return show(config)


def to_dict(config: Any) -> Any:
    """The configuration as plain JSON values, for versions, manifests and MLflow parameters."""
    if is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return config


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "config.json") -> T:
    """The inverse of :func:`to_dict`, just as strict; nothing is expanded and no path resolved.

    Raises ConfigError, which names ``where``.
    """
    try:
        return typing.cast(T, _value(cls, values, "", None))
    except ConfigError as error:
        raise error.at(where) from None


def description(config_field: dataclasses.Field[Any]) -> str:
    """What an option means, for people."""
    return str(config_field.metadata.get("description", ""))


# --------
# Reading a plain value as a type. ``place(text, mark, key)`` resolves a path; None leaves paths alone.


class EnvText(str):
    """Text that came out of an environment variable: unlike other text it may stand for a number or a
    bool."""

    __slots__ = ()


def _value(kind: Any, value: Any, key: str, place: Any) -> Any:
    origin = get_origin(kind)
    if origin is Annotated:
        inner, *marks = get_args(kind)
        mark = next((m for m in marks if isinstance(m, PathMark)), None)
        if mark is None:
            return _value(inner, value, key, place)
        if not isinstance(value, str) or not value:
            raise ConfigError(key, value, describe(kind))
        return place(value, mark, key) if place is not None else str(value)
    if is_dataclass(kind):
        return _section(typing.cast(type, kind), {} if value is None else value, key, place)
    if origin in (Union, types.UnionType):
        return _union(kind, value, key, place)
    if origin is Literal:
        return _literal(kind, value, key)
    if origin in (list, tuple, Sequence) or kind in (list, tuple):
        return _items(kind, value, key, place)
    if origin in (dict, Mapping) or kind is dict:
        return _mapping(kind, value, key, place)
    return _scalar(kind, value, key)


def _section(cls: type, values: Any, key: str, place: Any) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(key, values, f"keys {', '.join(f.name for f in fields(cls))}")
    known = {f.name: f for f in fields(cls) if f.init}
    types_of = field_types(cls)
    given = {}
    for name, value in values.items():
        if name not in known:
            raise _unknown(key, str(name), list(known))
        given[name] = _value(types_of[name], value, _join(key, name), place)
    for name, f in known.items():
        if name not in given and f.default is MISSING and f.default_factory is MISSING:
            what = description(f) or describe(types_of[name])
            raise ConfigError(_join(key, name), problem="is missing", expected=f"{describe(types_of[name])}: {what}")
    try:
        return cls(**given)
    except ConfigError as error:
        raise (error.under(key) if key else error) from None


def _elsewhere(cls: type, error: ConfigError) -> ConfigError:
    """An unknown key that another section knows by that very name is pointed there (``batch_size=8``)."""
    if error.problem != "is unknown":
        return error
    places: list[str] = []
    waiting: list[tuple[str, Any]] = [("", cls)]
    while waiting:
        prefix, kind = waiting.pop()
        if is_dataclass(kind):
            for name, inner in field_types(typing.cast(type, kind)).items():
                waiting.append((_join(prefix, name), inner))
                if name == error.key.rpartition(".")[2]:
                    places.append(f"'{_join(prefix, name)}'")
        else:
            waiting += [(prefix, inner) for inner in get_args(kind) if not isinstance(inner, str)]
    if not places:
        return error
    return ConfigError(error.key, problem=f"is unknown: did you mean {' or '.join(sorted(places)[:3])}?")


def _unknown(key: str, name: str, known: list[str]) -> ConfigError:
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return ConfigError(_join(key, name), problem=f"is unknown: did you mean '{_join(key, close[0])}'?")
    return ConfigError(
        _join(key, name), problem="is unknown", expected="one of " + ", ".join(_join(key, k) for k in known)
    )


def _union(kind: Any, value: Any, key: str, place: Any) -> Any:
    """The first member that takes the value. When none does, the error of the one the value was plainly
    meant for (a mapping for the only section, a list for the only list), else what all of them would
    take."""
    members = get_args(kind)
    if type(None) in members and _env_value(value) is None:
        return None
    members = tuple(m for m in members if m is not type(None))
    errors: list[tuple[Any, ConfigError]] = []
    for member in members:
        if value is None and is_dataclass(member):
            continue  # only a section of its own may be left empty; in a union null says nothing
        try:
            return _value(member, value, key, place)
        except ConfigError as error:
            errors.append((member, error))
    meant = [error for member, error in errors if _shape(member) == _shape_of(value)]
    if isinstance(value, Mapping | list) and meant:
        raise max(meant, key=lambda error: error.key.count("."))
    if len(members) == 1 and errors and (errors[0][1].key != key or errors[0][1].problem):
        raise errors[0][1]
    raise ConfigError(key, value, describe(kind))


def _shape(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Annotated:
        return _shape(get_args(kind)[0])
    if is_dataclass(kind) or origin in (dict, Mapping) or kind is dict:
        return "mapping"
    if origin in (list, tuple, Sequence) or kind in (list, tuple):
        return "list"
    return "scalar"


def _shape_of(value: Any) -> str:
    return "mapping" if isinstance(value, Mapping) else "list" if isinstance(value, list | tuple) else "scalar"


def _literal(kind: Any, value: Any, key: str) -> Any:
    for candidate in (value, _env_value(value)):
        for allowed in get_args(kind):
            if type(allowed) is type(candidate) and allowed == candidate:
                return allowed
            if isinstance(candidate, str) and allowed == str(candidate):
                return allowed
    from difflib import get_close_matches

    names = [str(a) for a in get_args(kind)]
    close = get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ConfigError(key, value, describe(kind) + hint)


def _items(kind: Any, value: Any, key: str, place: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise ConfigError(key, value, describe(kind))
    arguments = get_args(kind)
    as_tuple = kind is tuple or get_origin(kind) is tuple
    if as_tuple and arguments and arguments[-1] is not Ellipsis:
        if len(arguments) != len(value):
            raise ConfigError(key, value, describe(kind))
        of = list(arguments)
    else:
        of = [arguments[0] if arguments else Any] * len(value)
    items = [_value(one, item, f"{key}[{n}]", place) for n, (one, item) in enumerate(zip(of, value, strict=True))]
    return tuple(items) if as_tuple else items


def _mapping(kind: Any, value: Any, key: str, place: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(key, value, describe(kind))
    arguments = get_args(kind)
    of = arguments[1] if arguments else Any
    # Null takes a section away that a file this one is built on has.
    there = {str(name): item for name, item in value.items() if item is not None or not is_dataclass(of)}
    return {name: _value(of, item, _join(key, name), place) for name, item in there.items()}


def _scalar(kind: Any, value: Any, key: str) -> Any:
    if kind is Any or kind is object:
        return _plain(value)
    if kind is str and isinstance(value, str):
        return str(value)
    value = _env_value(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
        if number - number == 0:  # neither infinite nor NaN
            return number
    if kind is type(None) and value is None:
        return None
    if kind not in (bool, int, float, str, type(None)):
        raise TypeError(f"configuration key {key!r} is declared with the type {kind!r}, which cannot be read")
    hint = " (put it in quotes)" if kind is str and isinstance(value, int | float) else ""
    raise ConfigError(key, value, describe(kind) + hint)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, str) else value


def _env_value(value: Any) -> Any:
    if isinstance(value, EnvText):
        from kgray.config_text import parse_scalar

        return parse_scalar(value)
    return value


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


@lru_cache(maxsize=256)
def field_types(cls: type) -> dict[str, Any]:
    """The resolved type of each field, its ``Annotated`` marks kept."""
    return typing.get_type_hints(cls, include_extras=True)


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    type(None): "null",
}


def describe(kind: Any) -> str:
    """A type in words a user understands."""
    origin = get_origin(kind)
    if origin is Annotated:
        inner, *marks = get_args(kind)
        mark = next((m for m in marks if isinstance(m, PathMark)), None)
        return ("a path or a name" if mark.or_name else "a path") if mark else describe(inner)
    if is_dataclass(kind):
        return "a mapping with " + ", ".join(f.name for f in fields(kind))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(member) for member in get_args(kind))
    if origin is Literal:
        return "one of " + ", ".join("null" if a is None else str(a) for a in get_args(kind))
    if origin is tuple and get_args(kind)[-1] is not Ellipsis:
        return "a list of " + " and ".join(describe(a) for a in get_args(kind))
    if origin in (list, tuple, Sequence):
        return f"a list, each {describe(get_args(kind)[0])}"
    if kind in (list, tuple):
        return "a list"
    if origin in (dict, Mapping):
        return f"a mapping from names to values, each {describe(get_args(kind)[1])}"
    return _WORDS.get(kind, "a value" if kind in (Any, object) else "a mapping" if kind is dict else str(kind))
