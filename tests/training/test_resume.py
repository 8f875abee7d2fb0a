"""Killing and resuming, and changing the number of processes, do not change the weights."""

import json
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from support.processes import fit, ranks, start
from support.runs import in_run

KILLS = 10
STEPS, INTERVAL = 120, 3


def weights(folder, step):
    state = torch.load(folder / "checkpoints" / f"step-{step:08d}.ckpt", weights_only=True)
    exported = load_file(folder / "model" / "model.safetensors")
    return exported | {f"checkpoint.{name}": value for name, value in state["state_dict"].items()}


def killed_fit(arguments, folder, moments):
    """Run fit and kill it at a random moment; returns what it printed.

    Three in four are killed a random while after one or two more checkpoints, the others at any time from the start
    on. No kill waits for a third checkpoint: ten of them cannot complete a run of forty, however fast the machine is.
    """
    child = start("fit", *arguments)
    before = newest_step(folder)
    if moments.random() < 0.25:
        wanted, deadline = before + 2 * INTERVAL, time.monotonic() + moments.uniform(0, 2)
    else:
        wanted, deadline = before + INTERVAL * moments.randint(1, 2), float("inf")
    while newest_step(folder) < wanted and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.002)
    if deadline == float("inf"):
        time.sleep(moments.uniform(0, 0.1))
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, child.stderr
    return child.stdout


def newest_step(folder):
    """Step of the newest checkpoint, 0 before the first."""
    return max((int(path.stem.partition("-")[2]) for path in folder.glob("checkpoints/step-*.ckpt")), default=0)


def test_ten_kills_at_random_moments_leave_the_weights_bit_equal(tiny, tmp_path):
    """Dropout, placement, revival, accumulation and polishing are all on in this recipe."""
    options = ["--trainer.max_steps", str(STEPS), "--run.checkpoint_interval", str(INTERVAL)]
    options += ["--trainer.val_check_interval", "30"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    fit(in_run(tiny, whole, *options))
    moments = random.Random(0)
    resumed = sum("resuming from" in killed_fit(in_run(tiny, killed, *options), killed, moments) for _ in range(KILLS))
    out = fit(in_run(tiny, killed, *options))
    assert "resuming from" in out and resumed >= KILLS // 2
    expected, resumed_weights = weights(whole, STEPS), weights(killed, STEPS)
    assert expected.keys() == resumed_weights.keys()
    different = [name for name in expected if not torch.equal(expected[name], resumed_weights[name])]
    assert different == []
    results = [json.loads((folder / "results.jsonl").read_text().splitlines()[-1]) for folder in (whole, killed)]
    assert results[0]["loss"] == results[1]["loss"]


def test_the_checkpoint_that_a_run_resumes_from_is_not_written_again(cli, tiny, tmp_path):
    """Steps take two micro-batches each: after the first of them the step's number is still the checkpoint's."""
    cli("fit", *tiny, "--trainer.max_steps", "4", check=0)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004.ckpt"
    before = checkpoint.read_bytes()
    cli("fit", *tiny, "--trainer.max_steps", "6", check=0)
    assert checkpoint.with_stem("step-00000006").is_file()
    assert checkpoint.read_bytes() == before


def blocks_of(folder):
    """Blocks of every optimiser step, over ranks and micro-batches."""
    steps = {}
    for path in sorted(folder.glob("blocks_rank*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            steps.setdefault(record["step"], []).extend(record["blocks"])
    return {step: sorted(blocks) for step, blocks in steps.items()}


@pytest.mark.parametrize("accumulate", [False, True], ids=["whole steps", "accumulated"])
def test_world_sizes_one_two_one_see_the_same_blocks(tiny, tmp_path, accumulate):
    """Of two ranks, Lightning starts the second itself; with accumulation both are started as torchrun does."""
    recorder = "{class_path: support.block_recorder.BlockRecorder}"
    options = ["--trainer.callbacks", recorder, "--allow_custom_code", "--trainer.logger", "false"]
    options += ["--data.micro_batch_size", "2" if accumulate else "8", "--model.polish_steps", "0"]
    options += ["--run.checkpoint_interval", "2", "--trainer.val_check_interval", "12", "--run.sample_prompt", "null"]
    one, moving = tmp_path / "one", tmp_path / "moving"
    fit(in_run(tiny, one, *options), BLOCK_RECORDS=str(one))
    for world_size, steps in ((1, 4), (2, 10), (1, 12)):
        devices = ["--trainer.devices", str(world_size), "--trainer.strategy", "ddp" if world_size > 1 else "auto"]
        arguments = [*in_run(tiny, moving, *options), *devices, "--trainer.max_steps", str(steps)]
        if accumulate and world_size > 1:
            out = ranks(world_size, "fit", *arguments, BLOCK_RECORDS=str(moving))
        else:
            out = fit(arguments, BLOCK_RECORDS=str(moving))
        assert ("resuming from" in out) == (steps > 4)
    assert sorted(path.name for path in moving.glob("blocks_*")) == ["blocks_rank0.jsonl", "blocks_rank1.jsonl"]
    assert blocks_of(moving) == blocks_of(one)
    assert sorted(blocks_of(one)) == list(range(12)) and all(len(b) == 8 for b in blocks_of(one).values())
