"""`fit` from pretrained weights, whole or by adapters: the verbs on such a run, killed runs, and what is refused."""

import json
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.pretrained_models import save_lora, save_model, token_ids, tokenizer_of
from support.processes import fit, ranks, start
from support.refusals import refused
from support.runs import ROOT, in_run
from transformers import AutoModelForCausalLM

from prism_lightning.reporting.runs import read_run
from prism_lightning.run.model_folder import load_exported

LORA = ["--model.lora", "{rank: 4, alpha: 8, dropout: 0.1}"]
RECIPE = """\
base: {base}
run: {{checkpoint_interval: 3, sample_prompt: null}}
trainer: {{accelerator: cpu, max_steps: 9, val_check_interval: 6}}
model:
  class_path: PrismLM
  init_args:
    num_prototypes: 64
    active_prototypes: 4
    placement_step: 2
    revival_interval: 3
    polish_steps: 5
    polish_tokens: 1024
    warmup_steps: 2
data:
  path: {corpus}/*.txt
  cache_dir: {cache}
  block_size: 32
  batch_size: 4
  micro_batch_size: 2
  validation_blocks: 8
  validation_fraction: 0.2
  max_tokens: 20000
"""


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pretrained(request, tmp_path_factory):
    """A folder of a tiny model; Llama's weights are stored in bf16, as on the hub, and GPT-2 has dropout."""
    dtype = torch.bfloat16 if request.param == "llama" else torch.float32
    return save_model(tmp_path_factory.mktemp("pretrained") / request.param, request.param, dtype)


@pytest.fixture
def arguments(tmp_path, corpus, cache):
    """Arguments of a fit without --model.pretrained, in a run directory of its own."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=ROOT / "recipes/base/defaults.yaml", corpus=corpus, cache=cache))
    return ["--config", str(recipe), "--run.dir", str(tmp_path / "run")]


def exported(folder):
    return load_file(folder / "model" / "model.safetensors")


def checkpoint(folder, step=9):
    return torch.load(folder / "checkpoints" / f"step-{step:08d}.ckpt", weights_only=True)


def test_without_a_learning_rate_the_model_stays_the_pretrained_one(cli, arguments, pretrained, tmp_path):
    out = cli("fit", *arguments, "--model.pretrained", pretrained, "--model.learning_rate", "0", check=0).stdout
    assert f"PRISM with 64 prototypes from {pretrained}" in out
    model, tokenizer = load_exported(tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids()).logits, base(token_ids()).logits, atol=1e-5, rtol=0)
    assert tokenizer.get_vocab() == tokenizer_of().get_vocab() and model.config.base_model == str(pretrained)
    assert model.prototypes.weight.norm() > 1  # placed on hidden states


def test_all_weights_learn_and_every_verb_takes_the_run(cli, arguments, tmp_path):
    run, pretrained = tmp_path / "run", save_model(tmp_path / "base")
    cli("fit", *arguments, "--model.pretrained", pretrained, check=0)
    (optimizer,) = checkpoint(run)["optimizer_states"]
    assert len(optimizer["state"]) == len(exported(run)) and all(
        s["exp_avg"].any() for s in optimizer["state"].values()
    )
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["data"]["tokenizer"] == str(run / "tokenizer")
    assert recipe["model"]["init_args"]["pretrained"] == str(pretrained)
    expected = json.loads((run / "results.jsonl").read_text())["loss"]

    started = [*arguments, "--model.pretrained", pretrained]
    assert f"{expected:.4f}"[:5] in cli("validate", *started, check=0).stdout
    assert "test/loss" in cli("test", *started, check=0).stdout
    assert "wrote" in cli("predict", *started, check=0).stdout
    assert "training tokens" in cli("index", *started, "--index.prototypes", 32, "--index.fit_steps", 2, check=0).stdout
    assert "complete at step 9" in cli("fit", *started, check=0).stdout
    assert "complete at step 9" in cli("fit", "--config", run / "recipe.yaml", check=0).stdout
    cli("attribute", "--ckpt_path", run, "--text", "import os", check=0)
    cli("explain", "--ckpt_path", run, "--prompt", "import os", check=0)
    cli("prototypes", "--ckpt_path", run, check=0)
    cli("export", "--ckpt_path", run, "--out", tmp_path / "native", "--native", check=0)
    assert (tmp_path / "native" / "config.json").is_file()


@pytest.mark.parametrize("options", [[], LORA], ids=["whole", "lora"])
def test_kills_leave_the_weights_bit_equal(arguments, pretrained, options, tmp_path):
    """Dropout of model and adapters, placement, revival, accumulation and polishing are on in this recipe."""
    arguments = [*arguments, "--model.pretrained", str(pretrained), *options]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    fit(in_run(arguments, whole))
    for step in (3, 6):
        child = start("fit", *in_run(arguments, killed))
        while not (killed / "checkpoints" / f"step-{step:08d}.ckpt").is_file():
            assert child.poll() is None, child.stderr
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    weights = pretrained / "model.safetensors"
    weights.rename(weights.with_suffix(".away"))  # the checkpoint has all that is needed
    try:
        assert "resuming from" in fit(in_run(arguments, killed))
    finally:
        weights.with_suffix(".away").rename(weights)
    expected, resumed = exported(whole), exported(killed)
    assert [name for name in expected if not torch.equal(expected[name], resumed[name])] == []
    first, second = (json.loads((run / "results.jsonl").read_text()) for run in (whole, killed))
    assert first["loss"] == second["loss"]


def test_adapters_alone_are_trained_then_merged_and_saved(cli, arguments, pretrained, tmp_path):
    import peft

    run = tmp_path / "run"
    started = [*arguments, "--model.pretrained", pretrained, *LORA, "--model.learning_rate", "0.01"]
    assert "of them trained" in cli("fit", *started, check=0).stdout
    (optimizer,) = checkpoint(run)["optimizer_states"]
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(optimizer["state"]) == len(adapter) + 1  # and the prototypes
    assert all(state["exp_avg"].any() for state in optimizer["state"].values())

    base = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32).eval()
    before = base(token_ids()).logits.detach()
    adapted = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
    model, _ = load_exported(run)
    with torch.no_grad():
        logits = adapted(token_ids()).logits
        assert (logits - before).abs().max() > 1e-2
        torch.testing.assert_close(model(token_ids()).logits, logits, atol=1e-5, rtol=0)
    trained = [name for name, value in adapter.items() if ".lora_B" in name and value.any()]
    assert len(trained) == len(adapter) // 2

    from_model = cli("validate", *started, check=0).stdout
    from_checkpoint = cli("validate", *started, "--ckpt_path", run / "checkpoints/step-00000009.ckpt", check=0).stdout
    losses = [next(line for line in out.splitlines() if "val/loss" in line) for out in (from_model, from_checkpoint)]
    assert losses[0] == losses[1]
    assert read_run(run).parameters == model.num_parameters() - 64 * 32


def test_two_ranks_train_adapters_as_one(arguments, tmp_path):
    """The prototypes' own losses are of a micro-batch, so they stay out; the ranks start together, as torchrun does."""
    base = save_model(tmp_path / "base", "llama")
    arguments = [*arguments, "--model.pretrained", str(base), "--model.lora", "{rank: 4}", "--model.commitment", "0"]
    arguments += ["--model.polish_steps", "0", "--trainer.max_steps", "6", "--model.learning_rate", "0.01"]
    one, two = tmp_path / "one", tmp_path / "two"
    fit(in_run(arguments, one, "--data.micro_batch_size", "4"))
    ranks(2, "fit", *in_run(arguments, two, "--trainer.devices", "2", "--trainer.strategy", "ddp"))
    expected, got = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-4, rtol=0, msg=name)


def test_dense_models_and_pursuits_start_from_pretrained_weights_too(cli, arguments, tmp_path):
    pretrained = save_model(tmp_path / "base")
    few = ["--trainer.max_steps", "3", "--trainer.val_check_interval", "3", "--model.pretrained", pretrained]
    cli("fit", *arguments, *few, "--model.encoder", "pursuit", check=0)
    assert load_exported(tmp_path / "run")[0].config.encoder == "pursuit"
    dense = ["--model", "{class_path: DenseLM, init_args: {warmup_steps: 1}}", "--run.dir", tmp_path / "dense"]
    arguments = arguments[:2]
    out = cli("fit", *arguments, *dense, *few, *LORA, check=0).stdout
    assert f"dense from {pretrained}" in out
    assert not any("prototypes" in name or "lora" in name for name in exported(tmp_path / "dense"))


def test_settings_that_cannot_be_used_are_one_line(cli, arguments, tmp_path):
    base = save_model(tmp_path / "base")
    start_from = ["--model.pretrained", base]
    refused(cli("fit", *arguments), "model.backbone and model.pretrained: neither is given")
    refused(cli("fit", *arguments, *start_from, "--model.backbone", "{model_type: gpt2}"), "both are given")
    new = ["--model.backbone", "{model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, vocab_size: 300}"]
    refused(cli("fit", *arguments, *new, *LORA), "model.lora needs model.pretrained")
    refused(cli("fit", *arguments, *new, "--model.gguf_file", "m.gguf"), "model.gguf_file is m.gguf")
    refused(cli("fit", *arguments, *start_from, "--model.lora", "{rank: 0}"), "model.lora.rank is 0")
    refused(cli("fit", *arguments, *start_from, "--model.lora", "{ranks: 2}"), "model.init_args.lora")
    refused(cli("fit", *arguments, *start_from, "--model.lora", "{targets: [q_proj]}"), "names q_proj", "c_attn")
    refused(cli("fit", *arguments, *start_from, "--model.lora", "{targets: [wte]}"), "names wte")
    refused(cli("fit", *arguments, *start_from, "--data.block_size", "65"), "longer than the model's context of 64")
    sharded = ["--trainer.strategy", "fsdp", "--trainer.devices", "2"]
    refused(cli("fit", *arguments, *start_from, *LORA, *sharded), "model.lora needs whole weights")
    refused(cli("validate", *arguments, *start_from), "run fit first")
    refused(cli("fit", *arguments, "--model.pretrained", tmp_path / "nowhere"), "no such folder")


def test_a_tokenizer_of_another_vocabulary_is_refused_by_name(cli, arguments, tmp_path):
    base = save_model(tmp_path / "base")
    other = tokenizer_of()
    other.add_tokens(["zyzzyva"])
    other.save_pretrained(tmp_path / "other")
    result = cli("fit", *arguments, "--model.pretrained", base, "--data.tokenizer", tmp_path / "other")
    refused(result, f"data.tokenizer {tmp_path / 'other'} has another vocabulary than the tokenizer of model {base}")
    cli("fit", *arguments, "--model.pretrained", base, "--data.tokenizer", base, "--trainer.max_steps", 3, check=0)


def test_a_tokenizer_left_by_another_model_is_replaced(cli, arguments, tmp_path):
    other = save_model(tmp_path / "other", tokenizer=False)
    tokenizer_of("<end>").save_pretrained(other)
    refused(cli("fit", *arguments, "--model.pretrained", other, "--data.path", tmp_path / "nothing"), "nothing")
    base = save_model(tmp_path / "base")
    cli("fit", *arguments, "--model.pretrained", base, "--trainer.max_steps", 3, check=0)
    assert load_exported(tmp_path / "run")[1].eos_token == "<|endoftext|>"


def test_a_run_whose_model_is_gone_says_so(cli, arguments, tmp_path):
    base = save_model(tmp_path / "base")
    started = [*arguments, "--model.pretrained", base]
    cli("fit", *started, "--trainer.max_steps", 3, check=0)
    base.rename(tmp_path / "moved")
    refused(cli("fit", *started, "--trainer.max_steps", 6), f"model {base}: no such folder")
    cli("explain", "--ckpt_path", tmp_path / "run", "--prompt", "import os", check=0)
    cli("report", "--runs", tmp_path / "run", "--out", tmp_path / "report", check=0)


def test_an_adapter_folder_is_merged_before_training_and_before_a_retrofit(cli, arguments, corpus, tmp_path):
    import peft

    base = save_model(tmp_path / "base", "llama")
    adapter = save_lora(base, tmp_path / "adapter")
    few = ["--trainer.max_steps", 3, "--model.learning_rate", 0]
    cli("fit", *arguments, "--model.pretrained", adapter, *few, check=0)
    data = ["--data.path", f"{corpus}/*.txt", "--data.cache_dir", tmp_path / "cache", "--data.block_size", 32]
    sizes = ["--prototypes", 32, "--fit_tokens", 2048, "--fit_steps", 2, "--validation_tokens", 512]
    cli("retrofit", "--model", adapter, *data, "--out", tmp_path / "retrofit", *sizes, check=0)
    native = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(native, adapter).eval()(token_ids()).logits
        for run in ("run", "retrofit"):
            model, tokenizer = load_exported(tmp_path / run)
            torch.testing.assert_close(model(token_ids()).logits, expected, atol=1e-5, rtol=1e-5)
            assert tokenizer.get_vocab() == tokenizer_of().get_vocab()


def test_models_that_cannot_be_opened_are_one_line_of_either_verb(cli, arguments, corpus, tmp_path):
    folders = {}
    for name in ("pickled", "quantised", "other"):
        folders[name] = save_model(tmp_path / name)
    (folders["pickled"] / "model.safetensors").rename(folders["pickled"] / "pytorch_model.bin")
    config = json.loads((folders["quantised"] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folders["quantised"] / "config.json").write_text(json.dumps(config))
    folders["adapter"] = save_lora(save_model(tmp_path / "deep", n_layer=3), tmp_path / "adapter")
    save_model(tmp_path / "deep", n_layer=2)
    words = {"pickled": "pickles are not opened", "quantised": "quantised weights", "adapter": "is of another base"}
    folders["nowhere"], words["nowhere"] = tmp_path / "nowhere", "no such folder"
    for name, expected in words.items():
        refused(cli("fit", *arguments, "--model.pretrained", folders[name]), expected)
        data = ["--data.path", f"{corpus}/*.txt", "--out", tmp_path / "out"]
        refused(cli("retrofit", "--model", folders[name], *data), expected)
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(cli, arguments, tmp_path):
    base = save_model(tmp_path / "base", vocab_size=200)
    refused(
        cli("fit", *arguments, "--model.pretrained", base), f"the tokenizer of {base} has 257 tokens, its model 200"
    )
