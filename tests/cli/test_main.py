"""The command line as a user types it: help, wrong input, and a whole small run."""

import json
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.processes import child_environment, command, fit, run
from support.runs import ROOT, copied_run, in_run

from prism_lightning import __version__


@pytest.fixture(scope="module")
def finished(finished_run, tmp_path_factory):
    """A finished tiny run that these tests may write to: its folder, arguments and output."""
    return *copied_run(finished_run, tmp_path_factory.mktemp("finished") / "run"), finished_run[2]


def refused(result, *words):
    """One line per problem on stderr, exit code 2, no traceback."""
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors and "Traceback" not in result.stderr + result.stdout
    for word in words:
        assert any(word in line for line in errors), (word, errors)


# Help


def print_settings_page():
    from prism_lightning.cli.settings_page import settings_page

    print(settings_page(), end="")
    sys.exit(0)


def test_the_settings_page_is_what_the_parser_knows():
    page = (ROOT / "prism_lightning" / "cli" / "settings.txt").read_text()
    assert page == run(before=print_settings_page).stdout, "run python -m prism_lightning.cli.settings_page"


def test_the_module_runs_as_a_program():
    """A true start: elsewhere processes are forked with the imports done."""
    result = subprocess.run(
        command("validate", "--config", "tests/tiny.yaml", "--run.dir", "/nowhere"),
        capture_output=True,
        text=True,
        env=child_environment(),
        cwd=ROOT,
    )
    refused(result, "/nowhere holds neither")
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["attribute", "python -m prism_lightning fit --config recipes/quickstart.yaml"]),
        (["fit", "--help"], ["fit: train a model", "--trainer.max_steps"]),
        (["explain", "--help"], ["--ckpt_path", "--text"]),
        (["generate", "--help"], ["--ckpt_path", "--prompt", "--max_new_tokens"]),
        (["--version"], [__version__]),
    ],
)
def test_help_imports_nothing_heavy(arguments, words):
    script = (
        "import sys\nfrom prism_lightning.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'transformers', 'jsonargparse'} & set(sys.modules)\nassert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert [word for word in words if word not in result.stdout] == []


def test_help_explains_every_setting():
    page = (ROOT / "prism_lightning" / "cli" / "settings.txt").read_text()
    entries = re.split(r"\n  (?=--)", page)[1:]
    assert len(entries) > 80
    unexplained = [
        entry.split()[0]
        for entry in entries
        if not re.search(
            r"[a-z]{3,} \w+", re.sub(r"\((required|type|default).*", "", entry.partition(" ")[2], flags=re.S)
        )
    ]
    assert unexplained == []


# A whole run


def test_fit_prints_progress_explanation_and_a_last_line_of_results(finished):
    folder, _, output = finished
    lines = output.splitlines()
    results = json.loads(lines[-1])
    assert results["step"] == 12 and results["unexplained_variance"] < results["unexplained_variance_before_polish"]
    assert re.search(r"step 10/12  loss \d\.\d+  [\d,]+ tokens/s  \d+ s left", output)
    assert "Which prototypes made each token likely" in output
    assert json.loads((folder / "results.jsonl").read_text().splitlines()[-1]) == results


def test_run_directory_holds_what_the_run_was(finished):
    folder, _, _ = finished
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{16}", environment["data_fingerprint"])
    assert "num_prototypes: 64" in (folder / "recipe.yaml").read_text()
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-00000008.ckpt", "step-00000012.ckpt"]
    assert "val/unexplained_variance" in next((folder / "csv").glob("*/metrics.csv")).read_text()
    assert {p.suffix for p in (folder / "model").iterdir()} == {".json", ".safetensors"}


def test_mlflow_holds_settings_and_metrics(finished):
    import mlflow

    folder, _, _ = finished
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    run = client.get_run((folder / "mlflow_run_id").read_text())
    assert run.data.params["model/init_args/num_prototypes"] == "64"
    assert run.data.metrics["val/loss"] == pytest.approx(
        json.loads((folder / "results.jsonl").read_text())["loss"], abs=1e-4
    )


def test_a_finished_run_is_not_run_again(finished, cli):
    result = cli("fit", *finished[1], check=0)
    assert "is complete at step 12" in result.stdout


def reported_loss(result):
    """The loss in the table that validate and test print."""
    return float(re.search(r"(?:val|test)/loss\W+([\d.]+)", result.stdout)[1])


def test_validate_test_and_predict_use_what_fit_left(finished, cli):
    folder, arguments, output = finished
    loss = json.loads(output.splitlines()[-1])["loss"]
    newest, older = (folder / "checkpoints" / f"step-{step:08d}.ckpt" for step in (12, 8))
    for verb, more in (("validate", []), ("test", []), ("validate", ["--ckpt_path", folder])):
        assert reported_loss(cli(verb, *arguments, *more, check=0)) == pytest.approx(loss, abs=1e-5)
    newest, older = (cli("validate", *arguments, "--ckpt_path", path, check=0) for path in (newest, older))
    assert reported_loss(newest) == pytest.approx(loss, abs=1e-5)
    assert reported_loss(older) > loss + 1e-3
    cli("predict", *arguments, check=0)
    from safetensors.torch import load_file

    predictions = load_file(folder / "predictions.safetensors")
    assert -predictions["log_probabilities"].mean().item() == pytest.approx(loss, abs=1e-4)


def likeliest(folder, count):
    """The likeliest tokens after a prompt, each from the logits of the whole text."""
    from prism_lightning.run.model_folder import load_exported

    model, tokenizer = load_exported(folder)
    ids = tokenizer("def f")["input_ids"]
    for _ in range(count):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[-count:]


def test_generate_and_explain(finished, cli):
    folder = finished[0]
    five = ["--prompt", "def f", "--max_new_tokens", "5"]
    greedy = cli("generate", "--ckpt_path", folder, *five, "--temperature", 0, "--json", check=0).stdout
    assert json.loads(greedy)["token_ids"] == likeliest(folder, 5)
    text = cli("generate", "--ckpt_path", folder, *five, check=0).stdout
    again = cli(
        "generate", "--ckpt_path", folder / "model", "--prompt", "def f", "--max_new_tokens", 5, "--json", check=0
    )
    assert "def f" + json.loads(again.stdout)["continuation"] == text.rstrip("\n")
    table = cli("explain", "--ckpt_path", folder, "--text", "import os", check=0).stdout
    assert "residual" in table and "= logit" in table
    tokens = json.loads(cli("explain", "--ckpt_path", folder, "--text", "import os\nx = 1", "--json", check=0).stdout)
    for token in tokens:
        assert token["sum"] == pytest.approx(token["logit"], abs=1e-4)
        assert token["residual"] + sum(p["contribution"] for p in token["prototypes"]) == pytest.approx(token["sum"])


def test_contributions_add_up_for_every_token_of_a_real_text(finished):
    from prism_lightning.models import decompose
    from prism_lightning.run.model_folder import load_exported

    model, tokenizer = load_exported(finished[0])
    text = (ROOT / "prism_lightning" / "cli" / "main.py").read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    blocks = ids[: len(ids) // 32 * 32].view(-1, 32)
    split = decompose(model, blocks[:, :-1], blocks[:, 1:])
    assert len(ids) > 1000
    torch.testing.assert_close(split.total_BT, split.logit_BT, atol=1e-4, rtol=0)


def test_weights_stored_in_bf16_are_read_as_fp32(finished, tmp_path):
    """What `fit --trainer.precision bf16-true` exports can be indexed."""
    from prism_lightning.run.model_folder import load_exported, save_exported

    model, tokenizer = load_exported(finished[0])
    save_exported(model.bfloat16(), tokenizer, tmp_path / "model")
    assert load_exported(tmp_path)[0].dtype == torch.float32


def test_generated_text_cannot_steer_the_terminal(finished, cli):
    out = cli("generate", "--ckpt_path", finished[0], "--prompt", "x\x1b[31m\n", "--max_new_tokens", 1, check=0).stdout
    assert out.startswith("x\\x1b[31m\n") and "\x1b" not in out


# Wrong input


def test_all_problems_of_a_recipe_are_named_at_once(cli, tiny):
    result = cli(
        "fit", *tiny, "--model.num_protoypes", 3, "--trainer.max_stepz", 4, "--data.block_size", "abc", "--nonsense", 1
    )
    refused(
        result,
        "did you mean num_prototypes?",
        "did you mean max_steps?",
        "data.block_size='abc': expected int",
        "nonsense is no setting",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.active_prototypes", "65"], ["between 1 and num_prototypes=64"]),
        (["--model.backbone.n_layers", "3"], ["did you mean n_layer?"]),
        (["--model.backbone.n_positions", "16"], ["longer than the model's context of 16"]),
        (["--model.backbone.vocab_size", "299"], ["300 tokens but the model's vocabulary 299"]),
        (["--model.class_path", "PrismML"], ["did you mean PrismLM?"]),
        (["--data.path", "/nowhere/*.txt"], ["/nowhere/*.txt: no such file"]),
        (["--data.tokenizer", "/nowhere"], ["/nowhere: no such file"]),
        (["--data.micro_batch_size", "3"], ["no multiple of"]),
        (["--trainer.accelerator", "cuda"], ["none", "recipes/quickstart.yaml"]),
        (["--trainer.max_steps", "-1"], ["trainer.max_steps"]),
        (["--ckpt_path", "/nowhere.ckpt"], ["/nowhere.ckpt not found"]),
        (["--ckpt_path", "/tmp"], ["/tmp is no checkpoint to resume from"]),
        (["--run.dir", "/dev/null/run"], ["run.dir /dev/null/run cannot be created"]),
        (["--data.cache_dir", "/dev/null/cache"], ["written to data.cache_dir /dev/null/cache (Not a directory)"]),
    ],
)
def test_wrong_settings_are_one_line_and_leave_no_run(cli, tiny, tmp_path, arguments, words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    refused(cli("fit", *tiny, *arguments), *words)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_largest_recipe_fails_in_words_where_no_gpu_is(cli):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    refused(cli("fit", "--config", "recipes/prism_1b.yaml"), "recipes/prism_1b.yaml needs CUDA GPUs")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fitt"], ["did you mean fit?"]),
        (["fit"], ["--config"]),
        (["fit", "--config", "recipes/quickstrat.yaml"], ["did you mean quickstart.yaml?"]),
        (["generate", "--ckpt_path", "/nowhere", "--prompt", "x"], ["no exported model"]),
        (["validate", "--config", "tests/tiny.yaml", "--run.dir", "/nowhere"], ["/nowhere holds neither"]),
        (["validate", "--config", "tests/tiny.yaml", "--ckpt_path", "/dev"], ["/dev holds neither an exported model"]),
    ],
)
def test_wrong_command_lines(cli, arguments, words):
    refused(cli(*arguments), *words)


def test_generation_and_explanation_refuse_what_does_not_fit(finished, cli):
    folder = finished[0]
    refused(cli("explain", "--ckpt_path", folder, "--text", "x"), "shorter than two tokens")
    refused(cli("explain", "--ckpt_path", folder, "--text", "x = 1\n" * 50), "context of 32")
    refused(cli("generate", "--ckpt_path", folder, "--prompt", "x", "--max_new_tokens", 100), "context of 32")
    refused(cli("generate", "--ckpt_path", folder, "--prompt", ""), "prompt is empty")


def test_another_recipe_does_not_overwrite_a_run(finished, cli):
    refused(
        cli("fit", *finished[1], "--model.learning_rate", "1e-4"),
        "run of another recipe (model.init_args.learning_rate",
    )


class Trap:
    """A pickle that would run code."""

    def __reduce__(self):
        return (Path.touch, (Path("/tmp/prism_trap_sprung"),))


@pytest.mark.parametrize("kind", ["truncated", "another shape", "pickle", "torch pickle"])
def test_bad_checkpoints_are_refused(finished, cli, tmp_path, kind):
    folder, arguments, _ = finished
    Path("/tmp/prism_trap_sprung").unlink(missing_ok=True)
    source, bad = folder / "checkpoints" / "step-00000012.ckpt", tmp_path / "bad.ckpt"
    extra = []
    if kind == "truncated":
        bad.write_bytes(source.read_bytes()[:-5000])
    elif kind == "another shape":
        shutil.copy(source, bad)
        extra = ["--model.backbone.n_embd", "16"]
    elif kind == "pickle":
        bad.write_bytes(pickle.dumps(Trap()))
    else:
        torch.save({"state_dict": Trap()}, bad)
    for verb in ("validate", "fit"):
        result = cli(verb, *arguments, *extra, "--run.dir", tmp_path / "new", "--ckpt_path", bad)
        refused(result, "of another model" if extra else str(bad))
    assert not Path("/tmp/prism_trap_sprung").exists()


def test_an_exported_folder_with_damaged_weights_is_refused(finished, cli, tmp_path):
    shutil.copytree(finished[0] / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])
    ask = ("generate", "--ckpt_path", tmp_path / "model", "--prompt", "x")
    refused(cli(*ask), f"{weights} has ", "checksums.json")
    (tmp_path / "model" / "checksums.json").unlink()  # as folders of older versions are
    refused(cli(*ask), "cannot be loaded")
    weights.unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    Path("/tmp/prism_trap_sprung").unlink(missing_ok=True)
    refused(cli(*ask), "cannot be loaded")
    assert not Path("/tmp/prism_trap_sprung").exists()


def fill_the_disk_at_step_8():
    from prism_lightning.run import checkpoints

    save = torch.save

    def limited(obj, file):
        if "step-00000008" in file.name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, -1))
        save(obj, file)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpoints.torch.save = limited


def test_a_full_disk_while_saving_keeps_the_previous_checkpoint(finished, tmp_path):
    """A limit on file size stands in for the full disk: the write fails in the middle, as it would there."""
    arguments = in_run(finished[1], tmp_path / "run")
    result = run("fit", *arguments, before=fill_the_disk_at_step_8)
    refused(result, "could not be saved", "earlier checkpoints are complete")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004.ckpt"]
    assert "resuming from" in fit(arguments)
