"""Wrong input, damaged files and a full disk: one line per problem, exit code 2, and nothing is lost."""

import pickle
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from support.processes import fit, run
from support.refusals import refused
from support.runs import in_run


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
    command = ("generate", "--ckpt_path", tmp_path / "model", "--prompt", "x")
    refused(cli(*command), f"{weights} has ", "checksums.json")
    (tmp_path / "model" / "checksums.json").unlink()  # as folders of older versions are
    refused(cli(*command), "cannot be loaded")
    weights.unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    Path("/tmp/prism_trap_sprung").unlink(missing_ok=True)
    refused(cli(*command), "cannot be loaded")
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
