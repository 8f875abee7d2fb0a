"""Every verb on a small trained model, on one device and on another, for tests that compare the two."""

import json
import math
import shutil

import pytest

from support.processes import fit
from support.runs import tiny_arguments

PIECE = 300  # characters of a document
SUITE = "tasks: {continuation: {kind: continuation, metric: acc, chance: 0.25, context: 12, continuation: 4}}"
TEXT = "import os\nfor name in os.listdir(path):"
# What a verb is given beside the run and the place. Sampling is left out where a seed means another sample elsewhere.
VERBS = {
    "generate": ("--prompt", "import os", "--temperature", "0", "--max_new_tokens", "12", "--json"),
    "explain": ("--text", TEXT, "--json"),
    "attribute": ("--text", TEXT, "--top", "3", "--json"),
    "prototypes": ("--json",),
    "curvature": ("--tokens", "2048", "--sample", "256", "--fitted", "32,2"),
    "suppress": ("--words", "(", "--tokens", "20000", "--prompts", "24", "--new_tokens", "12", "--draws", "1"),
    "calibrate": ("--items", "60", "--permutations", "1"),
    "evaluate": ("--limit", "40", "--json"),
}
# How far the numbers of `headline` may be from those of fp32 with the decoder in bf16. Losses are in nats, those of a
# text summed; the perplexity that `suppress` has is about 10; the others are shares and accuracies.
ROUNDED = dict.fromkeys(VERBS, 0.1) | {"attribute": 0.3, "prototypes": 0.05}
PLACES = ("cpu", "cuda", "fp32", "bf16")  # devices, or the decoder's number type on a GPU
OTHERWISE = ("seconds", "model_seconds", "environment", "run", "command")  # in answers of calls that are alike


def trained_run(folder, corpus, cache):
    """A run of 200 steps on pieces of the standard library; returns the arguments of its `fit`."""
    path = folder.parent / "pieces.jsonl"
    with path.open("w") as file:
        for source in sorted(corpus.glob("*.txt")):
            text = " ".join(source.read_bytes().decode("utf-8", "replace").split())
            for start in range(0, min(len(text), 6000) - PIECE, PIECE):
                file.write(json.dumps({"text": text[start : start + PIECE]}) + "\n")
    arguments = tiny_arguments(folder, corpus, cache)
    arguments[arguments.index("--data.path") + 1] = str(path)
    longer = ("--trainer.max_steps", "200", "--trainer.val_check_interval", "200", "--model.learning_rate", "5e-3")
    fit([*arguments, *longer])
    return arguments


@pytest.fixture(scope="module")
def trained(corpus, cache, tmp_path_factory):
    """A run, trained on the CPU, and the arguments of its fit."""
    folder = tmp_path_factory.mktemp("devices") / "run"
    return folder, trained_run(folder, corpus, cache)


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """Copies of the run, one for each place."""
    folder = tmp_path_factory.mktemp("places")
    return {name: copied(trained[0], folder / name) for name in PLACES}


def answer(cli, run, arguments, verb, *place):
    """What a verb says of a run, as plain data; `place` are --device and --dtype."""
    if verb == "index":
        quick = ("--index.prototypes", "64", "--index.fit_tokens", "8192", "--index.fit_steps", "20")
        cli("index", *arguments, "--ckpt_path", run, "--index.dir", run / "index", *quick, *place, check=0)
        return json.loads((run / "index" / "manifest.json").read_text())
    more = list(VERBS[verb])
    if verb in ("evaluate", "calibrate"):
        (run / "suite.yaml").write_text(SUITE)
        more += ["--suite", run / "suite.yaml"]
    if verb in ("suppress", "calibrate"):
        more += ["--name", verb]
    shown = cli(verb, "--ckpt_path", run, *more, *place, check=0).stdout
    if verb in ("suppress", "calibrate"):
        return json.loads((run / "interventions" / f"{verb}.details.json").read_text())
    return json.loads((run / "curvature.json").read_text() if verb == "curvature" else shown)


def headline(verb, answered):
    """Numbers of an answer that rounding moves a little: losses, shares and accuracies that nothing is drawn for."""
    if verb == "explain":
        return [token["log_probability"] for token in answered]
    if verb == "attribute":
        return [attribution["loss"] for attribution in answered]
    if verb == "prototypes":
        return [card["usage_share"] for card in answered]
    if verb == "curvature":
        return [row["gauss_newton_share"] for row in answered["rows"]]
    if verb == "suppress":
        return [answered["plain"]["perplexity"]]
    if verb == "calibrate":
        return [answered["gains"]["continuation"][0]["accuracy"]]
    if verb == "evaluate":
        return [result["metrics"]["acc"] for result in answered["results"][0]]
    return []


def copied(run, folder):
    """A run with nothing that verbs keep in it, so that one device does not read what another has found."""
    folder.mkdir()
    shutil.copy(run / "recipe.yaml", folder)
    shutil.copytree(run / "model", folder / "model")
    return folder


def differences(one, other, tolerance, path=""):
    """Where two answers differ: numbers by more than the tolerance, absolute or relative; all else at all."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = sorted((one.keys() | other.keys()) - set(OTHERWISE))
        return [d for n in names for d in differences(one.get(n), other.get(n), tolerance, f"{path}.{n}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for n, pair in pairs for d in differences(*pair, tolerance, f"{path}[{n}]")]
    if isinstance(one, float) and isinstance(other, float):
        same = math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance) or (math.isnan(one) and math.isnan(other))
    else:
        same = one == other
    return [] if same else [f"{path}: {one!r} and {other!r}"]
