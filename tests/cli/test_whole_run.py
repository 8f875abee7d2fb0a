"""A whole small run: what `fit` writes, and what the verbs on its model print."""

import json
import re

import pytest
import torch
from support.runs import ROOT


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
