"""The code in a shared model folder: it is this package's own, and it loads and computes without this package."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import child_environment
from support.runs import BACKBONES

import prism_lightning.models.language_model
from prism_lightning.models.portable import auto_map, portable_files
from prism_lightning.models.steering import Scaling
from prism_lightning.run.model_folder import load_exported, save_exported, save_shareable

ELSEWHERE = """import json, sys, torch
sys.modules["prism_lightning"] = None  # importing it raises ModuleNotFoundError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
out = {}
ids = torch.tensor(json.loads(sys.argv[2]))
for number, folder in enumerate(sys.argv[3:]):  # several in one process
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        out[f"{number}.logits"] = model(ids).logits
        out[f"{number}.generated"] = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
        z = model.hidden_states(ids)
        out[f"{number}.hidden"] = z
        if model.prototypes is not None:
            mixture, _ = model.prototypes(z.flatten(0, 1))
            out[f"{number}.indices"] = mixture.indices_Nk
            out[f"{number}.mixture"] = mixture.mixture_ND
    assert tokenizer("import os")["input_ids"]
loaded = [name for name, module in sys.modules.items() if name.startswith("prism_lightning") and module is not None]
assert not loaded, loaded
save_file({name: tensor.contiguous() for name, tensor in out.items()}, sys.argv[1])
"""
MODELS = {
    "gpt2, tied, an intervention": ("gpt2", True, [Scaling({3: 0.0, 5: 2.0}), Scaling({1: -1.0}, (7, 9))]),
    "gpt2, untied": ("gpt2", False, []),
    "llama, tied": ("llama", True, []),
    "llama, untied, an intervention": ("llama", False, [Scaling({0: 0.5, 1: 0.0, 2: 3.0})]),
    "dense": ("gpt2", True, None),
}


@pytest.fixture
def build(make_model):
    """Return a model in eval mode, by its name in MODELS."""

    def made(name):
        family, tied, scalings = MODELS[name]
        sizes = {} if scalings is None else {"num_prototypes": 8, "active_prototypes": 3}
        model = make_model(BACKBONES[family] | {"tie_word_embeddings": tied}, **sizes).eval()
        if scalings:
            model.intervene(*scalings)
        return model

    return made


def run_elsewhere(tmp_path, *arguments):
    """Run the program without this package, with a cache of its own; returns the finished process."""
    environment = child_environment(HF_HOME=str(tmp_path / "hf_home"), HF_HUB_OFFLINE="1") | {"PYTHONPATH": ""}
    command = [sys.executable, "-c", ELSEWHERE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)


def test_folders_load_without_this_package_and_compute_the_same(build, byte_tokenizer, tmp_path):
    folders = {name: tmp_path / f"model {number}" for number, name in enumerate(MODELS)}
    for name, folder in folders.items():
        save_shareable(build(name), byte_tokenizer, folder, "card")
    ids = torch.randint(250, (2, 12), generator=torch.Generator().manual_seed(1))
    result = run_elsewhere(tmp_path, tmp_path / "out.safetensors", json.dumps(ids.tolist()), *folders.values())
    assert result.returncode == 0, result.stderr
    out = load_file(tmp_path / "out.safetensors")
    for number, name in enumerate(MODELS):
        model = build(name)
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = byte_tokenizer.eos_token_id
        with torch.no_grad():
            torch.testing.assert_close(out[f"{number}.logits"], model(ids).logits, atol=1e-6, rtol=0)
            z_BTD = model.hidden_states(ids)
            generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
            assert torch.equal(out[f"{number}.generated"], generated)
            torch.testing.assert_close(out[f"{number}.hidden"], z_BTD, atol=1e-6, rtol=0)
            if model.prototypes is not None:
                mixture, _ = model.prototypes(z_BTD.flatten(0, 1))
                assert torch.equal(out[f"{number}.indices"], mixture.indices_Nk)
                torch.testing.assert_close(out[f"{number}.mixture"], mixture.mixture_ND, atol=1e-6, rtol=0)


def test_an_intervention_reaches_the_logits(build):
    """Otherwise the comparison above would hold without it."""
    for name in (name for name in MODELS if "intervention" in name):
        model = build(name)
        ids = torch.randint(250, (2, 12), generator=torch.Generator().manual_seed(1))
        scaled = model(ids).logits
        model.intervene()
        assert (scaled - model(ids).logits).abs().max() > 1e-4, name


def test_the_code_is_this_packages_own_but_for_imports():
    files = portable_files()
    assert set(auto_map()) == {"AutoConfig", "AutoModelForCausalLM"}
    name, class_name = auto_map()["AutoModelForCausalLM"].split(".")
    original = ast.parse(Path(prism_lightning.models.language_model.__file__).read_text())
    copy = ast.parse(files[f"{name}.py"])
    assert class_name in {node.name for node in copy.body if isinstance(node, ast.ClassDef)}
    for tree in (original, copy):
        tree.body = [node for node in tree.body if not isinstance(node, ast.ImportFrom)]
    assert ast.dump(original) == ast.dump(copy)
    for name, source in files.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in files, name
            elif isinstance(node, ast.Import | ast.ImportFrom):
                imported = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                known = sys.stdlib_module_names | {"torch", "transformers"}
                assert {module.split(".")[0] for module in imported} <= known, (name, imported)


def test_a_copy_by_this_package_names_no_code(build, byte_tokenizer, tmp_path):
    save_shareable(build("llama, tied"), byte_tokenizer, tmp_path / "shared", "card")
    assert "auto_map" in json.loads((tmp_path / "shared" / "config.json").read_text())
    model, tokenizer = load_exported(tmp_path / "shared")
    save_exported(model, tokenizer, tmp_path / "copy")
    assert "auto_map" not in json.loads((tmp_path / "copy" / "config.json").read_text())
    load_exported(tmp_path / "copy")


def test_this_package_executes_nothing_from_a_folder(build, byte_tokenizer, tmp_path):
    """Neither the folder's model code nor what transformers would look for."""
    save_shareable(build("dense"), byte_tokenizer, tmp_path / "model", "card")
    (tmp_path / "model" / "checksums.json").unlink()
    trap = f"open({str(tmp_path / 'executed')!r}, 'w').close()\nraise SystemExit(7)\n"
    for path in [*(tmp_path / "model").glob("*.py"), tmp_path / "model" / "custom_generate" / "generate.py"]:
        path.parent.mkdir(exist_ok=True)
        path.write_text(trap)
    model, _ = load_exported(tmp_path / "model")
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False)
    assert type(model).__module__ == "prism_lightning.models.language_model"
    assert not (tmp_path / "executed").exists()
