"""kill -9 aimed at every stage, three times each: the same command finishes, and its files are byte-equal.

Each process kills itself at a call of a named function.
"""

import json
import os
import signal
from functools import partial

import pytest
from support import processes
from support.kills import at_call, contents
from support.mlflow_template import VARIABLE as MLFLOW_TEMPLATE
from support.runs import TINY_RECIPE

SUITE = """tasks:
  continuation: {kind: continuation, metric: acc, chance: 0.25, context: 20, continuation: 6}
  validation: {kind: validation, metric: bits_per_byte, documents: 4}
"""
NO_LOGGER = ["--trainer.logger", "false"]


def finish(arguments, **environment):
    """Run a command to its end."""
    result = processes.run(*arguments, **environment)
    assert result.returncode == 0, result.stdout + result.stderr


def survives(arguments, kills, **environment):
    """Run a command once for each kill and once to its end."""
    for kill in kills:
        result = processes.run(*arguments, before=partial(at_call, *kill), **environment)
        assert result.returncode == -signal.SIGKILL, (kill, result.stdout, result.stderr)
    finish(arguments, **environment)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus):
    """A fit, an index and an evaluation that nothing interrupted: folder and data cache."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "suite.yaml").write_text(SUITE)
    finish([*fit(folder, corpus), *NO_LOGGER])
    finish(index(folder, corpus))
    finish(evaluate(folder))
    return folder


def arguments_of(folder, corpus):
    recipe = ["--config", TINY_RECIPE, "--run.dir", folder / "run", "--data.cache_dir", folder / "cache"]
    return [*recipe, "--data.path", f"{corpus}/*.txt", "--run.sample_prompt", "null"]


def fit(folder, corpus):
    return ["fit", *arguments_of(folder, corpus)]


def index(folder, corpus):
    small = ["--index.prototypes", "64", "--index.active", "2", "--index.fit_steps", "3"]
    return ["index", *arguments_of(folder, corpus), *small, "--index.shard_tokens", "100000"]


def evaluate(folder):
    return ["evaluate", "--ckpt_path", folder / "run", "--suite", folder / "suite.yaml", "--limit", "4"]


FIT_KILLS = {
    "data preparation": [
        ("prism_lightning.data.store:StoreWriter.append", 1, "before"),
        ("prism_lightning.data.store:StoreWriter.append", 1, "after"),
        ("prism_lightning.data.preparation:_write", 1, "after"),
    ],
    "tokenizer": [
        ("prism_lightning.data.preparation:train_tokenizer", 1, "before"),
        ("prism_lightning.data.preparation:train_tokenizer", 1, "after"),
        ("transformers:PreTrainedTokenizerFast.save_pretrained", 1, "after"),
    ],
    "mid-step": [
        ("prism_lightning.lightning_modules.dense:DenseLM.training_step", 3, "after"),
        ("prism_lightning.lightning_modules.dense:DenseLM.training_step", 10, "before"),
        ("torch.optim:AdamW.step", 5, "after"),
    ],
    "checkpoint write": [
        ("torch:save", 1, "after"),
        ("prism_lightning.training.checkpoint_io:AtomicCheckpointIO.save_checkpoint", 2, "before"),
        ("prism_lightning.training.checkpoint_io:AtomicCheckpointIO.save_checkpoint", 1, "after"),
    ],
    "export": [
        ("prism_lightning.training.post_training:save_exported", 1, "before"),
        ("prism_lightning.run.model_folder:write_checksums", 1, "before"),
        ("prism_lightning.run.directory:RunDirectory.add_results", 1, "before"),
    ],
}


@pytest.mark.parametrize("stage", sorted(FIT_KILLS))
def test_fit_killed_at(stage, whole, corpus, tmp_path):
    survives([*fit(tmp_path, corpus), *NO_LOGGER], FIT_KILLS[stage])
    assert contents(tmp_path / "cache") == contents(whole / "cache")
    assert contents(tmp_path / "run" / "model") == contents(whole / "run" / "model")


def test_fit_killed_in_its_first_seconds(whole, corpus, tmp_path):
    """The run directory is made, MLflow's database half migrated, or made and not yet in its place."""
    kills = [
        ("prism_lightning.run.directory:lock_run", 1, "after"),
        ("mlflow.store.db.utils:_upgrade_db", 1, "before"),
        ("mlflow.store.tracking.sqlalchemy_store:SqlAlchemyStore.__init__", 1, "after"),
    ]
    survives(fit(tmp_path, corpus), kills, **{MLFLOW_TEMPLATE: ""})
    assert contents(tmp_path / "run" / "model") == contents(whole / "run" / "model")
    assert not (tmp_path / "run" / "mlflow.db.partial").exists()


INDEX_KILLS = {
    "shard": [
        ("prism_lightning.attribution.build.builder:Builder.prepare_dictionary", 1, "after"),
        ("prism_lightning.attribution.build.builder:Builder.write_shard", 1, "after"),
        ("prism_lightning.common.files:os.fsync", 1, "before"),
    ],
    "merge": [
        ("prism_lightning.attribution.build.builder:Builder._merge", 1, "before"),
        ("prism_lightning.attribution.build.logits:LogitShardBuilder.curvature", 1, "after"),
        ("prism_lightning.attribution.build.builder:Builder._manifest", 1, "before"),
    ],
}


@pytest.mark.parametrize("stage", sorted(INDEX_KILLS))
def test_index_killed_at(stage, whole, corpus, tmp_path):
    elsewhere = ["--index.dir", tmp_path / "index"]
    survives([*index(whole, corpus), *elsewhere], INDEX_KILLS[stage])
    assert contents(tmp_path / "index") == contents(whole / "run" / "index")


def test_evaluate_killed(whole, tmp_path):
    """Finished tasks are kept; seconds differ from run to run, samples and metrics do not."""
    (tmp_path / "run").mkdir()
    for name in ("run/model", "run/recipe.yaml", "suite.yaml"):
        os.symlink(whole / name, tmp_path / name)
    kills = [
        ("prism_lightning.evaluation.evaluator:write_result", 1, "before"),
        ("prism_lightning.evaluation.evaluator:write_result", 1, "after"),
        ("prism_lightning.evaluation.results:write_json", 1, "before"),
    ]
    survives(evaluate(tmp_path), kills)
    expected, written = contents(whole / "run" / "evaluation"), contents(tmp_path / "run" / "evaluation")
    assert expected.keys() == written.keys() and len(written) == 4
    for name in written:
        if name.endswith("samples.jsonl"):
            assert written[name] == expected[name]
        else:
            assert json.loads(written[name])["metrics"] == json.loads(expected[name])["metrics"]


def test_sweep_killed(whole, corpus, tmp_path):
    """The sweep itself is killed: before a trial, between its fit and its evaluation, and behind it."""
    settings = {"data.path": f"{corpus}/*.txt", "data.cache_dir": str(whole / "cache"), "trainer.logger": False}
    sweep = {
        "dir": str(tmp_path / "runs"),
        "recipe": str(TINY_RECIPE),
        "variant": ["prism"],
        "suites": [str(whole / "suite.yaml")],
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep | {"settings": settings | {"run.sample_prompt": None}}))
    kills = [
        ("prism_lightning.sweeps.running:TrialRunner._run_command", 1, "before"),
        ("prism_lightning.sweeps.running:TrialRunner._run_command", 1, "after"),
        ("prism_lightning.sweeps.running:TrialRunner._run_commands", 1, "after"),
    ]
    survives(["sweep", "run", "--config", tmp_path / "sweep.yaml", "--limit", "4", "--jobs", "2"], kills)
    (run_folder,) = [path.parent for path in (tmp_path / "runs").glob("*/model")]
    assert contents(run_folder / "model") == contents(whole / "run" / "model")
