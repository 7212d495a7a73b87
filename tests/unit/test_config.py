"""The typed configuration: what it reads, and how it refuses."""


from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kgray.config import (
    REQUIRED,
    ConfigPath,
    ConfigPathOrName,
    configuration,
    from_dict,
    load_config,
    option,
    show_config,
    to_dict,
)
from kgray.errors import ConfigError, UserError


@configuration
class Splits:
    train: ConfigPath = option(REQUIRED, "Training triples.")
    valid: ConfigPath | None = option(None, "Validation triples.")


@configuration
class Data:
    triples: ConfigPath | list[ConfigPath] | Splits = option(REQUIRED, "The triples: a path, several, or a split.")
    columns: dict[str, str] = option({}, "Names of columns.")


@configuration
class Train:
    batch_size: int = option(32, "Queries a step.")
    rate: float = option(1e-3, "Learning rate.")
    shuffle: bool = option(True, "Whether queries are shuffled.")
    fan_out: tuple[int, ...] = option((8, 4), "Neighbours kept a hop.")
    pooling: Literal["mean", "cls"] = option("mean", "How token vectors become one.")
    patience: int | None = option(5, "Rounds without progress before stopping. Null: never stop early.")
    encoder: ConfigPathOrName = option("org/model", "Encoder by name or folder.")
    note: str = option("", "Free text.")

    def __post_init__(self) -> None:
        if self.batch_size <= 0:
            raise ConfigError("batch_size", self.batch_size, "a positive number")


@configuration
class Root:
    data: Data = option(REQUIRED, "Where the triples are.")
    train: Train = option(Train, "How the model is fitted.")
    extra: Train | None = option(None, "A second training.")


BASE = "data:\n  triples: a.tsv\n"


@pytest.fixture
def load(tmp_path: Path):
    def load(text: str, *overrides: str) -> Root:
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(Root, str(path), overrides)

    return load


def test_defaults_paths_and_lists(load, tmp_path):
    config = load("data:\n  triples: [a.tsv, ../b/*.tsv, s3://x/y, /abs, ~/h]\ntrain:\n")
    assert config.data.triples == [
        str(tmp_path / "a.tsv"),
        str(tmp_path.parent / "b" / "*.tsv"),
        "s3://x/y",
        "/abs",
        str(Path.home() / "h"),
    ]
    assert config.train == Train()
    split = load("data:\n  triples:\n    train: t.tsv\n").data.triples
    assert split == Splits(train=str(tmp_path / "t.tsv"))


def test_override_paths_belong_to_the_shell(load, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(BASE, "data.triples=b.tsv").data.triples == str(tmp_path / "elsewhere" / "b.tsv")
    assert load(BASE, "data.triples=*.tsv").data.triples == str(tmp_path / "elsewhere" / "*.tsv")


def test_path_or_name(load, tmp_path):
    assert load(BASE).train.encoder == "org/model"
    assert load(BASE + "train:\n  encoder: ./m\n").train.encoder == str(tmp_path / "m")
    (tmp_path / "here").mkdir()
    assert load(BASE + "train:\n  encoder: here\n").train.encoder == str(tmp_path / "here")


def test_scalars_of_yaml_1_2(load):
    config = load(BASE + "train:\n  rate: 1e-4\n  batch_size: 1_000\n  note: on\n  fan_out: [3]\n")
    assert (config.train.rate, config.train.batch_size, config.train.note) == (1e-4, 1000, "on")
    assert config.train.fan_out == (3,)
    assert isinstance(load(BASE + "train: {rate: 1}\n").train.rate, float)


def test_overrides(load, tmp_path):
    assert load(BASE, "train.batch_size=7", "train.patience=null").train.patience is None
    assert load(BASE, "data.triples.train=/t.tsv").data.triples == Splits(train="/t.tsv")
    assert load(BASE, "data.triples={train: /t, valid: /v}").data.triples == Splits(train="/t", valid="/v")
    assert load(BASE, 'train.note="1"').train.note == "1"
    assert load(BASE, "train.note=a=b").train.note == "a=b"
    assert load(BASE, "extra.batch_size=2").extra == Train(batch_size=2)
    assert load(BASE + "extra:\n  batch_size: 2\n", "extra=null").extra is None


def test_environment(load, monkeypatch, tmp_path):
    monkeypatch.setenv("KG_NUMBER", "12")
    monkeypatch.setenv("KG_EMPTY", "")
    config = load(
        BASE + "train:\n  batch_size: ${KG_NUMBER}\n  note: n${KG_NUMBER}-${KG_NONE:-x}-$${KG_NONE}\n"
        "  shuffle: ${KG_NONE:-false}\n  patience: ${KG_EMPTY:-null}\n  pooling: ${KG_NONE:-cls}\n"
    )
    assert config.train.batch_size == 12
    assert config.train.note == "n12-x-${KG_NONE}"
    assert type(config.train.note) is str
    assert (config.train.shuffle, config.train.patience, config.train.pooling) == (False, None, "cls")
    assert load("data:\n  triples: ${KG_NONE:-a.tsv}\n").data.triples == str(tmp_path / "a.tsv")
    # The text of a variable stays text where text is wanted.
    assert load(BASE + "train:\n  note: ${KG_NUMBER}\n").train.note == "12"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (BASE + "train:\n  batchsize: 3\n", [], "c.yaml:4: configuration key 'train.batchsize' is unknown: "
         "did you mean 'train.batch_size'?"),
        (BASE, ["train.batchsize=3"], "command line: configuration key 'train.batchsize' is unknown: did you mean "
         "'train.batch_size'?"),
        (BASE + "trian: {}\n", [], "c.yaml:3: configuration key 'trian' is unknown: did you mean 'train'?"),
        (BASE, ["fan_out=[3]"], "'fan_out' is unknown: did you mean 'extra.fan_out' or 'train.fan_out'?"),
        (BASE + "train: {valid: x}\n", [], "'train.valid' is unknown: did you mean 'data.triples.valid'?"),
        ("data: &a\n  triples: [*a]\n", [], "c.yaml:1: an alias (*name) stands inside what it names"),
        (BASE + "train:\n  zzz: 3\n", [], "'train.zzz' is unknown; expected one of train.batch_size, train.rate"),
        (BASE + "train:\n  batch_size: many\n", [], "c.yaml:4: configuration key 'train.batch_size' has the value "
         "'many'; expected a whole number"),
        (BASE + "train:\n  batch_size: 1.5\n", [], "has the value 1.5; expected a whole number"),
        (BASE + "train:\n  batch_size: true\n", [], "has the value True; expected a whole number"),
        (BASE + "train:\n  batch_size: '3'\n", [], "has the value '3'; expected a whole number"),
        (BASE + "train:\n  shuffle: yes\n", [], "has the value 'yes'; expected true or false"),
        (BASE + "train:\n  rate: .nan\n", [], "expected a finite number"),
        (BASE + "train:\n  note: 7\n", [], "has the value 7; expected text (put it in quotes)"),
        (BASE + "train:\n  pooling: meen\n", [], "expected one of mean, cls (did you mean 'mean'?)"),
        (BASE + "train:\n  batch_size: 0\n", [], "c.yaml:4: configuration key 'train.batch_size' has the value 0; "
         "expected a positive number"),
        (BASE + "train:\n  fan_out: [1, x]\n", [], "c.yaml:4: configuration key 'train.fan_out[1]' has the value 'x'"),
        (BASE + "train:\n  patience: x\n", [], "expected a whole number or null"),
        (BASE + "train: 3\n", [], "'train' has the value 3; expected keys batch_size, rate"),
        (BASE + "train:\n  batch_size:\n", [], "'train.batch_size' has the value null; expected a whole number"),
        (BASE + "extra:\n  batch_siz: 1\n", [], "did you mean 'extra.batch_size'?"),
        ("data:\n  triples: 3\n", [], "'data.triples' has the value 3; expected a path or a list, each a path or a "
         "mapping with train, valid"),
        ("data:\n  triples: [a, 3]\n", [], "c.yaml:2: configuration key 'data.triples[1]' has the value 3; expected "
         "a path"),
        ("data:\n  triples:\n    trian: a\n", [], "c.yaml:3: configuration key 'data.triples.trian' is unknown: did "
         "you mean 'data.triples.train'?"),
        ("data:\n  triples:\n    valid: a\n", [], "c.yaml:2: configuration key 'data.triples.train' is missing; "
         "expected a path: Training triples."),
        ("data:\n  triples: ''\n", [], "'data.triples' has the value ''"),
        ("", [], "c.yaml: configuration key 'data' is missing"),
        (BASE, ["train.batch_size"], "expected dotted.key=value"),
        (BASE, ["=3"], "expected dotted.key=value"),
        (BASE, ["train..x=3"], "expected dotted.key=value"),
        (BASE, ["train.fan_out=[1,"], "'train.fan_out' has the value '[1,'; expected a YAML value"),
        ("data:\n  triples: [a]\n", ["data.triples.0=b"], "reaches into a list"),
        (BASE + "train:\n  note: ${KG_NONE}\n", [], "c.yaml:4: configuration key 'train.note' needs the environment "
         "variable KG_NONE, which is not set"),
        (BASE + "train:\n  note: ${}\n", [], "expected ${VARIABLE} or ${VARIABLE:-default}"),
        ("data:\n  triples: a\n  triples: b\n", [], "c.yaml:3: key 'data.triples' is given twice (first in line 2)"),
        ("data: [a\nb: c\n", [], "c.yaml:2: bad YAML: "),
        ("data:\n\ttriples: a\n", [], "c.yaml:2: bad YAML: "),
        ("- a\n", [], "c.yaml: must hold keys and values"),
        ("? [a, b]\n: c\n", [], "c.yaml:1: a key must be text"),
        ("a: !!python/object:os.system x\n", [], "c.yaml:1: bad YAML: "),
        ("a: 1\n---\nb: 2\n", [], "bad YAML: "),
        ("data: \x07\n", [], "bad YAML: "),
    ],
)  # fmt: skip
def test_refusals(load, monkeypatch, text: str, overrides: list[str], message: str):
    monkeypatch.delenv("KG_NONE", raising=False)
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_file_built_on_others(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "first.yaml").write_text(
        "data:\n  triples: a.tsv\ntrain: {batch_size: 7, fan_out: [1, 2], note: one}\nextra: {batch_size: 3}\n"
    )
    (tmp_path / "second.yaml").write_text("base: deep/first.yaml\ntrain:\n  fan_out: [9]\nextra: null\n")
    third = tmp_path / "third.yaml"
    third.write_text("base: second.yaml\ntrain:\n  note: three\ndata: {columns: {head: h}}\n")
    config = load_config(Root, str(third), ["train.rate=0.5"])
    assert config.data.triples == str(tmp_path / "deep" / "a.tsv"), "paths belong to the file they stand in"
    assert config.data.columns == {"head": "h"}
    assert config.train == Train(batch_size=7, fan_out=(9,), note="three", rate=0.5)
    assert config.extra is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "second.yaml").write_text("base: deep/first.yaml\ntrain:\n\n  batch_size: -1\n")
    with pytest.raises(ConfigError, match=r"second\.yaml:4: .*batch_size"):
        load_config(Root, "third.yaml")
    (tmp_path / "deep" / "first.yaml").write_text("data: {triples: a.tsv}\ntrain:\n  bach_size: 1\n")
    (tmp_path / "second.yaml").write_text("base: deep/first.yaml\n")
    with pytest.raises(ConfigError, match=r"deep/first\.yaml:3: .*bach_size"):
        load_config(Root, "third.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: nowhere.yaml\n", r"c\.yaml:1: .*nowhere\.yaml"),
        ("base: ~nobody-here/x.yaml\n", r"c\.yaml:1: .*nobody-here"),
        ('base: "a\\0b"\n', r"c\.yaml:1: .*configuration file"),
        ("train: {}\nbase: [a.yaml]\n", r"c\.yaml:2: .*path of a configuration file"),
        ("base: d.yaml\n", r"d\.yaml:1: .*this very file"),
    ],
)
def test_a_base_that_cannot_be(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    (tmp_path / "d.yaml").write_text("base: c.yaml\n")
    with pytest.raises(ConfigError, match=message):
        load_config(Root, str(tmp_path / "c.yaml"))


def test_file_refusals(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(Root, str(tmp_path / "none.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"data:\n  triples: \xe9.tsv\n")
    with pytest.raises(ConfigError, match=r"latin.yaml: not UTF-8 \(byte 17"):
        load_config(Root, str(tmp_path / "latin.yaml"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(Root, str(tmp_path))


def test_frozen_and_slotted():
    with pytest.raises((AttributeError, TypeError)):
        Train().batch_size = 3  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        Train().other = 3  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        Train(batchsize=3)  # type: ignore[call-arg]


def test_lists_and_mappings_are_not_shared():
    one, other = Data(triples="a"), Data(triples="a")
    one.columns["head"] = "h"
    assert other.columns == {}


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)


@settings(deadline=None, max_examples=60)
@example(note="${", paths=[], rate=0.0, names={"$${": "${a}$"}, patience=None)
@given(
    note=words,
    paths=st.lists(words.filter(bool).map(lambda t: "/" + t.replace("/", "").replace(".", "")), max_size=3),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    names=st.dictionaries(words, words, max_size=3),
    patience=st.none() | st.integers(),
)
def test_shown_configuration_reads_back(tmp_path_factory, note, paths, rate, names, patience):
    from os.path import normpath

    paths = [normpath(path) for path in paths if not path.startswith("//")]
    config = Root(
        data=Data(triples=paths or Splits(train="/t"), columns=names),
        train=Train(note=note, rate=rate, patience=patience),
        extra=Train() if note else None,
    )
    text = show_config(config)
    path = tmp_path_factory.mktemp("shown") / "c.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_config(Root, str(path)) == config
    plain = json.loads(json.dumps(to_dict(config)))
    assert from_dict(Root, plain) == config


def test_shown_configuration_is_described(load):
    text = show_config(load(BASE))
    for section in (Root, Data, Train):
        for name, field in section.__dataclass_fields__.items():  # type: ignore[attr-defined]
            assert f"# {field.metadata['description']}" in text
            assert f"{name}:" in text


def test_from_dict_is_strict():
    with pytest.raises(ConfigError, match=r"config\.json: configuration key 'train.batchsize' is unk"):
        from_dict(Root, {"data": {"triples": "a"}, "train": {"batchsize": 1}}, where="config.json")
    assert from_dict(Data, {"triples": "${X}/a"}).triples == "${X}/a"


@pytest.mark.parametrize("values", [3, [1], {"data": 1}, {"data": {"triples": {"train": {}}}}, {1: 2}])
def test_from_dict_never_crashes(values: Any):
    with pytest.raises(ConfigError):
        from_dict(Root, values)


def test_import_is_light():
    heavy = ["ray", "torch", "mlflow", "pandas", "pydantic", "yaml", "pyarrow", "numpy"]
    code = f"import sys, kgray.config; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


@configuration
class Several:
    trainings: dict[str, Train] = option({}, "Trainings by name.")
    names: dict[str, str | None] = option({}, "Names.")


def test_null_takes_a_section_of_a_base_away(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("trainings: {one: {batch_size: 3}, two: {batch_size: 4}}\nnames: {a: b}\n")
    (tmp_path / "c.yaml").write_text("base: base.yaml\ntrainings: {one: null}\nnames: {a: null}\n")
    found = load_config(Several, str(tmp_path / "c.yaml"), [])
    assert {name: one.batch_size for name, one in found.trainings.items()} == {"two": 4}
    assert found.names == {"a": None}, "where null is a value it stays one"
    assert load_config(Several, str(tmp_path / "base.yaml"), ["trainings.two=null"]).trainings.keys() == {"one"}
