"""`attribute`, `prototypes` and `index` on the command line: right and wrong input, and what is printed."""

import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support.processes import child_environment, fit, start
from support.runs import ROOT, in_run

from prism_lightning.attribution.attributor import Attributor
from prism_lightning.cli.main import main
from prism_lightning.run.fingerprints import model_fingerprint
from prism_lightning.run.model_folder import load_exported


def refused(result, *words):
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stdout + result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "python -m"))]
    for word in words:
        assert any(word in line for line in errors), (word, errors)


def test_attribute_prints_tables(cli, run):
    out = cli("attribute", "--ckpt_path", run[0], "--text", "import os", "--top", "2", check=0).stdout
    for word in ("tokens", "passages", "documents", "influence", ".txt", "positive = training on it"):
        assert word in out


def test_attribute_prints_json(cli, run):
    out = cli(
        "attribute", "--ckpt_path", run[0], "--prompt", "import", "--max_new_tokens", "2", "--json", check=0
    ).stdout
    found = json.loads(out)
    assert [a["kind"] for a in found] == ["token", "token", "sequence"]
    assert {"position", "influence", "prototypes", "source", "before", "token", "after", "token_bytes"} == set(
        found[0]["tokens"][0]
    )


def test_many_queries_are_answered_in_order_and_one_bad_one_spoils_nothing(cli, run, tmp_path):
    queries = tmp_path / "queries.jsonl"
    asked = [{"text": "import os"}, {"prompt": ""}, {"prompt": "import", "why": " os", "rather_than": " sys"}]
    queries.write_text("\n".join(json.dumps(query) for query in asked) + "\n\n")
    lines = cli("attribute", "--ckpt_path", run[0], "--queries", queries, check=0).stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    assert [answer["query"] for answer in answers] == asked
    assert "empty" in answers[1]["error"] and answers[2]["attributions"][0]["kind"] == "contrast"


def test_prototypes_shows_usage_and_neighbours(cli, run):
    cards = json.loads(cli("prototypes", "--ckpt_path", run[0], "--top", "3", "--json", check=0).stdout)
    assert [c["usage"] for c in cards] == sorted((c["usage"] for c in cards), reverse=True) and cards[0]["usage"] > 0
    groups = {group: [token["influence"] for token in tokens] for group, tokens in cards[0]["examples"].items()}
    assert all(len(found) == 3 and found == sorted(found, reverse=True) for found in groups.values())
    assert 1.001 >= groups["top"][0] >= groups["middle"][0] > 0 and groups["top"][2] >= max(groups["random"][1:])
    assert set(cards[0]["label"]) >= {"says", "after", "says_share_top", "says_share_random", "text"}
    shown = cli("prototypes", "--ckpt_path", run[0], "--top", "3", check=0).stdout
    assert all(word in shown for word in ("says", "promotes", "demotes", "middle", "random"))
    results = json.loads((run[0] / "results.jsonl").read_text().splitlines()[-1])
    figures = cards[0]["faithfulness"]
    assert figures and all(results[name] == value for name, value in figures.items())
    assert f"unexplained variance {results['unexplained_variance']:.3f}" in " ".join(shown.split())
    refused(cli("prototypes", "--ckpt_path", run[0], "--id", "64"), "its prototypes are 0 to 63")
    fitted = ("--index", run[0] / "index", "--id", "127")
    (card,) = json.loads(cli("prototypes", "--ckpt_path", run[0], *fitted, "--json", check=0).stdout)
    assert card["prototype"] == 127 and card["faithfulness"] == {}  # those of the model's own are of others
    refused(cli("prototypes", "--ckpt_path", run[0], "--top", "0"), "--top must be")


def test_an_unused_prototype_is_said_to_be_unused(capsys, run, monkeypatch):
    from prism_lightning.inspection.cards import inspect_prototypes
    from prism_lightning.inspection.tables import print_cards

    attributor = Attributor.open(run[0])
    for shard in attributor.index.shards:  # nobody uses the last one
        kept = int(np.searchsorted(shard.lists, 127 * attributor.index.vocabulary))
        monkeypatch.setattr(shard, "lists", shard.lists[:kept])
        monkeypatch.setattr(shard, "offsets", shard.offsets[: kept + 1])
    card = inspect_prototypes(attributor, [127], 3)[0]
    assert card.dead and card.usage == 0 and card.examples == {"top": [], "middle": [], "random": []}
    print_cards([card])
    assert "never active" in " ".join(capsys.readouterr().out.split())


def test_a_query_through_unused_prototypes_touches_nothing(capsys, run, monkeypatch):
    from prism_lightning.inspection.tables import print_attributions

    attributor = Attributor.open(run[0])
    for shard in attributor.index.shards:
        monkeypatch.setattr(shard, "offsets", np.zeros_like(shard.offsets))
    found = attributor.text("import os")
    assert found[0].touched == 0 and found[0].tokens == [] and found[0].documents == []
    print_attributions(found)
    assert "0 training tokens touched" in " ".join(capsys.readouterr().out.split())


def test_ranks_that_make_no_sense_are_refused(cli, run, monkeypatch):
    for rank, world_size in (("3", "2"), ("one", "2"), ("3", None)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if world_size:
            monkeypatch.setenv("WORLD_SIZE", world_size)
        refused(cli("index", *run[1]), "0 <= RANK < WORLD_SIZE")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", ""], "empty"),
        (["--prompt", ""], "the prompt is empty"),
        (["--text", "a", "--top", "0"], "--top must be"),
        (["--prompt", "import", "--max_new_tokens", "99"], "lower --max_new_tokens"),
        (["--prompt", "import", "--why", " os"], "a contrast needs"),
        (["--prompt", "import", "--why", " os", "--rather_than", " os"], "same token"),
        (["--queries", "nowhere.jsonl"], "not found"),
        (["--text", "a b", "--index", "nowhere"], "no finished index"),
        (["--text", "import os", "--rerank"], "--index.hidden_rank"),
    ],
)
def test_wrong_questions_are_refused_in_words(cli, run, arguments, words):
    refused(cli("attribute", "--ckpt_path", run[0], *arguments), words)


def test_wrong_queries_files_name_every_line(cli, run, tmp_path):
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"text": 3}\nnonsense\n{"txet": "a"}\n{"text": "fine"}\n')
    result = cli("attribute", "--ckpt_path", run[0], "--queries", queries)
    refused(result, "queries.jsonl:1", "queries.jsonl:2", "queries.jsonl:3 has ['txet']")
    queries.write_text("")
    refused(cli("attribute", "--ckpt_path", run[0], "--queries", queries), "is empty")


NOT_IMPORTED = [
    *("lightning", "datasets", "sklearn", "scipy", "pandas", "mlflow", "matplotlib", "deepspeed", "lm_eval"),
    *("torchmetrics", "jsonargparse", "omegaconf", "sympy", "torch._inductor", "torch._dynamo.convert_frame"),
    *("torch.distributed.tensor", "torch.distributed.fsdp"),
]
IMPORTS = """
import json, sys
from prism_lightning.cli.main import main
for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0
    found = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
    print(json.dumps(found), file=sys.stderr)
    assert not found, (arguments, found)
import torch
torch._dynamo.disable(len)
# Put off, not lost: its first use loads it, with what was marked before.
from transformers.integrations import deepgemm
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist(), file=sys.stderr)
assert "torch._dynamo.convert_frame" in sys.modules
"""


def test_short_verbs_import_nothing_heavy_that_they_do_not_use(run, cli):
    """What took most of their 5 s; the answers are those of a process that has imported everything."""
    folder = str(run[0])
    verbs = [
        ["explain", "--ckpt_path", folder, "--text", "import os", "--json"],
        ["generate", "--ckpt_path", folder, "--prompt", "import os", "--max_new_tokens", "8", "--json"],
        ["attribute", "--ckpt_path", folder, "--text", "import os", "--json"],
    ]
    arguments = [sys.executable, "-c", IMPORTS, json.dumps(verbs), json.dumps(NOT_IMPORTED)]
    quick = subprocess.run(arguments, capture_output=True, text=True, env=child_environment(), cwd=ROOT)
    assert quick.returncode == 0, quick.stderr
    assert quick.stderr.splitlines()[-1] == "[2.0, 2.0]"
    lines = [json.loads(line) for line in quick.stdout.splitlines()]
    for found, verb in zip(lines, verbs, strict=True):
        assert found == json.loads(cli(*verb, check=0).stdout)


def test_nothing_found_is_said_in_words(cli, run, monkeypatch):
    """With every prototype removed a query reads no list."""
    removal = {"format": 1, "model": model_fingerprint(load_exported(run[0])[0]), "tokens": None}
    removal["factors"] = {str(number): 0.0 for number in range(64)}
    (run[0] / "interventions").mkdir(exist_ok=True)
    (run[0] / "interventions" / "nothing.json").write_text(json.dumps(removal))
    own = run[0] / "prototypes"
    cli("prototypes", "--ckpt_path", run[0], check=0)
    asked = ["attribute", "--ckpt_path", run[0], "--text", "import os", "--index", own, "--intervention", "nothing"]
    out = cli(*asked, check=0).stdout
    assert "no training token was found" in out and "influence" not in out
    answers = json.loads(cli(*asked, "--json", check=0).stdout)
    assert {(a["touched"], len(a["tokens"]), len(a["documents"])) for a in answers} == {(0, 0, 0)}


def test_output_is_readable_in_ascii_and_80_columns(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(ROOT)
    found = {}
    for verb, arguments in {
        "explain": ["--text", "import os # 你"],
        "attribute": ["--text", "import os"],
        "generate": ["--prompt", "# é你", "--max_new_tokens", "4"],
        "prototypes": ["--top", "2"],
    }.items():
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
        monkeypatch.setattr(sys, "stdout", stream)
        assert main([verb, "--ckpt_path", str(run[0]), *arguments]) == 0
        stream.flush()
        found[verb] = stream.buffer.getvalue().decode("ascii")
        assert max(map(len, found[verb].splitlines())) <= 80, found[verb]
    assert "#####" in found["explain"] and "-+-" in found["explain"] and "residual" in found["explain"]
    assert "-+-" in found["attribute"] and "os" in found["attribute"]
    # Texts have a third of the line, not a letter.
    rows = [line.split("|") for line in found["attribute"].splitlines() if line.count("|") == 3]
    assert max(len(row[-1].strip()) for row in rows) >= 20


def test_an_index_of_another_model_or_corpus_is_refused(cli, run, tmp_path, corpus, cache):
    folder, arguments = run
    other = tmp_path / "other"
    fit(in_run(arguments, other, "--seed_everything", "3", "--trainer.logger", "false", "--run.sample_prompt", "null"))
    refused(cli("attribute", "--ckpt_path", other, "--index", folder / "index", "--text", "a b"), "was built for model")
    moved = tmp_path / "moved"
    shutil.copytree(folder / "index", moved)
    manifest = json.loads((moved / "manifest.json").read_text())
    for name, value, words in (("data", "0", "was built over corpus 0"), ("store", "/nowhere", "is not at /nowhere")):
        (moved / "manifest.json").write_text(json.dumps(manifest | {name: value}))
        refused(cli("attribute", "--ckpt_path", folder, "--index", moved, "--text", "a b"), words)
    # The corpus prepared with another tokenizer: the model's ids mean other texts there.
    refused(cli("index", *arguments, "--data.vocab_size", "290", "--index.dir", tmp_path / "x"), "tokenizer")


def test_a_damaged_shard_is_named_and_index_mends_it(cli, run):
    folder, arguments = run
    path = folder / "index/shards/00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    refused(cli("attribute", "--ckpt_path", folder, "--text", "a b"), "00001.safetensors does not match its checksum")
    out = cli("index", *arguments, check=0).stdout
    assert "training tokens of" in out
    cli("attribute", "--ckpt_path", folder, "--text", "import os", check=0)


def test_two_processes_at_once_build_the_same_index(run, tmp_path):
    folder, arguments = run
    asked = [*arguments, "--index.dir", str(tmp_path / "index")]
    children = [start("index", *asked, RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    results = [child.result() for child in children]
    assert [result.returncode for result in results] == [0, 0]
    assert any("training tokens of" in result.stdout for result in results)
    for path in (folder / "index").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "index" / path.relative_to(folder / "index")).read_bytes(), path


def test_index_refuses_what_it_cannot_use(cli, run, tmp_path):
    folder, arguments = run
    refused(cli("index", *arguments, "--index.seed", "8"), "another index.seed: choose another --index.dir")
    refused(cli("index", *arguments, "--index.rank", "8"), "is a setting of --index.space hidden")
    refused(cli("index", *arguments, "--index.precison", "int8"), "did you mean precision?")
    refused(cli("index", *arguments, "--index.precision", "int4"), "index.precision='int4'")
    refused(cli("index", *arguments, "--ckpt_path", tmp_path), "holds no exported model")
    checkpoint = next((folder / "checkpoints").glob("*.ckpt"))
    refused(cli("index", *arguments, "--ckpt_path", checkpoint), "is a checkpoint")
    refused(cli("index", *arguments, "--data.block_size", "64", "--index.dir", tmp_path / "x"), "longer than the model")
