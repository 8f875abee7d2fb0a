"""MLflow's store: created atomically, repaired after a kill, and named in one line where it cannot be used."""

import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from lightning.pytorch.utilities import rank_zero_only
from support.processes import child_environment

from prism_lightning.common.errors import UserError
from prism_lightning.run.mlflow_store import check_uri, make_database
from prism_lightning.training.loggers import open_logger


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """An empty MLflow database, which takes seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    make_database(path, used_before=False)
    return path


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("file:/tmp/mlruns", "sqlite:///"),
        ("mlruns", "sqlite:///"),
        ("/tmp/mlruns", "sqlite:///"),
        ("sqlite:mlflow.db", "three slashes"),
        ("sqlite:///", "such as sqlite:///mlflow.db"),
        ("sqlite:////tmp/", "such as sqlite:////tmp/mlflow.db"),
    ],
)
def test_addresses_that_mlflow_does_not_take_are_refused_with_one_that_it_does(uri, advice):
    with pytest.raises(UserError, match=advice):
        check_uri(uri)


def test_file_stores_are_refused_by_fit_before_anything_is_trained(cli, tiny, tmp_path):
    result = cli("fit", *tiny, "--run.tracking_uri", f"file:{tmp_path}/mlruns")
    assert (
        result.returncode == 2 and "sqlite:///path/to/mlflow.db" in result.stderr and "Traceback" not in result.stderr
    )


def test_a_kill_while_the_database_is_made_leaves_no_file_in_its_place(tmp_path):
    path = tmp_path / "mlflow.db"
    script = "from pathlib import Path\nfrom prism_lightning.run.mlflow_store import make_database\n"
    script += f"make_database(Path({str(path)!r}), used_before=False)"
    child = subprocess.Popen([sys.executable, "-c", script], env=child_environment(), stderr=subprocess.DEVNULL)
    while not path.with_name("mlflow.db.partial").is_file():
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not path.exists()
    make_database(path, used_before=False)
    logger = open_logger(f"sqlite:///{path}", used_before=True, experiment_name="again")
    assert logger.run_id


def test_a_half_made_database_of_an_unused_run_is_made_anew(tmp_path):
    """Older versions left such a file: some tables, after a kill in the middle of the migrations."""
    path = tmp_path / "mlflow.db"
    connection = sqlite3.connect(path)
    connection.execute("create table guardrails (id integer)")
    connection.commit()
    connection.close()
    logger = open_logger(f"sqlite:///{path}", used_before=False, experiment_name="again")
    assert logger.run_id


def test_a_damaged_database_that_is_in_use_is_named_and_kept(tmp_path, database):
    path = tmp_path / "mlflow.db"
    content = database.read_bytes()
    path.write_bytes(content[: len(content) // 3])
    with pytest.raises(UserError, match=rf"{path} is damaged .*: rename it and run the same command"):
        open_logger(f"sqlite:///{path}", used_before=True, experiment_name="x")
    assert len(path.read_bytes()) == len(content) // 3


def test_further_ranks_leave_the_store_to_the_first(tmp_path, monkeypatch):
    """Their connection would create tables in a file that the first rank replaces."""
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    path = tmp_path / "mlflow.db"
    open_logger(f"sqlite:///{path}", used_before=False, experiment_name="x").log_metrics({"loss": 1.0}, step=1)
    assert not path.exists()


def test_a_run_that_the_store_does_not_know_is_followed_by_a_new_one(tmp_path, database):
    """The advice for a damaged database works: after its removal the run continues in a new MLflow run."""
    shutil.copy(database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    logger = open_logger(uri, used_before=True, experiment_name="x", run_id="0" * 32)
    assert logger.run_id != "0" * 32
    again = open_logger(uri, used_before=True, experiment_name="x", run_id=logger.run_id)
    assert again.run_id == logger.run_id
