"""export: a folder with card and code for elsewhere; --native: one that plain transformers loads, with equal logits."""

import json
import subprocess
import sys

import pytest
import torch
from support.processes import child_environment
from support.refusals import refused

from prism_lightning.models.portable import portable_files
from prism_lightning.run.model_folder import load_exported

PLAIN = """import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
with torch.no_grad():
    logits = model(ids).logits[0, -1]
assert not any(name.startswith("prism_lightning") for name in sys.modules)
print(json.dumps([type(model).__name__, ids[0].tolist(), model.generation_config.eos_token_id, logits.tolist()]))
"""


def test_plain_transformers_loads_it_with_equal_logits(cli, finished_run, tmp_path):
    run, *_ = finished_run
    out = tmp_path / "native"
    shown = cli("export", "--ckpt_path", run, "--native", "--out", out, check=0).stdout
    assert f"wrote {out}: GPT2LMHeadModel, without prototypes" in shown
    environment = child_environment() | {"PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", PLAIN, out, "import os"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    name, ids, end_token, logits = json.loads(result.stdout)
    model, tokenizer = load_exported(run)
    assert (name, ids, end_token) == ("GPT2LMHeadModel", tokenizer("import os")["input_ids"], tokenizer.eos_token_id)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1]
    assert logits == pytest.approx(expected.tolist(), abs=1e-5)


def test_an_existing_folder_is_kept(cli, finished_run, tmp_path):
    result = cli("export", "--ckpt_path", finished_run[0], "--native", "--out", tmp_path)
    assert result.returncode == 2 and "give a folder that does not exist" in result.stderr


def test_a_folder_for_elsewhere_has_code_card_and_checksums_of_all(cli, finished_run, tmp_path):
    run, *_ = finished_run
    assert not list((run / "model").glob("*.py")) and not (run / "model" / "README.md").exists()
    out = tmp_path / "exported"
    assert f"wrote {out}: 0 prototypes scaled" in cli("export", "--ckpt_path", run, "--out", out, check=0).stdout
    names = {path.name for path in out.iterdir()}
    assert set(portable_files()) < names
    assert set(json.loads((out / "checksums.json").read_text())) == names - {"checksums.json"}
    results = json.loads((run / "results.jsonl").read_text().splitlines()[-1])
    card = (out / "README.md").read_text()
    for name in ("loss", "prediction_recovered", "top1_agreement", "unexplained_centred_variance"):
        assert f"| {name.replace('_', ' ')} | {results[name]:.4g} |" in card
    assert str(run.parent) not in card
    model, tokenizer = load_exported(run)
    again, _ = load_exported(out)
    ids = tokenizer("import os", return_tensors="pt")["input_ids"]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_changed_file_of_code_is_named(cli, finished_run, tmp_path):
    """It is never executed here, but would be elsewhere."""
    out = tmp_path / "exported"
    cli("export", "--ckpt_path", finished_run[0], "--out", out, check=0)
    code = next(out.glob("prism_*.py"))
    code.write_text(code.read_text() + "\nimport os\n")
    refused(cli("explain", "--ckpt_path", out, "--text", "x"), f"{code.name} has ", "export it again")
