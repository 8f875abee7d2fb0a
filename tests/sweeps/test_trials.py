"""Sweep files: their trials, the cost of trials, and messages about mistakes."""

import shlex

import pytest
import torch
from support.runs import ROOT

from prism_lightning.common.counts import format_count
from prism_lightning.common.errors import UserError
from prism_lightning.config.compose import compose, split_arguments
from prism_lightning.sweeps.planning import (
    device_speed,
    module_without_weights,
    training_flops_per_token,
    trial_cost,
)
from prism_lightning.sweeps.sweep_file import load_sweep
from prism_lightning.sweeps.trial_status import TrialStatus, record_path, trial_status
from prism_lightning.sweeps.trials import load_trials, shell_command

SWEEPS = sorted((ROOT / "recipes/sweeps").glob("*.yaml"))
SMALL = """
dir: runs/small
recipe: {recipe}
variant: [dense, prism]
size: {{thin: {{model.backbone.n_embd: 16, model.backbone.n_head: 2}}, wide: {{model.backbone.n_embd: 64}}}}
tokens: [1e4, 2e4]
seed: [0, 1]
settings: {{data.vocab_size: 512}}
suites: [suite.yaml]
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.format(recipe=f"{ROOT}/recipes/sweeps/ladder_cpu/{{variant}}.yaml"))
    return path


def test_a_trial_is_a_fit_command(small):
    trials = load_trials(small, ["data.path=x.txt"])
    assert len(trials) == 16
    trial = next(t for t in trials if t.name == "wide_prism_20k_seed1")
    fit, evaluate = trial.commands(["--limit", "3"])
    words = shlex.split(shell_command(fit))
    assert words[:5] == ["python", "-m", "prism_lightning", "fit", "--config"]
    config = compose(*split_arguments(words[4:]))
    assert config == trial.config
    assert config["model"]["init_args"]["backbone"]["n_embd"] == 64 and config["data"]["vocab_size"] == 512
    assert config["data"]["path"] == "x.txt" and config["seed_everything"] == config["data"]["seed"] == 1
    assert config["trainer"]["max_steps"] * 16 * 128 == trial.tokens
    assert evaluate[:4] == ["evaluate", "--ckpt_path", "runs/small/wide_prism_20k_seed1", "--suite"]
    assert evaluate[-2:] == ["--limit", "3"]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_sweep_of_the_repository_composes(path):
    trials = load_trials(path, [])
    assert len({trial.name for trial in trials}) == len(trials)
    assert {trial.variant for trial in trials} == {"dense", "prism"}
    for trial in trials:
        assert trial.seed or trial_cost(trial, 1e12).hours > 0
        assert all(suite.is_file() for suite in trial.suites)


def test_flops_are_those_that_torch_counts(small):
    """Compare the forward FLOPs that torch counts with a third of the formula's."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    trial = next(t for t in load_trials(small, []) if t.name == "wide_dense_20k_seed0")
    module = module_without_weights(trial.config, "x").to_empty(device="cpu")
    ids_BT = torch.zeros(1, 128, dtype=torch.long)
    # Torch does not count the fused attention of a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module.model(ids_BT, use_cache=False)
    assert counter.get_total_flops() / 128 == pytest.approx(training_flops_per_token(module, 128) / 3, rel=0.02)


def test_hours_are_flops_over_the_devices_speed(small):
    trial = load_trials(small, [])[0]
    cost = trial_cost(trial, device_speed("cpu-2-cores"))
    assert cost.hours * 3600 * device_speed("cpu-2-cores") == pytest.approx(cost.flops)
    assert device_speed("8xH100") == 8 * device_speed("h100")
    with pytest.raises(UserError, match="did you mean H100"):
        device_speed("H101")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("variant:", "varient:"), "varient is neither an axis nor a setting of a sweep: did you mean variant"),
        (("seed: [0, 1]", "seed: [zero]"), "seed"),
        (("seed: [0, 1]", "seed: [1, 1]"), "would run twice"),
        (("{variant}.yaml", "{variant}s.yaml"), "denses.yaml not found: did you mean dense.yaml"),
        (("seed: [0, 1]", "seed: []"), "seed has no values"),
        (("dir: runs/small", "dir: [runs"), "small.yaml"),
        (("{variant}.yaml", "{sed}.yaml"), "may contain only {variant} and {size}"),
        (("data.vocab_size: 512", "run.dir: elsewhere"), "run.dir is decided by dir"),
        (("data.vocab_size: 512", "trainer.max_steps: 5"), "trainer.max_steps is decided by tokens"),
    ],
)
def test_mistakes_in_the_file_are_named(small, change, message):
    small.write_text(small.read_text().replace(*change))
    with pytest.raises(UserError, match=message):
        load_trials(small, [])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="did you mean"):
        load_sweep(ROOT / "recipes/sweeps/laddr.yaml")


def test_values_reach_the_recipe_unchanged(small):
    for value in ("Once: a", "123", "a, b"):
        text = small.read_text().replace("data.vocab_size: 512", f"run.sample_prompt: {value!r}")
        small.with_name("with_value.yaml").write_text(text)
        trial = load_trials(small.with_name("with_value.yaml"), [])[0]
        assert trial.config["run"]["sample_prompt"] == value


def test_counts_have_three_digits_and_a_unit():
    assert [format_count(n) for n in (950, 4e5, 1_350_400, 1.56e9)] == ["950", "400k", "1.35M", "1.56B"]


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "3",
        "[" * 100_000,
        '{"state": ["finished"]}',
        '{"state": "finished", "seconds": "long"}',
        '{"state": "finished", "seconds": NaN}',
        '{"state": "failed", "error": {}}',
    ],
)
def test_a_damaged_record_is_a_trial_to_run(tmp_path, content):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"{{dir: {tmp_path}/runs, recipe: {ROOT}/tests/tiny.yaml, variant: [prism]}}")
    (trial,) = load_trials(path, [])
    record = record_path(trial)
    record.parent.mkdir(parents=True)
    record.write_text(content)
    assert trial_status(trial) == TrialStatus("waiting", "")
    trial.run.mkdir()
    (trial.run / "results.jsonl").write_text('{"step": "12"}\n')
    assert trial_status(trial) == TrialStatus("waiting", "next step: fit")
