"""export --native: a folder that plain transformers loads, with equal logits."""

import json
import subprocess
import sys

import pytest
import torch
from support.processes import child_environment

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
