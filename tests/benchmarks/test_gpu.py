"""The GPU benchmark at tiny sizes on the CPU: every stage runs, and the file says where its numbers came from."""

import json

import pytest
import torch

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.stages import FULL, GPUS, SMOKE, TRAINED, RandomStore, Trainee, configuration, measure_training
from prism_lightning.models.flops import flops_per_token


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "results.json"
    main(["--smoke", "--out", str(path)])
    return json.loads(path.read_text())


def test_every_stage_is_measured(results, capsys):
    stages = results["results"]["stages"]
    kinds = ("index", "queries", "generation")
    assert list(stages) == [f"training {n}" for n in TRAINED] + [f"{k} {d}" for d in ("fp32", "bf16") for k in kinds]
    assert {"commit", "packages"} <= results["environment"].keys() and results["results"]["seed"] == 0
    assert sum(stage["stage_seconds"] for stage in stages.values()) <= results["results"]["seconds"]
    for name in TRAINED:
        stage = stages[f"training {name}"]
        assert stage["pairs"] == SMOKE.pairs and 0 < stage["dense"]["low"] <= stage["dense"]["high"]
        assert stage["dense_mfu"] is None  # the CPU is not in the table of peaks
    for dtype in ("fp32", "bf16"):
        assert stages[f"index {dtype}"]["build_tokens_per_second"]["low"] > 0
        queries = stages[f"queries {dtype}"]
        assert (
            queries["tokens"] == SMOKE.index_tokens
            and queries["sequence"]["entries_p50"] > queries["token"]["entries_p50"]
        )
        assert list(stages[f"generation {dtype}"]) == [*map(str, SMOKE.batches), "stage_seconds"]


def test_the_models_are_those_of_the_recipes():
    sizes = {}
    for name, recipe in TRAINED.items():
        config, data = configuration(recipe, [])
        sizes[name] = (config.get_text_config().n_layer, config.hidden_size, config.num_prototypes, data["block_size"])
        assert data["batch_size"] % (data["micro_batch_size"] * GPUS) == 0
    assert sizes == {"130M": (12, 768, 8192, 1024), "1.6B": (48, 1600, 16384, 1024)}
    assert FULL.overrides == []


def test_utilisation_is_the_rate_times_flops_over_the_peak(monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.stages.peak_flops", lambda name: 1e9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "it")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    on_cpu = lambda config, tokens, _, accumulation: Trainee(config, tokens, "cpu", accumulation)  # noqa: E731
    monkeypatch.setattr("benchmarks.gpu.stages.Trainee", on_cpu)
    result = measure_training(TRAINED["130M"], SMOKE, "cuda")
    config, _ = configuration(TRAINED["130M"], SMOKE.overrides)
    matrices = 12 * 32 * 32 + 300 * 32 + 2 * 2 * 32 + 3 * 32 + 32 + 4 * 32 + 32 + 2 * 32  # of one layer, head, norms
    assert result["flops_per_token"] == flops_per_token(matrices, config.get_text_config(), 32)
    assert result["prism_mfu"]["median"] == pytest.approx(result["prism"]["median"] * result["flops_per_token"] / 1e9)


def test_both_twins_are_one_decoder():
    """A step without the prototypes leaves their weights unchanged."""
    config, _ = configuration(TRAINED["130M"], SMOKE.overrides)
    trainee = Trainee(config, (2, 32), "cpu", 2)
    layer = trainee.model.prototypes
    before, head = layer.weight.clone(), trainee.model.lm_head.weight.clone()
    trainee.model.prototypes = None
    trainee.step()
    assert layer.weight.equal(before) and not trainee.model.lm_head.weight.equal(head)
    trainee.model.prototypes = layer
    trainee.step()
    assert not layer.weight.equal(before)


def test_micro_batches_are_averaged(monkeypatch):
    """Two micro-batches of the same tokens have the same gradient as one."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    config, _ = configuration(TRAINED["130M"], SMOKE.overrides)
    gradients = []
    for accumulation in (1, 2):
        trainee = Trainee(config, (2, 32), "cpu", accumulation)
        monkeypatch.setattr(trainee.optimizer, "zero_grad", lambda: None)
        trainee.step()
        gradients.append([parameter.grad for parameter in trainee.model.parameters()])
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(once, twice)


def test_tokens_are_used_unevenly(tmp_path):
    store = RandomStore(10_000, 32, 300, tmp_path)
    counts = torch.bincount(torch.from_numpy(store.tokens.astype("int64")), minlength=300)
    assert len(store) == 312 and int(store.tokens.max()) < 300
    assert counts[:30].sum() > 2 * counts[-150:].sum()
    assert store.tokenizer("7")["input_ids"] == [7] and len(store.tokenizer) == 300


def test_without_a_gpu_it_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and "give --smoke" in capsys.readouterr().err
