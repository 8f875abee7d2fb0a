"""Files of interventions, their composition, and the verbs that apply them."""

import json

import pytest
import torch

from prism_lightning.common.errors import UserError
from prism_lightning.interventions.intervention import Intervention, apply, load_with
from prism_lightning.models.steering import Scaling
from prism_lightning.run.fingerprints import model_fingerprint
from prism_lightning.run.model_folder import load_exported

HALF = dict.fromkeys(range(0, 64, 2), 0.0)


@pytest.fixture
def removal(run, tmp_path):
    """An intervention that removes every second prototype of the run's model, by its path."""
    path = tmp_path / "half.json"
    Intervention(model_fingerprint(load_exported(run)[0]), Scaling(HALF), {"by": "hand"}).write(path)
    return path


def test_a_file_is_read_as_it_was_written(removal):
    intervention = Intervention.read(removal)
    assert intervention.scaling == Scaling(HALF) and intervention.origin == {"by": "hand"}
    assert json.loads(removal.read_text())["factors"]["2"] == 0.0


def test_a_file_may_mean_some_logits_alone(run, tmp_path):
    path = tmp_path / "some.json"
    Intervention("m", Scaling({3: 0.5}, (7, 9))).write(path)
    assert Intervention.read(path).scaling == Scaling({3: 0.5}, (7, 9)) and '"tokens": [' in path.read_text()


def test_interventions_compose_with_each_other_and_with_what_the_model_was_exported_with(run, removal, tmp_path):
    model, _ = load_with(run, [removal])
    other = tmp_path / "other.json"
    Intervention(model_fingerprint(model), Scaling({0: 3.0, 1: 3.0})).write(other)
    both, _ = load_with(run, [removal, other])
    assert both.scalings == [Scaling(HALF | {1: 3.0})]
    apply(model, run, [other])
    assert model.scalings == both.scalings


def test_every_verb_applies_it_alike(run, removal, cli, tmp_path):
    """generate, explain and attribute, and the exported folder without the file."""
    exported = tmp_path / "exported"
    assert (
        "32 prototypes scaled"
        in cli("export", "--ckpt_path", run, "--intervention", removal, "--out", exported, check=0).stdout
    )
    options = ("--ckpt_path", run, "--intervention", removal)
    for verb, more in (
        (
            "generate",
            ("--prompt", "import os", "--temperature", "1", "--top_k", "0", "--max_new_tokens", "16", "--json"),
        ),
        ("explain", ("--text", "import os, sys", "--json")),
    ):
        with_file = json.loads(cli(verb, *options, *more, check=0).stdout)
        from_folder = json.loads(cli(verb, "--ckpt_path", exported, *more, check=0).stdout)
        plain = json.loads(cli(verb, "--ckpt_path", run, *more, check=0).stdout)
        assert with_file == from_folder != plain
    scaled = [
        p
        for token in json.loads(cli("explain", *options, "--text", "import os", "--json").stdout)
        for p in token["prototypes"]
    ]
    assert all(p["factor"] == (p["id"] % 2) for p in scaled) and any(p["factor"] == 0 for p in scaled)
    assert " x 0" in cli("explain", *options, "--text", "import os", check=0).stdout
    refused = cli("export", *options, "--out", exported)
    assert refused.returncode == 2 and "exists" in refused.stderr


def test_attribution_asks_about_the_steered_model(run, removal, index_arguments, cli):
    cli("index", *index_arguments, "--index.dictionary", "model", "--index.dir", run / "own", check=0)
    command = ("attribute", "--ckpt_path", run, "--index", run / "own", "--text", "import os", "--json")
    plain, steered = (json.loads(cli(*command, *more, check=0).stdout)[0] for more in ((), ("--intervention", removal)))
    model, tokenizer = load_with(run, [removal])
    ids = torch.tensor([tokenizer("import os")["input_ids"]])
    with torch.no_grad():
        expected = -model(ids).logits[0, 0].log_softmax(-1)[ids[0, 1]].item()
    assert steered["loss"] == pytest.approx(expected, abs=1e-4) and steered["loss"] != pytest.approx(
        plain["loss"], abs=1e-3
    )
    assert any(i % 2 == 0 for i, _ in plain["prototypes"])
    assert all(i % 2 == 1 for i, _ in steered["prototypes"])
    assert all(i % 2 == 1 for token in steered["tokens"] for i, _ in token["prototypes"])


def test_evaluation_keeps_results_with_and_without_it_apart(run, removal, cli, tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text("tasks: {validation: {kind: validation, metric: bits_per_byte, documents: 4}}")
    command = ("evaluate", "--ckpt_path", run, "--suite", suite, "--json")
    plain = json.loads(cli(*command, check=0).stdout)["results"][0][0]
    steered = json.loads(cli(*command, "--intervention", removal, check=0).stdout)["results"][0][0]
    assert plain["metrics"] != steered["metrics"] and len(steered["identity"]["scalings"][0]["factors"]) == 32
    assert (run / "evaluation" / "validation.json").is_file() and (
        run / "evaluation" / "half" / "validation.json"
    ).is_file()
    assert json.loads(cli(*command, check=0).stdout)["results"][0][0] == plain


def test_an_intervention_of_the_run_goes_by_its_name(run, removal, cli):
    folder = run / "interventions"
    folder.mkdir(exist_ok=True)
    (folder / "every_second.json").write_bytes(removal.read_bytes())
    command = (
        "generate",
        "--ckpt_path",
        run,
        "--prompt",
        "import",
        "--max_new_tokens",
        "16",
        "--json",
        "--intervention",
    )
    assert cli(*command, "every_second", check=0).stdout == cli(*command, removal, check=0).stdout


def test_what_is_no_intervention_is_refused(run, removal, cli, tmp_path, make_model):
    def error_of(content):
        path = tmp_path / "wrong.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        result = cli("generate", "--ckpt_path", run, "--prompt", "x", "--intervention", path)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        return result.stderr

    right = json.loads(removal.read_text())
    none = "is no intervention"
    assert none in error_of("[]") and none in error_of("{") and none in error_of(right | {"factors": {"one": 0}})
    for change, words in (
        ({"factors": {"3": float("nan")}}, "factors.3 is nan, expected a finite number"),
        ({"factors": {"3": 1e999}}, "factors.3 is inf"),
        ({"factors": {"3": "0"}}, "factors.3 is '0'"),
        ({"factors": [0.0]}, "factors is [0.0]"),
        ({"factors": {"-1": 0.0}}, "'-1' is no prototype"),
        ({"factors": {"9" * 5000: 0.0}}, "is no prototype"),
        ({"tokens": [1.5]}, "tokens[0] is 1.5"),
        ({"tokens": 3}, "tokens is 3"),
        ({"origin": {"tasks": [{}]}}, "origin.tasks[0] is {}"),
        ({"origin": []}, "origin is []"),
        ({"model": 0}, "model is 0"),
        ({"format": None}, "format is null"),
    ):
        assert words in error_of(right | change) and error_of(right | change).count("\n") == 1
    assert "is no JSON object" in error_of("[" * 100_000)
    assert "format 9" in error_of(right | {"format": 9})
    assert "made for model 00" in error_of(right | {"model": "00"})
    assert "prototype 64 is not in the model" in error_of(right | {"factors": {"64": 0.0}})
    result = cli("generate", "--ckpt_path", run, "--prompt", "x", "--intervention", tmp_path / "none.json")
    assert result.returncode == 2 and "no such file" in result.stderr
    with pytest.raises(UserError, match="dense"):
        apply(make_model(), run, [removal])
