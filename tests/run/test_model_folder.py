"""Exported models and checkpoints: every damage is named in one line, and nothing damaged is used."""

import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from prism_lightning.common.errors import UserError
from prism_lightning.common.files import CHECKSUMS, write_checksums
from prism_lightning.run.checkpoints import load_checkpoint, load_model_weights
from prism_lightning.run.model_folder import load_exported, save_exported
from prism_lightning.training.checkpoint_io import AtomicCheckpointIO


@pytest.fixture
def exported(make_model, byte_tokenizer, tmp_path):
    """A small PRISM model with a byte-level tokenizer, in RUN/model."""
    save_exported(make_model(num_prototypes=8), byte_tokenizer, tmp_path / "run" / "model")
    return tmp_path / "run" / "model"


def flipped(content, bit):
    """Content with one bit turned."""
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << (bit % 8)
    return bytes(damaged)


def test_a_flipped_bit_in_any_file_is_named(exported):
    """Three places of each file, as a disk or a copy would damage it."""
    places = random.Random(0)
    files = [path for path in exported.iterdir() if path.name != CHECKSUMS]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        for _ in range(3):
            path.write_bytes(flipped(content, places.randrange(8 * len(content))))
            with pytest.raises(UserError, match=rf"{path.name} does not match its checksum: remove"):
                load_exported(exported)
        path.write_bytes(content)
    load_exported(exported)


def test_missing_and_truncated_files_and_a_damaged_list_of_checksums_are_named(exported):
    weights = exported / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"model.safetensors has \d+ of \d+ bytes"):
        load_exported(exported)
    weights.unlink()
    with pytest.raises(UserError, match="model.safetensors is missing"):
        load_exported(exported)
    weights.write_bytes(content)
    for broken in (b"", b"{", b"[1, 2]", b'{"model.safetensors": 3}'):
        (exported / CHECKSUMS).write_bytes(broken)
        with pytest.raises(UserError, match=f"{CHECKSUMS} is damaged"):
            load_exported(exported)


def test_the_advice_for_a_change_made_on_purpose_works(exported):
    (exported / "config.json").write_text((exported / "config.json").read_text() + "\n")
    with pytest.raises(UserError, match=f"remove {exported / CHECKSUMS}"):
        load_exported(exported)
    (exported / CHECKSUMS).unlink()
    load_exported(exported)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(exported, cli, value):
    tensors = load_file(exported / "model.safetensors")
    tensors["prototypes.weight"][3, 2] = value
    save_file(tensors, exported / "model.safetensors", metadata={"format": "pt"})
    write_checksums(exported)
    for command in (["explain", "--text", "import os"], ["generate", "--prompt", "x"]):
        result = cli(command[0], "--ckpt_path", exported, *command[1:])
        assert result.returncode == 2 and "prototypes.weight holds values that are not finite" in result.stderr


def test_a_kill_while_exporting_leaves_the_old_model_or_none(exported, monkeypatch):
    """Killed before the last rename: what is left is never a half-written folder under the model's name."""
    model, tokenizer = load_exported(exported)
    monkeypatch.setattr("prism_lightning.run.model_folder.write_checksums", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_exported(model, tokenizer, exported)
    load_exported(exported)
    monkeypatch.undo()
    save_exported(model, tokenizer, exported)
    assert sorted(path.name for path in exported.parent.iterdir()) == ["model"]


# Checkpoints


@pytest.fixture
def checkpoint(make_model, tmp_path):
    """A checkpoint of a small model, with its optimiser's state."""
    model = make_model(num_prototypes=8)
    optimizer = torch.optim.AdamW(model.parameters())
    model.objective(torch.ones(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)).loss.backward()
    optimizer.step()
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    content = {"state_dict": weights, "optimizer_states": [optimizer.state_dict()], "global_step": 1}
    path = tmp_path / "step-00000001.ckpt"
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


def equal(one, other):
    """Whether two checkpoints hold the same values."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return all(map(equal, one, other)) if isinstance(one, list | tuple) else one == other


def test_flipped_bits_of_a_checkpoint_are_named_or_harmless(checkpoint):
    """Bits of padding change nothing; all others are found."""
    content, whole = checkpoint.read_bytes(), load_checkpoint(checkpoint)
    places, named = random.Random(0), 0
    for _ in range(40):
        checkpoint.write_bytes(flipped(content, places.randrange(8 * len(content))))
        try:
            assert equal(load_checkpoint(checkpoint), whole)
        except UserError as error:
            named += 1
            assert str(checkpoint) in str(error) and "\n" not in str(error)
    assert named >= 30


def test_a_checkpoint_with_nan_weights_is_refused(make_model, checkpoint):
    content = load_checkpoint(checkpoint)
    content["state_dict"]["model.lm_head.weight"][0, 0] = float("nan")
    with pytest.raises(UserError, match=r"weight holds values that are not finite"):
        load_model_weights(make_model(num_prototypes=8), content["state_dict"], checkpoint)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_resumes(cli, tiny, tmp_path):
    more = ["--trainer.logger", "false", "--run.sample_prompt", "null"]
    cli("fit", *tiny, *more, check=0)
    run = tmp_path / "run"
    newest, before = run / "checkpoints" / "step-00000012.ckpt", run / "checkpoints" / "step-00000008.ckpt"
    shutil.rmtree(run / "model")
    newest.write_bytes(flipped(newest.read_bytes(), 8 * 5000))
    result = cli("fit", *tiny, *more)
    assert result.returncode == 2 and f"checkpoint {newest} is damaged" in result.stderr and before.is_file()
    newest.unlink()
    assert f"resuming from {before}" in cli("fit", *tiny, *more, check=0).stdout
