"""Recipes of others: they import listed classes only, and no value of the environment is written to a file."""

import json
import site
import subprocess
import sys
from functools import partial

import jsonargparse
import pytest
import yaml
from support.processes import child_environment, run
from support.runs import ROOT

from prism_lightning.common.errors import UserError
from prism_lightning.config.compose import composed
from prism_lightning.config.trust import TRUSTED_CLASSES, TRUSTED_PATHS, limit_imports

SECRET = "hunter2-is-secret"


@pytest.fixture(autouse=True)
def _parser_settings(monkeypatch):
    """Restore the parser's permitted imports after every test."""
    from jsonargparse import _common

    monkeypatch.setattr(_common, "parsing_settings", dict(_common.parsing_settings))


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A module on the path whose import leaves a file behind."""
    (tmp_path / "stranger.py").write_text(
        "from pathlib import Path\nfrom lightning.pytorch import Callback\n"
        "from prism_lightning.lightning_modules.dense import DenseLM\n"
        f"Path({str(tmp_path / 'imported')!r}).touch()\n"
        "class PrismLM(DenseLM): pass\n"
        "class Hello(Callback):\n"
        "    def on_fit_start(self, *_): print('hello from a stranger')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "imported"
    sys.modules.pop("stranger", None)


@pytest.mark.parametrize(
    "setting",
    [
        ("--model.class_path", "stranger.PrismLM"),
        ("--trainer.callbacks", "{class_path: stranger.Hello}"),
        ("--trainer.callbacks", "[{class_path: stranger.Hello}]"),
        ("--trainer.logger", "{class_path: stranger.Hello}"),
        ("--trainer.strategy", "{class_path: stranger.Hello}"),
        ("--trainer.callbacks", "{class_path: LambdaCallback, init_args: {on_fit_start: stranger.Hello}}"),
    ],
)
def test_other_classes_are_refused_by_name_and_not_imported(cli, tiny, stranger, setting):
    result = cli("fit", *tiny, *setting)
    assert result.returncode == 2 and "--allow_custom_code" in result.stderr
    assert ("class stranger." in result.stderr or "class LambdaCallback" in result.stderr) and not stranger.exists()


@pytest.mark.parametrize(
    "setting",
    [
        ("--trainer.strategy", "{class_path: DDPStrategy, init_args: {ddp_comm_hook: stranger.Hello}}"),
        ("--trainer.callbacks", "stranger.Hello"),
        ("--trainer.profiler", "stranger.Hello"),
    ],
)
def test_functions_and_bare_names_are_not_imported_either(cli, tiny, stranger, setting):
    assert cli("fit", *tiny, *setting).returncode == 2
    assert not stranger.exists()


def test_index_and_the_data_of_a_run_import_nothing_either(cli, tiny, stranger):
    assert cli("index", *tiny, "--model.class_path", "stranger.PrismLM").returncode == 2
    assert not stranger.exists()


def test_with_the_flag_custom_code_runs(tiny, stranger, tmp_path):
    """Also a class that a package offers from another module, and one of Lightning's by its short name."""
    (tmp_path / "offers.py").write_text("from stranger import Hello\n")
    callbacks = "[{class_path: offers.Hello}, {class_path: OnExceptionCheckpoint, init_args: {dirpath: x}}]"
    arguments = [*tiny, "--trainer.callbacks", callbacks, "--allow_custom_code", "--trainer.logger", "false"]
    short = ["--trainer.max_steps", "4", "--model.placement_step", "1"]
    result = run("fit", *arguments, *short, before=partial(site.addsitedir, str(tmp_path)))
    assert result.returncode == 0, result.stderr
    assert "hello from a stranger" in result.stdout and stranger.exists()


def test_every_recipe_names_trusted_classes_only():
    for path in (ROOT / "recipes").glob("*.yaml"):
        limit_imports(composed(path, []).settings, str(path), allow_custom_code=False)
    with pytest.raises(UserError, match="os.system"):
        limit_imports({"trainer": {"callbacks": [{"class_path": "os.system"}]}}, "x.yaml", allow_custom_code=False)


def test_the_parser_imports_what_is_on_the_list():
    limit_imports({}, "x.yaml", allow_custom_code=False)
    from jsonargparse._util import import_object

    for trusted in TRUSTED_CLASSES:
        assert import_object(f"{trusted.__module__}.{trusted.__qualname__}") is trusted
    assert not any(path.startswith(("os", "torch", "builtins")) for path in TRUSTED_PATHS)
    with pytest.raises(Exception, match="not allowed"):
        import_object("torch.nn.Linear")
    assert jsonargparse.__version__


# Values from the environment


def test_values_from_the_environment_are_used_and_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("PRISM_TOKEN", SECRET)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "run: {tracking_uri: 'http://${oc.env:PRISM_TOKEN}@server', experiment: '${run.tracking_uri}'}\n"
        "data: {path: ['${oc.decode:${oc.env:PRISM_TOKEN}}', b.txt], block_size: 16}\n"
        "model: {n: '${data.block_size}'}\n"
    )
    recipe = composed(path, [])
    assert recipe.settings["run"]["tracking_uri"] == f"http://{SECRET}@server"
    assert recipe.settings["data"]["path"] == [SECRET, "b.txt"]
    assert set(recipe.from_environment) == {("run", "tracking_uri"), ("run", "experiment"), ("data", "path", 0)}
    recorded = recipe.without_environment(recipe.settings | {})
    assert SECRET not in yaml.safe_dump(recorded)
    assert recorded["run"]["tracking_uri"] == "http://${oc.env:PRISM_TOKEN}@server" and recorded["model"]["n"] == 16


@pytest.mark.parametrize(
    "reference",
    [
        "${data.path[0]}",
        "${ data.path }",
        "${data[path]}",
        "${data.${data.tokenizer}}",
        '${oc.select:"data.path"}',
        "${..data.path}",
        "${oc.${model.kind}:PRISM_TOKEN}",
        "x-${oc.decode:${oc.env:PRISM_TOKEN}}",
    ],
)
def test_every_way_to_refer_to_the_environment_is_seen(tmp_path, monkeypatch, reference):
    monkeypatch.setenv("PRISM_TOKEN", SECRET)
    path = tmp_path / "recipe.yaml"
    data = {"path": ["${oc.env:PRISM_TOKEN}"], "tokenizer": "path"}
    path.write_text(yaml.safe_dump({"data": data, "model": {"kind": "env"}, "run": {"experiment": reference}}))
    recipe = composed(path, [])
    assert SECRET in str(recipe.settings["run"]["experiment"])
    assert SECRET not in yaml.safe_dump(recipe.without_environment(recipe.settings))


def test_no_file_of_a_run_holds_a_value_from_the_environment(cli, tiny, tmp_path, monkeypatch):
    """The run's own MLflow database among them; the recorded recipe still opens the data, also without the variable."""
    monkeypatch.setenv("PRISM_TOKEN", SECRET)
    (tmp_path / "r.yaml").write_text(f"base: {ROOT}/tests/tiny.yaml\nrun: {{experiment: '${{oc.env:PRISM_TOKEN}}'}}\n")
    arguments = ["--config", str(tmp_path / "r.yaml"), *tiny[2:], "--trainer.max_steps", "4"]
    arguments += ["--model.placement_step", "1", "--run.sample_prompt", "null"]
    assert SECRET in composed(tmp_path / "r.yaml", []).settings["run"]["experiment"]
    printed = cli("fit", *arguments, "--print_config", check=0).stdout
    assert SECRET not in printed and "${oc.env:PRISM_TOKEN}" in printed
    cli("fit", *arguments, check=0)
    # The experiment is a name that the MLflow server itself is told; its parameters and the files are not.
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != "mlflow.db"]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    parameters = client.get_run((tmp_path / "run" / "mlflow_run_id").read_text()).data.params
    assert parameters["run/experiment"] == "${oc.env:PRISM_TOKEN}" and SECRET not in json.dumps(parameters)
    monkeypatch.delenv("PRISM_TOKEN")
    from prism_lightning.run.training_data import data_of

    assert len(data_of(tmp_path / "run").train) > 0


def test_errors_do_not_show_a_value_from_the_environment(cli, tiny, monkeypatch):
    monkeypatch.setenv("PRISM_TOKEN", SECRET)
    result = cli("fit", *tiny, "--data.block_size", "${oc.env:PRISM_TOKEN}")
    assert result.returncode == 2 and SECRET not in result.stdout + result.stderr
    assert "${oc.env:PRISM_TOKEN}" in result.stderr


def test_telemetry_is_off_unless_the_user_sets_it(tmp_path):
    script = "import os, sys\nfrom prism_lightning.cli.main import main\nmain(['--version'])\n"
    script += "print(os.environ['MLFLOW_DISABLE_TELEMETRY'], os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    environment = child_environment()
    environment.pop("HF_HUB_DISABLE_TELEMETRY", None)
    environment["MLFLOW_DISABLE_TELEMETRY"] = "false"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert out.stdout.splitlines()[-1] == "false 1"
