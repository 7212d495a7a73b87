"""Recipes of a configuration: which is taken, what it changes, how a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from kgray.config import REQUIRED, ConfigPath, configuration, load_config, option, show_config
from kgray.errors import ConfigError
from kgray.machine import Machine, local_gpus


@configuration
class Data:
    triples: ConfigPath | list[ConfigPath] = option(REQUIRED, "The triples.")


@configuration
class Train:
    batch_size: int = option(32, "Queries a step.")
    note: str = option("", "Free text.")

    def __post_init__(self) -> None:
        if self.batch_size <= 0:
            raise ConfigError("batch_size", self.batch_size, "a positive number")


@configuration
class Root:
    data: Data = option(REQUIRED, "Where the triples are.")
    train: Train = option(Train, "How the model is fitted.")
    extra: Train | None = option(None, "A second training.")

    def __post_init__(self) -> None:
        if self.extra is not None and self.extra.batch_size > self.train.batch_size:
            raise ConfigError("extra.batch_size", self.extra.batch_size, "no more than train.batch_size")


BASE = "data:\n  triples: a.tsv\n"


@pytest.fixture
def load(tmp_path: Path):
    def load(text: str, *overrides: str) -> Root:
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(Root, str(path), overrides)

    return load


RECIPES = """
train: {batch_size: 7, note: plain}
recipes:
  many:
    needs: {gpus: 4}
    train:
      batch_size: 400
  one:
    needs: {gpus: 1, memory_gib: 8}
    train:
      batch_size: 100
    extra: {note: beside, batch_size: 1}
"""


@pytest.mark.parametrize(
    ("gpus", "overrides", "size", "note"),
    [
        (0, [], 7, None),
        (1, [], 100, "beside"),
        (8, [], 400, None),
        (8, ["recipe=one"], 100, "beside"),
        (0, ["train.batch_size=5", "recipe=many"], 5, None),
        (8, ["recipe=none"], 7, None),
    ],
)
def test_a_recipe_for_the_machine(load, monkeypatch, caplog, gpus, overrides, size, note):
    monkeypatch.setattr("kgray.config_recipes.this_machine", lambda: Machine(gpus, 2, 16.0))
    with caplog.at_level("INFO", logger="kgray"):
        config = load(BASE + RECIPES, *overrides)
    assert (config.train.batch_size, config.train.note) == (size, "plain")
    assert (config.extra and config.extra.note) == note
    (told,) = caplog.messages
    asked = next((o.partition("=")[2] for o in overrides if o.startswith("recipe=")), None)
    assert "as asked" in told if asked else "2 cores, 16.0 GiB" in told
    assert load(show_config(config)) == config, "what is shown is what was chosen, wherever it is read"


@pytest.mark.parametrize(
    ("text", "size", "note"),
    [
        ("", 100, "beside"),
        ("recipes: {one: {train: {batch_size: 50}}}\n", 50, "beside"),
        ("train: {batch_size: 5}\n", 5, "beside"),
        ("extra: null\n", 100, None),
        ("recipes: null\n", 7, None),
        ("recipes: {one: null}\n", 7, None),
        ("recipes: {one: {needs: {gpus: 9}}}\n", 7, None),
        ("recipes: {one: null, two: {needs: {cores: 1}, train: {batch_size: 2}}}\n", 2, None),
        ("recipe: none\n", 7, None),
        ("recipe: ${KG_RECIPE}\n", 400, None),
        ("recipes: {one: {needs: {gpus: '${KG_MANY}'}}}\n", 7, None),
    ],
)
def test_a_file_built_on_one_with_recipes_has_the_last_word(load, tmp_path, monkeypatch, text, size, note):
    monkeypatch.setattr("kgray.config_recipes.this_machine", lambda: Machine(1, 2, 16.0))
    monkeypatch.setenv("KG_RECIPE", "many")
    monkeypatch.setenv("KG_MANY", "3")
    (tmp_path / "base.yaml").write_text(BASE + RECIPES)
    config = load("base: base.yaml\n" + text)
    assert (config.train.batch_size, config.extra and config.extra.note) == (size, note)


def test_what_a_file_has_done_away_with_does_not_come_back(load, tmp_path, monkeypatch):
    monkeypatch.setattr("kgray.config_recipes.this_machine", lambda: Machine(1, 2, 16.0))
    (tmp_path / "first.yaml").write_text(BASE + RECIPES)
    (tmp_path / "base.yaml").write_text("base: first.yaml\nrecipe: none\nrecipes: null\n")
    config = load("base: base.yaml\nrecipe: auto\nrecipes: {one: {needs: {gpus: 1}, train: {batch_size: 9}}}\n")
    assert (config.train.batch_size, config.extra) == (9, None), "auto said later counts; the first file's one is gone"


def test_the_command_line_need_fit_only_the_recipe_that_is_taken(load, monkeypatch):
    monkeypatch.setattr("kgray.config_recipes.this_machine", lambda: Machine(8, 2, 16.0))
    assert load(BASE + RECIPES, "extra.batch_size=300").extra.batch_size == 300
    with pytest.raises(ConfigError, match=r"extra\.batch_size"):
        load(BASE + RECIPES, "extra.batch_size=300", "recipe=one")


def test_paths_in_a_recipe_belong_to_the_file_it_stands_in(load, tmp_path, monkeypatch):
    monkeypatch.setattr("kgray.config_recipes.this_machine", lambda: Machine(1, 2, 16.0))
    (tmp_path / "deep").mkdir()
    deep = "data: {triples: a.tsv}\nrecipes: {gpu: {needs: {gpus: 1}, data: {triples: [b.tsv, c.tsv]}}}\n"
    (tmp_path / "deep" / "base.yaml").write_text(deep)
    assert load("base: deep/base.yaml\n").data.triples == [str(tmp_path / "deep" / name) for name in ("b.tsv", "c.tsv")]


def test_a_mistake_in_a_recipe_does_not_wait_for_its_machine(load, monkeypatch):
    monkeypatch.delenv("KG_NONE", raising=False)
    with pytest.raises(ConfigError, match=r"c\.yaml:7: configuration key 'train\.bach_size' is unknown"):
        load(BASE + "recipes:\n  gpu:\n    needs: {gpus: 99}\n    train:\n      bach_size: 3\n")
    load(BASE + "recipes: {gpu: {needs: {gpus: 99}, train: {note: '${KG_NONE}'}}}\n")  # a variable of that machine


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("recipe: two\n" + RECIPES, [], "c.yaml:3: configuration key 'recipe' has the value 'two'; expected auto, "
         "many, one or none"),
        (RECIPES, ["recipe=two"], "command line: configuration key 'recipe' has the value 'two'"),
        ("", ["recipe=one"], "expected none: this file has no recipes"),
        ("recipes: [gpu]\n", [], "c.yaml:3: configuration key 'recipes'"),
        ("recipes:\n  gpu: {train: {batch_size: 3}}\n", [], "c.yaml:4: configuration key 'recipes.gpu.needs' has the "
         "value null; expected the least it takes, of gpus, cores, memory_gib: {gpus: 1}"),
        ("recipes: false\n", [], "c.yaml:3: configuration key 'recipes' has the value False"),
        ("recipes:\n  gpu: 3\n", [], "c.yaml:4: configuration key 'recipes.gpu' has the value 3"),
        ("recipes:\n  none: {}\n", [], "c.yaml:4: configuration key 'recipes.none' has a name that is taken"),
        ("recipes:\n  gpu:\n    needs:\n      cores: 1\n      ram: 3\n", [], "c.yaml:7: configuration key "
         "'recipes.gpu.needs.ram' is unknown; expected one of gpus, cores, memory_gib"),
        ("recipes:\n  gpu:\n    needs: {gpus: many}\n", [], "c.yaml:5: configuration key 'recipes.gpu.needs.gpus' has "
         "the value 'many'"),
        ("recipes:\n  gpu:\n    needs: {gpus: .nan}\n", [], "a number of 0 or more"),
        (RECIPES, ["recipes.one.train.batch_size=3"], "command line: configuration key 'recipes.one.train.batch_size' "
         "is no override; expected recipe=NAME, recipe=none, or the keys that the recipe changes"),
        (RECIPES, ["recipe.one=1"], "command line: configuration key 'recipe.one' is no override"),
        (RECIPES, ["recipe=null"], "command line: configuration key 'recipe' has the value null"),
        ("recipe: null\n" + RECIPES, [], "c.yaml:3: configuration key 'recipe' has the value null"),
        ("recipes:\n  gpu:\n    needs: {gpus: 0}\n    train:\n      batch_size: -1\n", [], "c.yaml:7: configuration "
         "key 'train.batch_size' has the value -1"),
    ],
)  # fmt: skip
def test_recipes_refused(load, text, overrides, message):
    with pytest.raises(ConfigError) as caught:
        load(BASE + text, *overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (None, 2), ("", 0), ("-1", 0), ("0", 1), ("0,1,2", 2), ("0,-1,1", 1), ("GPU-8f2c", 1), ("NoDevFiles", 0),
        ("5", 0), ("0,0", 1), ("1, 0", 2),
    ],
)  # fmt: skip
def test_gpus_a_process_may_use(monkeypatch, visible, seen):
    monkeypatch.setattr("kgray.machine._driver_gpus", lambda: 2)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local_gpus() == seen
