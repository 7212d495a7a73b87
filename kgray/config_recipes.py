"""The ``recipes`` of a configuration: changes for machines that have something, a GPU say. Floor 2.

    recipes:
      gpu:
        needs: {gpus: 1}
        train: {batch_size: 4096}

One at most is laid over a file: the one that ``recipe`` names, or the first whose ``needs`` the machine meets.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from kgray.errors import ConfigError
from kgray.machine import Machine, this_machine

log = logging.getLogger(__name__)

RECIPES, RECIPE, NEEDS = "recipes", "recipe", "needs"
AUTO, NONE = "auto", "none"
Where = Callable[[str], str]
Plain = Callable[[Any, str], Any]


@dataclass
class Layer:
    """What one file says. lines: of each dotted key, the file and its line there. recipes: by name what they change and
    need. asked: its ``recipe``, empty where it says none."""

    said: dict[str, Any]
    lines: dict[str, tuple[str, int]]
    recipes: dict[str, dict[str, Any]]
    asked: dict[str, Any]

    def changes(self, name: str) -> tuple[dict[str, Any], dict[str, tuple[str, int]]] | None:
        """What a recipe of that name changes, and the lines of it; None where this file does not know it."""
        if name not in self.recipes:
            return None
        above = f"{RECIPES}.{name}."
        lines = {key.removeprefix(above): at for key, at in self.lines.items() if key.startswith(above)}
        return {key: value for key, value in self.recipes[name].items() if key != NEEDS}, lines


def layered(
    below: Sequence[Layer], raw: Mapping[str, Any], lines: dict[str, tuple[str, int]], where: Where
) -> list[Layer]:
    """The layers of a file's bases and its own. A recipe that the file says is null is taken from those below.

    Raises ConfigError for ``recipes`` that are not names and mappings.
    """
    said = dict(raw)
    recipes = said.pop(RECIPES, {})
    if not isinstance(recipes, dict | None):
        raise ConfigError(RECIPES, recipes, "names, and for each the sections it changes").at(where(RECIPES))
    gone = names(below) if recipes is None else [name for name, one in recipes.items() if one is None]
    for layer in below:
        layer.recipes = {name: one for name, one in layer.recipes.items() if name not in gone}
    own = {name: one for name, one in (recipes or {}).items() if one is not None}
    for name, one in own.items():
        key = f"{RECIPES}.{name}"
        if name in (AUTO, NONE):
            raise ConfigError(key, problem="has a name that is taken", expected="another one").at(where(key))
        if not isinstance(one, dict):
            raise ConfigError(key, one, "the sections it changes, and what it needs").at(where(key))
    asked = {RECIPE: said.pop(RECIPE)} if RECIPE in said else {}
    return [*below, Layer(said, lines, own, asked)]


def names(layers: Sequence[Layer]) -> list[str]:
    """Recipes that the files have, bases first."""
    return list(dict.fromkeys(name for layer in layers for name in layer.recipes))


def choose(layers: Sequence[Layer], asked: Mapping[str, Any], path: str, plain: Plain, where: Where) -> str:
    """The recipe to take, NONE for none; which and why is logged, if there are any.

    asked: what the command line says of ``recipe``, if anything. plain: expands variables in the value of a key.
    Raises ConfigError for a recipe that is not there, and for needs that are none.
    """
    known = names(layers)
    last = next((one for one in (asked, *(layer.asked for layer in reversed(layers))) if one), {RECIPE: AUTO})
    wanted = plain(last[RECIPE], RECIPE)
    if wanted not in (AUTO, NONE, *known):
        expected = f"{AUTO}, {', '.join(known)} or {NONE}" if known else f"{NONE}: this file has no recipes"
        raise ConfigError(RECIPE, wanted, expected).at(where(RECIPE))
    if not known:
        return NONE
    machine = this_machine()
    needs = {name: _needs(name, layers, plain, where) for name in known}
    fits = [name for name in known if all(getattr(machine, key) >= least for key, least in needs[name].items())]
    chosen: str = (fits[0] if fits else NONE) if wanted == AUTO else wanted
    why = "as asked" if wanted != AUTO else f"this machine has {machine}"
    if chosen == NONE:
        others = "; ".join(f"{RECIPE}={name} needs {_told(need)}" for name, need in needs.items())
        log.info("recipe: %s as it stands, %s (%s)", path, why, others)
    else:
        log.info("recipe: %s of %s, %s (%s=%s: the file without it)", chosen, path, why, RECIPE, NONE)
    return chosen


def _needs(name: str, layers: Sequence[Layer], plain: Plain, where: Where) -> dict[str, float]:
    key = f"{RECIPES}.{name}.{NEEDS}"
    given = next((one[NEEDS] for layer in reversed(layers) if NEEDS in (one := layer.recipes.get(name, {}))), None)
    known = [f.name for f in fields(Machine)]
    if not isinstance(given, dict) or not given:
        raise ConfigError(key, given, f"the least it takes, of {', '.join(known)}: {{gpus: 1}}").at(where(key))
    found = {}
    for part, value in given.items():
        at = f"{key}.{part}"
        if part not in known:
            raise ConfigError(at, problem="is unknown", expected=f"one of {', '.join(known)}").at(where(at))
        least = plain(value, at)
        if type(least) not in (int, float) or not 0 <= least < math.inf:
            raise ConfigError(at, least, "a number of 0 or more").at(where(at))
        found[part] = least
    return found


def _told(needs: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{key}: {value:g}" for key, value in needs.items()) + "}"
