"""Devices and strategies; DeepSpeed ZeRO 1 to 3 trains, saves, resumes and consolidates on CPU, with 1 and 2 ranks."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.processes import fit, ranks
from support.runs import tiny_arguments

from prism_lightning.common.errors import UserError
from prism_lightning.training.strategies import check_devices, device_count, settled_strategy

DEEPSPEED = {"class_path": "lightning.pytorch.strategies.DeepSpeedStrategy", "init_args": {"stage": 2}}


@pytest.mark.parametrize(("devices", "nodes", "count"), [(1, 1, 1), (8, 2, 16), ([0, 1], 1, 2), ("3", 1, 3)])
def test_devices_are_counted_over_nodes(devices, nodes, count):
    assert device_count({"devices": devices, "num_nodes": nodes}) == count


def test_deepspeed_gives_way_on_a_single_device_only():
    assert settled_strategy({"strategy": DEEPSPEED, "devices": 1}) == "auto"
    assert settled_strategy({"strategy": DEEPSPEED, "devices": 2}) == DEEPSPEED
    assert settled_strategy({"strategy": "ddp", "devices": 1}) == "ddp"


def test_missing_gpus_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="x.yaml needs CUDA GPUs"):
        check_devices("x.yaml", {"accelerator": "gpu"})
    check_devices("x.yaml", {"accelerator": "auto"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="asks for 4 GPUs .* has 2"):
        check_devices("x.yaml", {"accelerator": "cuda", "devices": 4})


# Without dropout, whose masks depend on the rank, and with a flat schedule, which does not depend on max_steps.
SETTINGS = [
    *(
        "--model.backbone.resid_pdrop",
        "0.0",
        "--model.backbone.embd_pdrop",
        "0.0",
        "--model.backbone.attn_pdrop",
        "0.0",
    ),
    *("--model.final_learning_rate_share", "1.0", "--model.polish_steps", "0", "--model.commitment", "0"),
    *("--model.prototype_to_token_weight", "0", "--run.sample_prompt", "null", "--data.micro_batch_size", "4"),
    *("--trainer.logger", "false"),
]


@pytest.fixture(scope="module")
def plain_weights(corpus, cache, tmp_path_factory):
    """The weights of the same run without DeepSpeed and without an interruption."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    fit([*tiny_arguments(folder, corpus, cache), *SETTINGS, "--trainer.max_steps", "8"])
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_train_resume_and_consolidate_to_the_plain_result(tiny, tmp_path, stage, world_size, plain_weights):
    """The exported folder after an interrupted ZeRO run equals that of a plain run, up to rounding."""
    strategy = ["--trainer.strategy.class_path", "support.deepspeed_cpu.CPUDeepSpeedStrategy", "--allow_custom_code"]
    strategy += ["--trainer.strategy.init_args.stage", str(stage), "--trainer.devices", str(world_size)]
    arguments = ["fit", *tiny, *SETTINGS, *strategy]
    ranks(world_size, *arguments, "--trainer.max_steps", "4", DS_ACCELERATOR="cpu")
    out = ranks(world_size, *arguments, "--trainer.max_steps", "8", DS_ACCELERATOR="cpu")
    assert "resuming from" in out
    assert json.loads(out.splitlines()[-1])["step"] == 8
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert weights.keys() == plain_weights.keys()
    for name, value in plain_weights.items():
        # The key biases' true gradient is zero, and Adam makes steps of its rounding noise.
        assert (weights[name] - value).abs().mean() < (1e-4 if "c_attn.bias" in name else 2e-5), name
