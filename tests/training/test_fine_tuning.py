"""Fine-tuning data through the command line: interrupted runs, several ranks, an index, an attribution, predictions."""

import pytest
import torch
from safetensors.torch import load_file
from support.fine_tuning import completion_rows, write_rows
from support.processes import fit, ranks

from prism_lightning.lightning_modules.dense import DenseLM


@pytest.fixture
def arguments(tmp_path):
    """Prompts and completions for the tiny recipe, without the run directory."""
    path = write_rows(tmp_path / "rows.jsonl", completion_rows())
    arguments = ["--config", "tests/tiny.yaml", "--data.path", path, "--data.cache_dir", tmp_path / "cache"]
    return [*arguments, "--data.prompt_column", "ask.text", "--data.completion_column", "answer"]


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def test_an_interrupted_run_resumes_bit_for_bit_and_is_attributed(cli, arguments, tmp_path, monkeypatch):
    """Dropout, placement, revival, accumulation and polishing are all on in this recipe."""
    arguments += ["--model.polish_tokens", "512"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    cli("fit", *arguments, "--run.dir", whole, check=0)
    weigh = DenseLM._target_weight

    def interrupted(module, targets):
        if module.global_step == 6:
            raise RuntimeError("interrupted")
        return weigh(module, targets)

    monkeypatch.setattr(DenseLM, "_target_weight", interrupted)
    with pytest.raises(RuntimeError, match="interrupted"):
        cli("fit", *arguments, "--run.dir", parts)
    monkeypatch.setattr(DenseLM, "_target_weight", weigh)
    out = cli("fit", *arguments, "--run.dir", parts, check=0).stdout
    assert "step-00000004.ckpt" in out and "of them targets" in out
    expected, resumed = weights(whole), weights(parts)
    assert [name for name in expected if not torch.equal(expected[name], resumed[name])] == []

    index = [*arguments, "--run.dir", whole, "--index.prototypes", "32", "--index.fit_steps", "2"]
    assert "of them targets" in cli("index", *index, check=0).stdout
    text = "What is 3 plus 3? It is 6."
    result = cli("attribute", "--ckpt_path", whole, "--text", text, check=0)
    assert "rows.jsonl row" in result.stdout
    assert "rows.jsonl" in cli("prototypes", "--ckpt_path", whole, check=0).stdout
    cli("predict", *arguments, "--run.dir", whole, check=0)
    assert load_file(whole / "predictions.safetensors")["log_probabilities"].isnan().any()


def test_two_ranks_train_as_one(arguments, tmp_path):
    """Ranks have different numbers of targets. The prototypes' own losses are of a micro-batch, so they stay out."""
    options = ["--model.polish_steps", "0", "--trainer.max_steps", "6", "--model.commitment", "0"]
    options += [f"--model.backbone.{name}_pdrop=0" for name in ("resid", "embd", "attn")]
    arguments = [*map(str, arguments), *options]
    one, two = tmp_path / "one", tmp_path / "two"
    fit([*arguments, "--run.dir", str(one), "--data.micro_batch_size", "8"])
    devices = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    ranks(2, "fit", *arguments, "--run.dir", str(two), "--data.micro_batch_size", "2", *devices)
    expected, got = weights(one), weights(two)
    for name, value in expected.items():
        if name != "prototypes.weight":
            torch.testing.assert_close(got[name], value, atol=1e-4, rtol=0, msg=name)


def test_wrong_columns_are_told_in_one_line(cli, arguments, tmp_path):
    arguments[arguments.index("ask.text")] = "asks"
    result = cli("fit", *arguments, "--run.dir", tmp_path / "run", check=2)
    assert "no column 'asks' (data.prompt_column)" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
