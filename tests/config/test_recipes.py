"""Every recipe parses, builds on the meta device with its stated count, and trains two CPU steps at reduced size."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.pretrained_models import save_model
from support.runs import ROOT
from transformers import AutoModelForCausalLM

from prism_lightning.common.errors import UserError
from prism_lightning.config.compose import compose, split_arguments
from prism_lightning.config.validate import problems_in
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.lightning_modules.prism import PrismLM
from prism_lightning.sweeps.planning import module_without_weights

FINE_TUNING = [ROOT / "recipes" / name for name in ("finetune.yaml", "finetune_lora.yaml")]  # of a model that is named
RECIPES = sorted({*(ROOT / "recipes").glob("*.yaml")} - {*FINE_TUNING})
LADDER = {"130m": (12, 768), "350m": (24, 1024), "760m": (36, 1280), "1b": (48, 1600)}
# Sizes that make any recipe small; its own values for everything else stay.
REDUCED = [
    *("model.init_args.backbone.n_layer=1", "model.init_args.backbone.n_embd=16", "model.init_args.backbone.n_head=2"),
    *("model.init_args.backbone.vocab_size=${data.vocab_size}", "data.vocab_size=300", "data.block_size=32"),
    *(
        "data.batch_size=4",
        "data.micro_batch_size=2",
        "data.tokenizer=null",
        "data.num_workers=0",
        "data.validation_fraction=0.2",
    ),
    *("data.validation_blocks=4", "data.max_tokens=null", "trainer.max_steps=2", "trainer.val_check_interval=2"),
    *("trainer.accelerator=cpu", "trainer.devices=1", "trainer.precision=32-true", "trainer.log_every_n_steps=1"),
    "trainer.logger=false",
]
REDUCED_PROTOTYPES = [
    *("model.init_args.num_prototypes=32", "model.init_args.placement_step=1", "model.init_args.revival_interval=0"),
    *("model.init_args.polish_steps=2", "model.init_args.polish_tokens=512"),
]


def module_class(config):
    return {"DenseLM": DenseLM, "PrismLM": PrismLM}[config["model"]["class_path"]]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_parses_and_builds_with_its_stated_count(path):
    config = compose(path, [])
    assert problems_in(config) == []
    with torch.device("meta"):
        module = module_class(config)(**config["model"]["init_args"])
    stated = int(re.search(r"# parameters: ([\d,]+)", path.read_text())[1].replace(",", ""))
    assert sum(p.numel() for p in module.parameters()) == stated


def every_parameter_learned(folder):
    """The optimiser has taken two steps on all of the model, and each saw a gradient."""
    checkpoint = torch.load(folder / "checkpoints" / "step-00000002.ckpt", weights_only=True)
    (optimizer,) = checkpoint["optimizer_states"]
    states = optimizer["state"].values()
    assert len(states) == len(load_file(folder / "model" / "model.safetensors"))
    assert all(state["step"] == 2 and state["exp_avg"].any() for state in states)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_trains_two_steps_at_reduced_size(path, tmp_path, cli, corpus, cache):
    prism = compose(path, [])["model"]["class_path"] == "PrismLM"
    settings = REDUCED + (REDUCED_PROTOTYPES if prism else [])
    settings += [
        f"run.dir={tmp_path}/run",
        f"data.path={corpus}/*.txt",
        "data.validation_path=null",
        f"data.cache_dir={cache}",
    ]
    arguments = [part for setting in settings for part in (f"--{setting.partition('=')[0]}", setting.partition("=")[2])]
    result = cli("fit", "--config", path, *arguments, check=0)
    results = json.loads(result.stdout.splitlines()[-1])
    assert results["step"] == 2 and results["recipe"] == str(path)
    # Untrained, a model of 300 tokens has log 300 = 5.7 nats a token.
    assert 4 < results["loss"] < 6.5 and ("unexplained_variance" in results) == prism
    every_parameter_learned(tmp_path / "run")


@pytest.mark.parametrize("path", FINE_TUNING, ids=lambda p: p.stem)
def test_a_recipe_for_fine_tuning_trains_two_steps_of_a_tiny_model(path, tmp_path, cli, corpus, cache):
    model = save_model(tmp_path / "model", "llama")
    assert any("model.init_args.pretrained" in problem for problem in problems_in(compose(path, [])))
    config = compose(path, [f"model.pretrained={model}"])
    assert problems_in(config) == []
    module = module_without_weights(config, path.stem)
    prototypes, lora = 4096 * 32, path.stem == "finetune_lora"
    adapters = 2 * 2 * 8 * (32 + 32) if lora else 0  # rank 8 in two layers' queries and values
    assert sum(p.numel() for p in module.parameters()) == AutoModelForCausalLM.from_pretrained(
        model
    ).num_parameters() + (prototypes + adapters)

    arguments = {"config": path, "model.pretrained": model, "run.dir": tmp_path / "run", "data.path": f"{corpus}/*.txt"}
    arguments |= {"data.cache_dir": cache, "data.max_tokens": 20000}
    reduced = REDUCED[5:] + REDUCED_PROTOTYPES
    kept = [setting for setting in reduced if not setting.startswith(("data.max_tokens", "data.vocab_size"))]
    arguments |= dict(setting.split("=", 1) for setting in [*kept, "data.block_size=32"])
    result = cli("fit", *(part for key, value in arguments.items() for part in (f"--{key}", value)), check=0)
    assert ("of them trained" in result.stdout) == lora and (tmp_path / "run" / "adapter").is_dir() == lora
    assert json.loads(result.stdout.splitlines()[-1])["step"] == 2


@pytest.mark.parametrize(("size", "shape"), LADDER.items())
def test_ladder_twins_share_everything_but_prototypes(size, shape):
    dense, prism = (compose(ROOT / "recipes" / f"{kind}_{size}.yaml", []) for kind in ("dense", "prism"))
    backbone = prism["model"]["init_args"]["backbone"]
    assert (backbone["n_layer"], backbone["n_embd"]) == shape
    assert dense["model"]["init_args"]["backbone"] == backbone and dense["data"] == prism["data"]
    assert dense["trainer"] == prism["trainer"]
    assert prism["trainer"]["strategy"]["class_path"].endswith("DeepSpeedStrategy")
    tokens = dense["trainer"]["max_steps"] * dense["data"]["batch_size"] * dense["data"]["block_size"]
    assert tokens == pytest.approx(dense["data"]["max_tokens"], rel=1e-4) and tokens <= 50.01e9


def write(folder, name, **content):
    (folder / name).write_text(yaml.safe_dump(content))
    return folder / name


def test_bases_are_merged_beneath_and_interpolation_follows_overrides(tmp_path):
    write(tmp_path, "a.yaml", data={"block_size": 8, "seed": 1}, model={"x": "${data.block_size}"})
    write(tmp_path, "b.yaml", data={"seed": 2})
    top = write(tmp_path, "top.yaml", base=["a.yaml", "b.yaml"], trainer={"max_steps": 5})
    assert compose(top, ["data.block_size=16"]) == {
        "data": {"block_size": 16, "seed": 2},
        "model": {"x": 16},
        "trainer": {"max_steps": 5},
    }


def test_model_settings_may_be_shortened_on_the_command_line(tmp_path):
    top = write(tmp_path, "top.yaml", model={"class_path": "DenseLM", "init_args": {"learning_rate": 1.0}})
    assert compose(top, ["model.learning_rate=3e-4"])["model"]["init_args"] == {"learning_rate": 3e-4}


def test_values_are_yaml(tmp_path):
    top = write(tmp_path, "top.yaml", a=1)
    config = compose(top, ["a=null", "b=[1, 2]", "c=true", "d=sqlite:///x y.db", "e=1e-3", "f=a=b"])
    assert config == {"a": None, "b": [1, 2], "c": True, "d": "sqlite:///x y.db", "e": 1e-3, "f": "a=b"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("base: nowhere.yaml", "not found"),
        ("base: top.yaml", "its own base"),
        ("a: [1,", "not valid YAML"),
        ("- a", "mapping"),
        ("a: ${b.c}", "b.c"),
    ],
)
def test_broken_recipes_are_one_line(tmp_path, content, words):
    (tmp_path / "top.yaml").write_text(content)
    with pytest.raises(UserError) as error:
        compose(tmp_path / "top.yaml", [])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_command_lines_split_into_recipe_and_overrides():
    assert split_arguments(["--config", "a.yaml", "--x.y", "1", "--z=2"]) == (Path("a.yaml"), ["x.y=1", "z=2"])


@pytest.mark.parametrize(
    "arguments", [[], ["x"], ["--config"], ["--config", "a", "--config", "b"], ["--config", "a", "--b"]]
)
def test_incomplete_command_lines_are_refused(arguments):
    with pytest.raises(UserError):
        split_arguments(arguments)


def test_retired_settings_are_left_out_at_their_only_value_and_refused_at_another(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("index: {rank: null, activation_path: false, objective: cross_entropy, curvature: separable}\n")
    assert compose(path, [])["index"] == {"rank": None}
    assert compose(path, ["index.objective=${oc.env:UNSET_HERE,cross_entropy}"])["index"] == {"rank": None}
    for setting in ("activation_path=true", "objective=training", "curvature=eigenvalues"):
        with pytest.raises(UserError) as caught:
            compose(path, [f"index.{setting}"])
        (problem,) = caught.value.problems
        assert f"index.{setting.partition('=')[0]} is a retired setting" in problem
