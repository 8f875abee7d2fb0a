"""Every verb gives the same answer on a GPU as on the CPU up to rounding, in fp32 and with the decoder in bf16.

In fp32 sums are taken in another order: 1e-5 of a loss, which can change single items. `tests/common/test_devices.py`
shows without a GPU that nothing stays on the wrong device.
"""

import json
import shutil

import pytest
import torch
from support import device_cases
from support.device_cases import ROUNDED, VERBS, answer, copied, headline
from support.processes import fit
from support.runs import in_run

from prism_lightning.run.fingerprints import model_fingerprint
from prism_lightning.run.model_folder import load_exported

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]
trained, runs = device_cases.trained, device_cases.runs  # fixtures
REORDERED = dict.fromkeys(VERBS, 1e-3) | {"curvature": 0.02, "calibrate": 0.05, "evaluate": 0.05}


@pytest.fixture(scope="module")
def answers():
    """Answers by verb and place, so that each command runs once."""
    return {}


@pytest.fixture
def answer_of(trained, runs, answers, cli):
    """The answer of a verb in a place; attributions use the CPU's index everywhere."""

    def run_once(verb, place):
        if (verb, place) not in answers:
            if verb == "attribute":
                run_once("index", "cpu")
                if place != "cpu":
                    shutil.rmtree(runs[place] / "index", ignore_errors=True)
                    shutil.copytree(runs["cpu"] / "index", runs[place] / "index")
            options = ("--device", "cpu") if place == "cpu" else ("--device", "cuda", "--dtype", place)
            answers[verb, place] = answer(cli, runs[place], trained[1], verb, *options)
        return answers[verb, place]

    return run_once


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_says_the_same(answer_of, verb):
    assert headline(verb, answer_of(verb, "fp32")) == pytest.approx(
        headline(verb, answer_of(verb, "cpu")), abs=REORDERED[verb]
    )


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_says_nearly_the_same_in_bf16(answer_of, verb):
    assert headline(verb, answer_of(verb, "bf16")) == pytest.approx(
        headline(verb, answer_of(verb, "cpu")), abs=ROUNDED[verb]
    )


def test_greedy_continuations_are_the_same(answer_of):
    assert answer_of("generate", "fp32")["token_ids"] == answer_of("generate", "cpu")["token_ids"]


def test_the_same_training_data_is_named(answer_of):
    for on_cpu, on_gpu in zip(answer_of("attribute", "cpu"), answer_of("attribute", "fp32"), strict=True):
        assert on_gpu["influence"] == pytest.approx(on_cpu["influence"], rel=0.02, abs=1e-3)
        first = [[token["influence"] for token in part["tokens"][:1]] for part in (on_cpu, on_gpu)]
        assert first[1] == pytest.approx(first[0], rel=0.02, abs=1e-3)


def test_removing_a_prototype_does_the_same(answer_of):
    """Not its rank: those that surely work are a few more or less."""
    on_cpu, on_gpu = (answer_of("suppress", place)["attempts"][0]["candidates"] for place in ("cpu", "fp32"))
    work = [dict(zip(part["prototype"], part["work"], strict=True)) for part in (on_cpu, on_gpu)]
    common = work[0].keys() & work[1].keys()
    assert len(common) > 0.7 * len(work[0])
    assert [work[1][i] for i in common] == pytest.approx([work[0][i] for i in common], abs=1e-3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_index_is_built_there(trained, cli, tmp_path, answer_of, dtype):
    """Its fitted dictionary is another in its last digits, so influences are near, not equal."""
    run, arguments = trained
    place = copied(run, tmp_path / "run")
    manifest = answer(cli, place, arguments, "index", "--device", "cuda", "--dtype", dtype)
    on_cpu = answer_of("attribute", "cpu")
    on_gpu = answer(cli, place, arguments, "attribute", "--device", "cuda", "--dtype", dtype)
    assert manifest["model"] == model_fingerprint(load_exported(run)[0])
    assert headline("attribute", on_gpu) == pytest.approx(headline("attribute", on_cpu), abs=ROUNDED["attribute"])
    assert on_gpu[-1]["influence"] == pytest.approx(on_cpu[-1]["influence"], rel=0.3)


def test_export_does_not_depend_on_where_a_model_was(trained, cli, tmp_path):
    cli("export", "--ckpt_path", trained[0], "--out", tmp_path / "out", check=0)
    whole, on_gpu = load_exported(tmp_path / "out")[0], load_exported(trained[0], "cuda", "bf16")[0]
    assert on_gpu.device.type == "cuda" and model_fingerprint(on_gpu) == model_fingerprint(whole)


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-3), ("bf16-mixed", 0.02)])
def test_training_there_ends_where_it_ends_here(tiny, tmp_path, precision, tolerance):
    """Twelve steps without dropout, whose masks differ on a GPU."""
    plain = [f"--model.backbone.{name}_pdrop" for name in ("resid", "embd", "attn")]
    still = [word for name in plain for word in (name, "0.0")]
    on_gpu = ("--trainer.accelerator", "cuda", "--trainer.devices", "1", "--trainer.precision", precision)
    results = [
        json.loads(fit(in_run(tiny, tmp_path / str(number), *still, *more)).splitlines()[-1])
        for number, more in enumerate(((), on_gpu))
    ]
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], abs=tolerance)
    assert results[1]["unexplained_variance"] == pytest.approx(results[0]["unexplained_variance"], abs=0.03)
