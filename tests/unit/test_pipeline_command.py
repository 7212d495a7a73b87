"""Exit statuses, the last line of stdout, and the reason on stderr; and the settings the jobs read.

python3 -m pytest tests/unit/test_pipeline_command.py
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kgray.config import load_config, show_config
from kgray.errors import ConfigError, DataError
from kgray.pipeline import command, explain_command, lineage_command
from kgray.pipeline.plan import needed
from kgray.pipeline.settings import Settings
from kgray.pipeline.steps import steps_of, targets_of

REPO = Path(__file__).resolve().parents[2]
QUICKSTART = str(REPO / "configs" / "quickstart.yaml")
CONFIGS = sorted(path.name for path in (REPO / "configs").glob("*.yaml"))


def guarded(body) -> int:
    return command.guarded("train", argparse.Namespace(), body)


def last_json(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


def test_success_is_one_line_of_json_with_the_keys_in_order(capsys):
    assert guarded(lambda _: {"status": "done", "artifact": "/a", "version": "v", "metrics": {"m": 1.0}}) == 0
    out = last_json(capsys.readouterr().out)
    assert list(out) == ["job", "status", "artifact", "version", "seconds", "metrics"]
    assert (out["job"], out["status"], out["metrics"]) == ("train", "done", {"m": 1.0})


def test_a_mistake_is_status_2_one_line_and_no_traceback(capsys):
    def body(_):
        raise DataError("train.tsv:7: 2 columns\ninstead of 3")

    assert guarded(body) == 2
    out, err = capsys.readouterr()
    assert last_json(out)["status"] == "failed"
    assert last_json(out)["error"] == "train.tsv:7: 2 columns instead of 3"
    assert err == "kgray train: train.tsv:7: 2 columns instead of 3\n"


def test_a_failure_of_ours_is_status_1_with_a_traceback_and_the_reason_last(capsys):
    def body(_):
        raise KeyError("a bug")

    assert guarded(body) == 1
    out, err = capsys.readouterr()
    assert last_json(out)["status"] == "failed"
    assert "Traceback" in err and err.splitlines()[-1] == "kgray train: KeyError: 'a bug'"


def test_an_interrupt_is_status_130(capsys):
    def body(_):
        raise KeyboardInterrupt

    assert guarded(body) == 130
    assert "goes on from where it stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "CONFIG"),
        ([QUICKSTART, "--no-such"], "--no-such"),
        ([QUICKSTART, "train.batchsize=1"], "did you mean 'train.batch_size'"),
        ([QUICKSTART, "train.epochs=many"], "train.epochs"),
        ([QUICKSTART, "train"], "dotted.key=value"),
        (["nowhere.yaml"], "nowhere.yaml: no such configuration file"),
    ],
)
def test_wrong_arguments_are_status_2_and_still_end_in_json(arguments, words, capsys):
    try:
        status = command.main("train", arguments)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert status == 2
    assert last_json(out)["status"] == "failed"
    assert words in err.splitlines()[-1] and "Traceback" not in err


def test_overrides_may_stand_before_and_after_options(capsys):
    assert command.main("pipeline", [QUICKSTART, "train.epochs=7", "--show-config", "text=null"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["train"]["epochs"] == 7 and shown["text"] is None


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_of_the_project_is_valid_and_shows_as_an_equal_one(name, tmp_path, monkeypatch):
    monkeypatch.setenv("KGRAY_DATA", "/data")
    settings = load_config(Settings, str(REPO / "configs" / name))
    again = tmp_path / "shown.yaml"
    again.write_text(show_config(settings))
    assert load_config(Settings, str(again)) == settings


@pytest.mark.parametrize("name", ["wn18rr.yaml", "wn18rr-unseen.yaml"])
def test_the_recipe_for_a_gpu_trains_the_whole_encoder(name, monkeypatch):
    monkeypatch.setenv("KGRAY_DATA", "/data")
    plain, gpu = (load_config(Settings, str(REPO / "configs" / name), [f"recipe={r}"]) for r in ("none", "gpu"))
    assert (plain.text.tuning.mode, gpu.text.tuning.mode) == ("last_layers", "full")
    assert gpu.data == plain.data


def test_configurations_that_need_data_say_which_variable(monkeypatch):
    monkeypatch.delenv("KGRAY_DATA", raising=False)
    with pytest.raises(ConfigError, match="environment variable KGRAY_DATA"):
        load_config(Settings, str(REPO / "configs" / "wn18rr.yaml"))


def test_storage_follows_the_environment_and_lies_outside_the_checkout_by_default(monkeypatch):
    monkeypatch.setenv("KGRAY_STORAGE", "s3://bucket/kgray")
    assert load_config(Settings, QUICKSTART).storage.root == "s3://bucket/kgray/quickstart"
    monkeypatch.delenv("KGRAY_STORAGE")
    assert load_config(Settings, QUICKSTART).storage.root == str(Path.home() / ".kgray" / "quickstart")


@pytest.mark.parametrize(
    ("job", "overrides", "steps"),
    [
        ("ingest", [], ["ingest"]),
        ("ingest", ["data.documents=[d.jsonl]"], ["ingest", "corpus"]),
        ("embed", [], ["ingest", "embed"]),
        ("train", [], ["ingest", "embed", "train"]),
        ("train", ["text=null"], ["ingest", "train"]),
        ("deploy", [], ["ingest", "embed", "train", "mine", "ensemble"]),
        ("evaluate", [], ["ingest", "embed", "train", "mine", "ensemble", "evaluate"]),
        (
            "evaluate",
            ["evaluate.ablations=true"],
            [
                *("ingest", "embed", "train text_only", "evaluate text_only"),
                *("train graph_only", "evaluate graph_only", "train", "mine", "ensemble", "evaluate"),
            ],
        ),
        ("evaluate", ["evaluate.ablations=true", "text=null"], ["ingest", "train", "mine", "ensemble", "evaluate"]),
        ("explain", [], ["ingest", "embed", "train", "mine", "ensemble"]),
        ("deploy", ["members.rules=null"], ["ingest", "embed", "train", "ensemble"]),
        (
            "deploy",
            [
                *("members.variants=[text_only]", "members.seeds=[4]", "members.paths={}", "members.relations={}"),
                *("members.pseudo={}", "members.snapshots=2"),
            ],
            [
                *("ingest", "embed", "train", "train text_only", "train seed 4", "train pseudo", "train paths"),
                *("train snapshot 1", "train snapshot 2", "train relations"),
                *("mine", "ensemble"),
            ],
        ),
        (
            "deploy",
            ["members.models={kge: {model: {text: {kind: none}, gnn: {kind: none}}}}", "members.rules=null"],
            ["ingest", "embed", "train", "train kge", "ensemble"],
        ),
        ("pipeline", [], ["ingest", "embed", "train", "mine", "ensemble", "evaluate"]),
    ],
)
def test_a_job_asks_for_its_steps_and_what_they_need(job, overrides, steps):
    settings = load_config(Settings, QUICKSTART, overrides)
    chosen = [step.name for step in needed(steps_of(settings), targets_of(job, settings))]
    assert sorted(chosen) == sorted(steps)
    assert chosen[-1] == steps[-1]


@pytest.mark.parametrize(("snapshots", "expected"), [(-1, "0 or more"), (4, "fewer than train.epochs=4")])
def test_snapshots_fit_into_the_epochs(snapshots, expected):
    with pytest.raises(ConfigError, match=rf"members\.snapshots.*{expected}"):
        load_config(Settings, QUICKSTART, [f"members.snapshots={snapshots}", "train.epochs=4"])


@pytest.mark.parametrize("name", ["rules", "seed 3", ""])
def test_a_member_needs_a_name_of_its_own(name):
    with pytest.raises(ConfigError, match=r"members\.models"):
        load_config(Settings, QUICKSTART, [f"members.models={{'{name}': {{}}}}"])


def test_without_text_further_members_read_none_either():
    settings = load_config(Settings, QUICKSTART, ["members.models={wide: {model: {dim: 512}}}", "text=null"])
    assert settings.members.models["wide"].model.text.kind == "none"
    assert settings.members.models["wide"].model.dim == 512
    names = [step.name for step in steps_of(settings)]
    assert names == ["ingest", "train", "train wide", "mine", "ensemble", "evaluate"]


def test_without_text_there_is_nothing_to_embed(capsys):
    assert command.main("embed", [QUICKSTART, "text=null"]) == 2
    assert "text" in capsys.readouterr().err


@pytest.mark.parametrize("job", [*command.JOBS, "lineage"])
def test_every_job_has_a_thin_file_whose_docstring_says_how_to_run_it(job):
    module = importlib.import_module(f"jobs.{job}")
    text = Path(str(module.__file__)).read_text()
    assert f"python -m jobs.{job} " in str(module.__doc__)
    assert "ray job submit" in str(module.__doc__)
    assert len(text.splitlines()) <= 20


def test_looking_at_the_steps_loads_neither_torch_nor_ray_nor_mlflow():
    """So that an up-to-date pipeline is a matter of seconds."""
    code = (
        "import sys\n"
        "from kgray.pipeline import command, deployment, results, settings, steps\n"
        "import kgray.data.ingest, kgray.text.embed, kgray.training.distributed, kgray.evaluation.evaluate\n"
        "import kgray.evaluation.ensemble, kgray.pipeline.mining, kgray.reasoning.recipe\n"
        "print(sorted(m for m in ('torch', 'ray', 'mlflow', 'transformers') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "two of --head, --relation, --tail, or all three, not 0"),
        (["--head", "virus"], "not 1"),
        (["--head", "virus", "--relation", "causes", "--top", "0"], "--top must be at least 1, not 0"),
        (["--head", "virus", "--relation", "causes", "--top", "many"], "--top"),
        (["--head", "virus", "train.epoch=3"], "train.epochs"),
    ],
)
def test_a_query_that_asks_for_nothing_is_refused_first(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KGRAY_STORAGE", str(tmp_path / "none"))
    try:
        status = explain_command.main([QUICKSTART, *arguments])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert status == 2 and not (tmp_path / "none").exists()
    assert last_json(out)["job"] == "explain" and last_json(out)["status"] == "failed"
    assert words in err.splitlines()[-1] and "Traceback" not in err


def test_explain_shows_its_configuration(capsys):
    assert explain_command.main([QUICKSTART, "--show-config", "train.epochs=7"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["epochs"] == 7


@pytest.mark.parametrize("arguments", [["0000000000000000"], ["model/0123", QUICKSTART]])
def test_lineage_of_nothing_is_the_users_mistake(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KGRAY_STORAGE", str(tmp_path))
    assert lineage_command.main(arguments) == 2
    assert "no artifact" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "predict.queries"),
        (["--queries", "{folder}/none.tsv"], "predict.queries: no such file: {folder}/none.tsv"),
        (["--queries", "{folder}/empty.tsv"], "empty.tsv: the file is empty"),
        (["--queries", "{folder}/odd.csv", "predict.header=true"], "odd.csv, line 1: the columns are 'a', 'b'"),
        (["--queries", "{folder}/good.tsv", "--output", "{folder}/no/answers.parquet"], "predict.output"),
        (["--queries", "{folder}/good.tsv", "--output", "{folder}/good.tsv"], "what lies there is something else"),
        (["predict.queries={folder}/good.tsv", "predict.top_k=0"], "predict.top_k"),
        (["predict.queries={folder}/good.tsv", "predict.format=ntriples"], "predict.format"),
    ],
)
def test_predict_tells_what_is_wrong_before_anything_is_built(arguments, words, tmp_path, capsys):
    (tmp_path / "empty.tsv").touch()
    (tmp_path / "odd.csv").write_text("a,b\nc,d\n")
    (tmp_path / "good.tsv").write_text("virus\tcauses\t?\n")
    given = [one.format(folder=tmp_path) for one in arguments]
    assert command.main("predict", [QUICKSTART, f"storage.root={tmp_path}/storage", *given]) == 2
    out, err = capsys.readouterr()
    assert words.format(folder=tmp_path) in last_json(out)["error"]
    assert "Traceback" not in err and not (tmp_path / "storage").exists()


def test_predict_is_a_step_only_where_there_are_queries(tmp_path):
    settings = load_config(Settings, QUICKSTART)
    assert "predict" not in [step.name for step in steps_of(settings)]
    asked = load_config(Settings, QUICKSTART, [f"predict.queries={tmp_path}/q.tsv"])
    assert [step.name for step in needed(steps_of(asked), targets_of("predict", asked))][-2:] == ["ensemble", "predict"]
    assert "predict" in targets_of("pipeline", asked)
