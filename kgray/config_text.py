"""The text side of the configuration: YAML with line numbers, overrides, environment, and showing it. Floor
2.

Scalars are read as in YAML 1.2, so that ``1e-3`` is a number, ``on`` is a word and ``2020-01-01`` is text;
whole numbers may carry underscores (``1_000_000``).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kgray.config import EnvText, PathMark, description
from kgray.config_recipes import NONE, RECIPE, RECIPES, Layer, choose, layered, names
from kgray.errors import ConfigError, ConfigFileError

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)$")
_HEX = re.compile(r"0x[0-9a-fA-F]+$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*$")
BASE = "base"
"""The key by which a file names another one that it changes."""
# What YAML wants escaped and JSON does not escape.
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


class UnsetVariableError(ConfigError):
    """A key needs an environment variable that is not set."""


@dataclass
class Origin:
    """Where the settings came from: the file, and for each dotted key the file it stands in and its line there. recipe:
    the keys that a recipe changes."""

    path: str
    lines: dict[str, tuple[str, int]] = field(default_factory=dict)
    overridden: set[str] = field(default_factory=set)
    recipe: set[str] = field(default_factory=set)

    def find(self, key: str) -> tuple[str, int | None]:
        """File and line of the key, or of the nearest section around it that a file has; no file: the command line."""
        while True:
            if key in self.overridden:
                return "", None
            if key in self.lines:
                return self.lines[key]
            if not key:
                return self.path, None
            key = re.sub(r"(\.[^.\[]*|\[\d+\]|^[^.\[]*)$", "", key)

    def where(self, key: str) -> str:
        """``file:line`` of :meth:`find`, for a message."""
        path, line = self.find(key)
        return "command line" if not path else path if line is None else f"{path}:{line}"

    def forget(self, key: str) -> None:
        """The key is given anew: where it and what is below it stood counts no more."""
        for known in [k for k in self.lines if k == key or k.startswith((key + ".", key + "["))]:
            del self.lines[known]

    def place(self, text: str, mark: PathMark, key: str) -> str:
        """A path made absolute; URIs, and names where names may stand, are left alone."""
        text = str(text)
        if _SCHEME.match(text) or not text:
            return text
        path, _ = self.find(key)
        here = Path(path).resolve().parent if path else Path.cwd()
        if text == "~" or text.startswith("~/"):
            return str(Path(text).expanduser())
        absolute = os.path.normpath(here / text)
        if mark.or_name and not text.startswith(("/", ".")) and not Path(absolute).exists():
            return text
        return absolute


def read_settings(path: str, overrides: Sequence[str]) -> list[tuple[dict[str, Any], Origin]]:
    """What the file says over its ``base``, where it names one, with the recipe for this machine, overrides laid over
    all of it and variables expanded; and where each key stands. After it the same with each other recipe instead, as
    far as the variables they name are set: what is wrong in one should not wait for the machine that takes it.

    A recipe changes the file it stands in, and what is built on that file has the last word.

    Raises ConfigError (ConfigFileError where a file as a whole is at fault).
    """
    origin = Origin(path)
    layers = _read_layers(path, ())
    for layer in layers:
        origin.lines |= layer.lines
    asked, rest = _asked(overrides, origin)

    def plain(value: Any, key: str) -> Any:
        found = _expand(value, key, origin)
        return parse_scalar(found) if isinstance(found, EnvText) else found

    chosen = choose(layers, asked, path, plain, origin.where)
    found = [_read(path, layers, chosen, rest)]
    for name in names(layers):
        if name != chosen:
            with contextlib.suppress(UnsetVariableError):
                found.append(_read(path, layers, name, rest))
    return found


def _asked(overrides: Sequence[str], origin: Origin) -> tuple[dict[str, Any], list[str]]:
    """What overrides say of ``recipe``, and the other overrides."""
    asked: dict[str, Any] = {}
    rest = []
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key == RECIPE:
            _override(asked, override, origin)
        elif key.split(".")[0] in (RECIPE, RECIPES):
            expected = f"{RECIPE}=NAME, {RECIPE}={NONE}, or the keys that the recipe changes"
            raise ConfigError(key, problem="is no override", expected=expected).at("command line")
        else:
            rest.append(override)
    return asked, rest


def _read(path: str, layers: Sequence[Layer], recipe: str, overrides: Sequence[str]) -> tuple[dict[str, Any], Origin]:
    """The layers with one of their recipes."""
    origin = Origin(path)
    raw: dict[str, Any] = {}
    for layer in layers:
        changes = layer.changes(recipe)
        for said, lines in ((layer.said, layer.lines), *([changes] if changes else [])):
            raw = _lay_over(raw, said, "", origin)
            origin.lines |= lines
        origin.recipe |= changes[1].keys() if changes else set()
    for override in overrides:
        _override(raw, override, origin)
    return {key: _expand(value, key, origin) for key, value in raw.items()}, origin


def _read_layers(path: str, below: tuple[Path, ...]) -> list[Layer]:
    """What the bases of a file and at last the file itself say. below: the files whose base this one is."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigFileError(path, "no such configuration file") from None
    except UnicodeDecodeError as error:
        raise ConfigFileError(path, f"not UTF-8 (byte {error.start}: {error.reason})") from None
    except OSError as error:
        raise ConfigFileError(path, f"cannot be read: {error.strerror}") from None
    lines: dict[str, int] = {}
    said = parse_yaml(text, path, lines)
    if said is not None and not isinstance(said, dict):
        raise ConfigFileError(path, "must hold keys and values (section: ...) at the top level")
    raw: dict[str, Any] = said or {}
    layers: list[Layer] = []
    if BASE in raw:
        base, at = raw.pop(BASE), f"{path}:{lines.pop(BASE)}"
        if not isinstance(base, str):
            raise ConfigError(BASE, base, "the path of a configuration file").at(at)
        here = (*below, Path(path).resolve())
        found = Path(path).parent / (Path(base).expanduser() if base.startswith("~/") else base)
        if not found.is_file():
            raise ConfigError(BASE, base, "a configuration file, its path relative to this one").at(at)
        if found.resolve() in here:
            raise ConfigFileError(at, f"base: {base} is built on this very file")
        layers = _read_layers(os.path.normpath(found), here)
    places = {key: (path, line) for key, line in lines.items()}
    return layered(layers, raw, places, Origin(path, places).where)


def _lay_over(base: dict[str, Any], raw: dict[str, Any], prefix: str, origin: Origin) -> dict[str, Any]:
    """``base`` with what ``raw`` says in its place: sections key by key, all else (lists too) as a whole."""
    merged = dict(base)
    for name, value in raw.items():
        key = f"{prefix}.{name}" if prefix else name
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            merged[name] = _lay_over(base[name], value, key, origin)
        else:
            merged[name] = value
            origin.forget(key)
    return merged


def parse_yaml(text: str, path: str, lines: dict[str, int] | None = None) -> Any:
    """YAML text as plain values; ``lines`` is filled with the line of each dotted key.

    Raises ConfigFileError with file and line: bad syntax, a key given twice, a key that is not text.
    """
    import yaml

    try:
        loader = _loader()(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_keys(node, "", path, {} if lines is None else lines, ())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{path}:{mark.line + 1}" if mark else path
        raise ConfigFileError(at, f"bad YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigFileError(path, "bad YAML: " + " ".join(str(error).split())) from None


def parse_scalar(text: str) -> Any:
    """Plain text as YAML 1.2 reads a plain scalar."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if _INT.match(text):
        return int(text.replace("_", ""))
    if _HEX.match(text):
        return int(text, 16)
    if _FLOAT.match(text):
        return float(text)
    if text.lower() in (".inf", "+.inf", "-.inf", ".nan"):
        return float(text.lower().replace(".", "", 1))
    return str(text)


@lru_cache(maxsize=1)
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader with the scalars of YAML 1.2."""

        yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012  (the base class wants a class attribute)

    plain = "tag:kgray,2026:plain"
    Loader.yaml_implicit_resolvers = {None: [(plain, re.compile(r"(?s).*"))]}
    Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
    Loader.add_constructor(plain, _plain_scalar)
    return Loader


def _plain_scalar(loader: Any, node: Any) -> Any:
    return parse_scalar(loader.construct_scalar(node))


def _check_keys(node: Any, prefix: str, path: str, lines: dict[str, int], above: tuple[int, ...]) -> None:
    import yaml

    if id(node) in above:
        raise ConfigFileError(f"{path}:{node.start_mark.line + 1}", "an alias (*name) stands inside what it names")
    above = (*above, id(node))

    if isinstance(node, yaml.SequenceNode):
        for n, item in enumerate(node.value):
            lines[f"{prefix}[{n}]"] = item.start_mark.line + 1
            _check_keys(item, f"{prefix}[{n}]", path, lines, above)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigFileError(f"{path}:{line}", "a key must be text")
        name = key_node.value
        if name == "<<":
            continue
        key = f"{prefix}.{name}" if prefix else name
        if name in seen:
            raise ConfigFileError(f"{path}:{line}", f"key '{key}' is given twice (first in line {seen[name]})")
        seen[name] = line
        lines[key] = line
        # Keys are names whatever they look like: `1: x` is the key "1".
        key_node.tag = "tag:yaml.org,2002:str"
        _check_keys(value_node, key, path, lines, above)


def _override(raw: dict[str, Any], override: str, origin: Origin) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(key or override, problem=f"is no override: {override!r}", expected="dotted.key=value").at(
            "command line"
        )
    try:
        value = parse_yaml(text, "command line")
    except ConfigFileError:
        if text.lstrip().startswith(("[", "{", '"', "'")):
            raise ConfigError(key, text, "a YAML value (quote texts, close brackets)").at("command line") from None
        value = text  # such as the glob *.tsv, which YAML takes for an alias
    *sections, last = key.split(".")
    target = raw
    for depth, name in enumerate(sections, start=1):
        below = target.get(name)
        if isinstance(below, list):
            whole = ".".join(sections[:depth])
            raise ConfigError(key, problem="reaches into a list", expected=f"the whole list, {whole}=[...]").at(
                "command line"
            )
        if not isinstance(below, dict):
            below = target[name] = {}
        target = below
    target[last] = value
    origin.forget(key)
    origin.overridden.add(key)


def _expand(value: Any, key: str, origin: Origin) -> Any:
    if isinstance(value, Mapping):
        return {name: _expand(item, f"{key}.{name}", origin) for name, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, f"{key}[{n}]", origin) for n, item in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value

    def replace(match: re.Match[str]) -> str:
        if match.group(1) is None:
            return "${"
        name, has_default, default = match.group(1).partition(":-")
        if not _NAME.match(name):
            raise ConfigError(key, value, "${VARIABLE} or ${VARIABLE:-default}").at(origin.where(key))
        found = os.environ.get(name)
        if found or (found is not None and not has_default):
            return found
        if has_default:
            return default
        raise UnsetVariableError(
            key,
            problem=f"needs the environment variable {name}, which is not set",
            expected=f"it set, or a default: ${{{name}:-...}}",
            where=origin.where(key),
        )

    return EnvText(_VARIABLE.sub(replace, value))


def show(config: Any) -> str:
    """A configuration as commented YAML that reads back to an equal one."""
    return "\n".join(_show_section(config, 0)) + "\n"


def _show_section(config: Any, depth: int) -> list[str]:
    pad = "  " * depth
    lines: list[str] = []
    for f in fields(config):
        if depth == 0 and lines:
            lines.append("")
        width = max(40, 100 - len(pad))
        lines += [f"{pad}# {line}" for line in textwrap.wrap(" ".join(description(f).split()), width)]
        lines += _show_entry(f.name, getattr(config, f.name), depth)
    return lines or [pad + "{}"]


def _show_entry(name: str, value: Any, depth: int) -> list[str]:
    pad = "  " * depth
    if is_dataclass(value) and fields(value):
        return [f"{pad}{_text(name)}:", *_show_section(value, depth + 1)]
    return [f"{pad}{_text(name)}: {_flow(value)}"]


def _flow(value: Any) -> str:
    if is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(str(k))}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    if isinstance(value, str):
        return _text(value.replace("${", "$${"))
    return json.dumps(value)


def _text(text: str) -> str:
    """Text as YAML: bare where it cannot be taken for anything else, else in JSON quotes."""
    if re.fullmatch(r"[A-Za-z_/.][A-Za-z0-9_/.+@-]*", text) and parse_scalar(text) == text:
        return text
    return _UNPRINTABLE.sub(lambda c: f"\\u{ord(c.group()):04x}", json.dumps(text, ensure_ascii=False))
