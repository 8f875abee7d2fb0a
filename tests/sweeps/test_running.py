"""Running trials: status, retries, interruption, cluster jobs, MLflow's parent and children."""

import os
import signal
import time

import pytest
import yaml
from support.processes import start
from support.runs import ROOT, TINY_RECIPE

from prism_lightning.common.errors import UserError
from prism_lightning.common.files import read_json
from prism_lightning.sweeps.running import (
    RUN_BY_ANOTHER_PROCESS,
    TrialJob,
    TrialRunner,
    lock_file,
    run_locally,
    submit_jobs,
)
from prism_lightning.sweeps.trial_status import record_path, trial_status, unfinished_steps, write_record
from prism_lightning.sweeps.trials import load_trials


def make_job(folder, name, *commands):
    return TrialJob(name, [list(c) for c in commands], folder / name, folder / f"{name}.json", 1)


@pytest.fixture
def sweep_file(tmp_path, corpus, cache):
    """Two trials of the tiny recipe, evaluated on one small task."""
    (tmp_path / "suite.yaml").write_text(
        "tasks:\n  continuation: {kind: continuation, metric: acc, chance: 0.25, context: 20, continuation: 6}\n"
    )
    settings = {"data.path": f"{corpus}/*.txt", "data.cache_dir": str(cache), "data.seed": 0}
    content = {"dir": str(tmp_path / "out"), "recipe": str(TINY_RECIPE), "variant": ["prism"], "seed": [0, 1]}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content | {"settings": settings, "suites": ["suite.yaml"]}))
    return path


def test_a_sweep_runs_resumes_and_reports(cli, sweep_file, monkeypatch, tmp_path):
    """One trial is new and one has failed before; the same command runs both, and a report shows both."""
    arguments = ["--config", sweep_file]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    first, second = load_trials(sweep_file, [])
    write_record(record_path(second), state="failed", error="error: out of luck", commands=[])
    result = cli("sweep", "status", *arguments, check=0).stdout
    assert "1 waiting, 1 failed" in result and "out of luck" in result
    result = cli("sweep", "run", *arguments, "--jobs", "2", check=0).stdout
    assert "[2/2]" in result
    result = cli("sweep", "status", *arguments, check=0).stdout
    assert "2 finished" in result
    assert "finished, skipped: prism_seed0, prism_seed1" in cli("sweep", "run", *arguments, check=0).stdout
    result = cli("sweep", "results", *arguments, "--out", tmp_path / "report", check=0).stdout
    assert "Prototypes" in result and "continuation" in result
    assert (tmp_path / "report/report.html").is_file()
    _check_children(tmp_path / "out", [first, second])
    # Another --limit means another evaluation, so the trial is not finished.
    assert trial_status(first, list(first.commands(["--limit", "2"]))).state == "waiting"
    # If a result is deleted, only that task remains to be evaluated.
    (first.run / "evaluation/continuation.json").unlink()
    assert unfinished_steps(first) == ["continuation"]
    assert trial_status(first).note == "next step: continuation"


def _check_children(folder, trials):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    parent = (folder / "mlflow_parent_id").read_text()
    experiment = client.get_experiment_by_name(folder.name)
    children = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent}'")
    assert {run.info.run_name for run in children} == {trial.run.name for trial in trials}
    assert all("train/loss" in run.data.metrics for run in children)


def test_a_failed_trial_is_retried_and_named(tmp_path):
    attempts = []
    jobs = [make_job(tmp_path, "bad", ["nonsense"]), make_job(tmp_path, "good", ["--version"])]
    with pytest.raises(UserError, match="bad failed: error: unknown verb 'nonsense'") as caught:
        run_locally(jobs, TrialRunner(tmp_path, None), 2, 1, lambda job, code: attempts.append((job.name, code)))
    assert len(caught.value.problems) == 1
    assert sorted(attempts) == [("bad", 2), ("bad", 2), ("good", 0)]
    assert (tmp_path / "bad.log").read_text().count("$ python -m prism_lightning nonsense") == 2
    assert read_json(tmp_path / "bad.json")["state"] == "failed"


def test_a_bad_recipe_is_found_before_anything_runs(cli, sweep_file):
    result = cli("sweep", "run", "--config", sweep_file, "--model.num_prototype", "3", check=2)
    assert "num_prototype is no setting: did you mean num_prototypes" in result.stderr
    assert not (sweep_file.parent / "out").exists()


def test_a_running_trial_waits_again_after_the_timeout(sweep_file):
    trial = load_trials(sweep_file, [])[0]
    path = record_path(trial)
    write_record(path, state="running")
    assert trial_status(trial).state == "running"
    os.utime(path, (time.time() - 1000,) * 2)
    assert trial_status(trial).state == "waiting"


def test_an_interrupt_reaches_the_trials(sweep_file):
    arguments = ["--config", str(sweep_file)]
    sweep = yaml.safe_load(sweep_file.read_text())
    sweep_file.write_text(yaml.safe_dump(sweep | {"tokens": [1e9]}))
    child = start("sweep", "run", *arguments)
    folder = sweep_file.parent / "out"
    deadline = time.monotonic() + 120
    while not list(folder.glob("*/checkpoints/*.ckpt")):
        assert time.monotonic() < deadline and child.poll() is None, child.stderr
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 130 and "stopped by SIGINT" in child.stderr and "Traceback" not in child.stderr
    assert read_json(folder / "trials" / "prism_1B_seed0.json")["state"] == "interrupted"


def test_jobs_go_through_submitit(tmp_path):
    pytest.importorskip("submitit")
    jobs = [make_job(tmp_path, "good", ["--version"]), make_job(tmp_path, "bad", ["nonsense"])]
    ids = submit_jobs(jobs, TrialRunner(tmp_path, None), "local", {"timeout_min": 10})
    assert len(ids) == 2
    deadline = time.monotonic() + 120
    while {(read_json(job.record) or {}).get("state") for job in jobs} - {"finished", "failed"}:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert [read_json(job.record)["state"] for job in jobs] == ["finished", "failed"]
    assert [int(job.record.with_suffix(".job").read_text()) for job in jobs] == [int(number) for number in ids]
    with pytest.raises(UserError, match="--slurm: give timeout_min"):
        submit_jobs(jobs, TrialRunner(tmp_path, None), "local", {})
    with pytest.raises(UserError, match="--slurm: "):
        submit_jobs(jobs, TrialRunner(tmp_path, None), "slurm", {"timeout_min": 5})


def test_cluster_jobs_refuse_an_sqlite_database(cli, sweep_file):
    result = cli("sweep", "run", "--config", sweep_file, "--slurm", "timeout_min=5", check=2)
    assert "cannot share one SQLite file" in result.stderr and not (sweep_file.parent / "out").exists()


def test_a_trial_of_another_process_is_skipped(tmp_path):
    job = make_job(tmp_path, "good", ["--version"])
    with lock_file(job.record.with_suffix(".lock")) as lock:
        assert lock is not None and TrialRunner(tmp_path, None)(job) == RUN_BY_ANOTHER_PROCESS
    assert not job.record.is_file()
    assert TrialRunner(tmp_path, None)(job) == 0
    assert read_json(job.record)["commands"] == [["--version"]]
