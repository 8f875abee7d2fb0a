"""The verb retrofit: predictions stay as they are, every verb takes the run, a kill changes nothing."""

import json
import shutil
from functools import partial

import pytest
import torch
from support import processes
from support.kills import at_call, at_phase, contents
from support.refusals import refused
from transformers import AutoModelForCausalLM

from prism_lightning.attribution.index.opening import open_index
from prism_lightning.models import decompose
from prism_lightning.models.encoders import CosineEncoder
from prism_lightning.run.model_folder import load_exported
from prism_lightning.run.training_data import data_of

MEASURED = ("seconds", "peak_memory_gib")  # figures that differ from run to run


@torch.no_grad()
def base_logits(bases, ids, base="llama"):
    model = AutoModelForCausalLM.from_pretrained(bases / base, dtype=torch.float32).eval()
    return model(ids).logits


def results_of(run):
    """The last line of results.jsonl, without what is measured."""
    results = json.loads((run / "results.jsonl").read_text().splitlines()[-1])
    return {name: value for name, value in results.items() if name not in MEASURED}


def test_predictions_stay_bit_for_bit_and_add_up(retrofitted, bases, ids):
    model, tokenizer = load_exported(retrofitted[0])
    expected = base_logits(bases, ids)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    split = decompose(model, ids, ids)
    torch.testing.assert_close(split.total_BT, expected.gather(-1, ids[..., None])[..., 0], atol=1e-4, rtol=0)
    assert len(tokenizer) == 300 and model.config.vocab_size == 320
    assert (model.config.encoder, model.config.num_prototypes, model.config.active_prototypes) == ("pursuit", 64, 4)
    assert model.config.base_model == str(bases / "llama") and not model.config.fuse_activations


def test_results_are_those_of_the_model_on_the_validation_text(retrofitted):
    """And better than those of prototypes that were not fitted."""
    run, output = retrofitted
    results = results_of(run)
    assert json.loads(output.splitlines()[-1])["loss"] == results["loss"] and f"model: {run}/model" in output
    assert results["fit_tokens"] == 8192 and results["step"] == 20
    model, _ = load_exported(run)
    store = data_of(run).validation
    blocks = [int(n) for n in torch.linspace(0, len(store) - 1, 2048 // 32).double().floor()]
    items = store.__getitems__(blocks)
    ids, targets = (torch.stack([item[name] for item in items]) for name in ("input_ids", "targets"))
    with torch.no_grad():
        z_ND = model.hidden_states(ids).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(model.lm_head(z_ND), targets.flatten())
        zhat_ND = model.prototypes(z_ND, head_VD=model.lm_head.weight)[0].mixture_ND
    unexplained = float((z_ND - zhat_ND).square().sum() / z_ND.square().sum())
    assert results["loss"] == pytest.approx(float(loss), abs=1e-3)
    assert results["unexplained_variance"] == pytest.approx(unexplained, abs=5e-3) and unexplained < 0.6
    assert 0 <= results["prediction_recovered"] <= 1 and 0 <= results["top1_agreement"] <= 1


def test_the_run_directory_holds_results_model_recipe_and_nothing_unfinished(retrofitted):
    names = {path.name for path in retrofitted[0].iterdir()}
    assert {"model", "recipe.yaml", "results.jsonl", "environment.json", "tokenizer"} <= names
    assert not names & {"retrofit", "checkpoints"}


def test_every_verb_takes_the_run(cli, retrofitted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(retrofitted[0], run)
    ckpt = ("--ckpt_path", run)
    shown = cli("explain", *ckpt, "--text", "import os", check=0).stdout
    assert "residual" in shown and "= logit" in shown
    small = ["--index.prototypes", "32", "--index.active", "2", "--index.fit_steps", "3"]
    assert "32 prototypes" in cli("index", *ckpt, *small, check=0).stdout  # without --config
    assert (run / "index" / "manifest.json").is_file()
    answers = json.loads(cli("attribute", *ckpt, "--text", "import os", "--top", "2", "--json", check=0).stdout)
    assert answers[-1]["kind"] == "sequence" and len(answers[-1]["documents"]) == 2
    cards = json.loads(cli("prototypes", *ckpt, "--top", "2", "--json", check=0).stdout)
    assert cards[0]["usage"] > 0
    tiny = ("--tokens", "20000", "--prompts", "40", "--new_tokens", "16", "--draws", "1")
    cli("suppress", *ckpt, "--id", "3", "7", "--words", *"[]7894", "--name", "without", *tiny, check=0)
    plain, steered = (
        json.loads(cli("explain", *ckpt, "--text", "import os", "--json", *more, check=0).stdout)
        for more in ((), ("--intervention", "without"))
    )
    assert [token["residual"] for token in plain] == [token["residual"] for token in steered]
    suite = ("--suite", "evals/continuation.yaml", "--limit", "4")
    assert "acc" in cli("evaluate", *ckpt, *suite, check=0).stdout
    cli("curvature", *ckpt, "--tokens", "2048", "--sample", "256", check=0)
    own, results = json.loads((run / "curvature.json").read_text())["rows"][1]["faithfulness"], results_of(run)
    assert own["top1_agreement"] == pytest.approx(results["top1_agreement"], abs=0.1)
    assert own["unexplained_variance"] == pytest.approx(results["unexplained_variance"], abs=0.05)
    assert cli("generate", *ckpt, "--prompt", "import", "--max_new_tokens", "3", check=0).stdout.startswith("import")


def test_controllers_are_fitted_to_a_retrofit(cli, retrofitted, pieces, tmp_path):
    run, items = tmp_path / "run", tmp_path / "items" / "piqa"
    shutil.copytree(retrofitted[0], run)
    texts = [json.loads(line)["text"] for line in pieces.read_text().splitlines()][:120]
    items.mkdir(parents=True)
    for split, part in (("train", texts[:60]), ("validation", texts[60:])):
        rows = [
            {"goal": text[:40], "sol1": text[40:60], "sol2": text[60:80], "label": number % 2}
            for number, text in enumerate(part)
        ]
        (items / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "piqa.yaml").write_text("tasks: {piqa: {metric: acc_norm, chance: 0.5}}\n")
    suite = ("--suite", tmp_path / "piqa.yaml", "--data_dir", items.parent)
    cli("calibrate", "--ckpt_path", run, *suite, "--permutations", "2", "--name", "surer", check=0)
    intervention = json.loads((run / "interventions" / "surer.json").read_text())
    assert set(intervention["factors"]) <= set(map(str, range(64)))
    asked = ("generate", "--ckpt_path", run, "--prompt", "import os", "--max_new_tokens", "3")
    assert cli(*asked, "--intervention", "surer", check=0).stdout.startswith("import os")


def test_an_index_of_the_models_own_prototypes_has_its_pursuit(cli, retrofitted, tmp_path):
    """Activations in the index are those of the model."""
    run, folder = retrofitted[0], tmp_path / "index"
    own = ("--index.dictionary", "model", "--index.dir", folder, "--index.space", "hidden", "--index.precision", "fp32")
    cli("index", "--ckpt_path", run, *own, check=0)
    index, (model, _), store = open_index(folder), load_exported(run), data_of(run).train
    items = store.__getitems__(list(range(len(store))))
    with torch.no_grad():
        z_ND = model.hidden_states(torch.stack([item["input_ids"] for item in items])).flatten(0, 1)
        mixture = model.prototypes(z_ND, head_VD=model.lm_head.weight)[0]
    largest = int(torch.bincount(mixture.indices_Nk[mixture.activations_Nk > 0], minlength=64).argmax())
    rows_n, activations_n = index.postings(largest)
    active_Nk = (mixture.indices_Nk == largest) & (mixture.activations_Nk > 0)
    expected_N = (mixture.activations_Nk * active_Nk).sum(-1)
    found_N = torch.zeros(len(z_ND))
    found_N[torch.as_tensor(rows_n.astype("int64"))] = torch.as_tensor(activations_n.astype("float32"))
    agree = (found_N - expected_N).abs() <= 0.02 * expected_N.max()
    assert agree.float().mean() > 0.995
    # Prototypes assigned by cosine would be active for other tokens.
    nearest_Nk = CosineEncoder(model.prototypes.weight.detach(), 4)(z_ND).indices_Nk
    assert ((nearest_Nk == largest).any(1) != (expected_N > 0)).float().mean() > 0.05


def test_a_native_export_is_the_base_model(cli, retrofitted, bases, ids, tmp_path):
    assert (
        "LlamaForCausalLM"
        in cli("export", "--ckpt_path", retrofitted[0], "--native", "--out", tmp_path / "native", check=0).stdout
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, base_logits(bases, ids))


@pytest.mark.parametrize("verb", ["fit", "validate", "predict"])
def test_a_retrofits_recipe_has_no_model_to_train(cli, retrofitted, verb):
    recipe = retrofitted[0] / "recipe.yaml"
    refused(cli(verb, "--config", recipe, "--ckpt_path", retrofitted[0]), f"records a retrofit, which {verb} does not")


def test_a_second_call_says_that_the_run_is_complete(cli, retrofitted, arguments_of):
    run = retrofitted[0]
    before = contents(run)
    shown = cli(*arguments_of(run), check=0).stdout
    assert f"{run} is complete: choose another --out, or remove it" in shown
    assert json.loads(shown.splitlines()[-1])["loss"] == results_of(run)["loss"]
    changed = {name for name, content in contents(run).items() if before.get(name) != content}
    assert changed <= {"environment.json"}


def test_a_finished_run_whose_end_was_cut_off_is_tidied(cli, retrofitted, arguments_of, tmp_path):
    """Killed between its results and the removal of the intermediate files."""
    run = tmp_path / "run"
    kill = partial(at_call, "prism_lightning.retrofit.run:RunDirectory.add_results", 1, "after")
    assert processes.run(*arguments_of(run), before=kill).returncode < 0
    assert (run / "retrofit").is_dir()
    assert "is complete" in cli(*arguments_of(run), check=0).stdout
    assert not (run / "retrofit").exists() and results_of(run) == results_of(retrofitted[0])


@pytest.mark.parametrize("phase", ["computing hidden states", "fitting prototypes", "evaluating"])
def test_a_kill_in_any_phase_changes_no_bit(retrofitted, arguments_of, tmp_path, phase):
    run = tmp_path / "run"
    assert processes.run(*arguments_of(run), before=partial(killed_at, phase)).returncode < 0
    unfinished = {path.suffix for path in (run / "retrofit").iterdir()}
    assert ".bin" in unfinished and (".safetensors" in unfinished) == (phase != "computing hidden states")
    done = json.loads((run / "retrofit" / "hidden_states.json").read_text())["blocks_done"]
    assert 0 < done < 256 if phase == "computing hidden states" else done == 256
    result = processes.run(*arguments_of(run))
    assert result.returncode == 0, result.stderr
    assert contents(run / "model") == contents(retrofitted[0] / "model") and results_of(run) == results_of(
        retrofitted[0]
    )
    assert not (run / "retrofit").exists()


def killed_at(phase):
    """Be killed when half of a phase is done, where an unfinished fit is saved at every step."""
    from prism_lightning.retrofit import fitting

    fitting.SAVE_SECONDS = 0.0
    at_phase(phase)


def test_another_model_other_data_and_other_settings_are_refused(cli, retrofitted, arguments_of, corpus):
    run = retrofitted[0]
    for changed, words in (
        ({"base": "gpt2"}, "retrofit.model"),
        ({"data__path": f"{corpus}/*.txt"}, "data.path"),
        ({"prototypes": 32}, "retrofit.prototypes: recorded 64, requested 32"),
    ):
        result = cli(*arguments_of(run, **changed))
        refused(result, words)
        refused(result, "choose another --out or remove it")


def test_bf16_states_of_a_tied_gpt2_with_cosines(cli, retrofitted, arguments_of, bases, ids, tmp_path):
    """The decoder computes its states in bf16; the exported weights are not rounded."""
    arguments = arguments_of(tmp_path / "run", base="gpt2", encoder="cosine", dtype="bf16")
    cli(*arguments, check=0)
    model, _ = load_exported(tmp_path / "run")
    assert model.config.encoder == "cosine" and model.prototypes.metric is None
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base_logits(bases, ids, "gpt2"))
    cli(*arguments_of(tmp_path / "fp32", base="gpt2", encoder="cosine"), check=0)
    exact, _ = load_exported(tmp_path / "fp32")
    assert not torch.equal(exact.prototypes.weight, model.prototypes.weight)
    figures = [results_of(tmp_path / name) for name in ("run", "fp32")]
    assert figures[0]["loss"] == figures[1]["loss"]
    assert figures[0]["unexplained_variance"] == pytest.approx(figures[1]["unexplained_variance"], rel=0.1)


def test_a_report_has_a_row_for_a_retrofit_beside_runs_and_alone(cli, retrofitted, finished_run, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(retrofitted[0], root / "retrofitted")
    shutil.copytree(finished_run[0], root / "fitted")
    results = results_of(root / "retrofitted")
    for folder, beside in ((root, True), (root / "retrofitted", False)):
        result = cli("report", "--runs", folder, "--out", tmp_path / "report", check=0)
        assert "left out" not in result.stderr
        text = (tmp_path / "report" / "report.md").read_text()
        assert ("Language modeling" in text) == beside
        (row,) = (line for line in text.splitlines() if line.startswith("|") and "retrofitted" in line)
        assert "llama" in row and "pursuit" in row and f"{results['prediction_recovered']:.3f}" in row
        assert str(tmp_path / "bases") not in row
    (root / "retrofitted" / "results.jsonl").write_text('{"step": 1}')
    refused(cli("report", "--runs", root / "retrofitted", "--out", tmp_path / "report"), "run its `retrofit` again")
