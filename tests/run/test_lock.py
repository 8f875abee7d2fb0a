"""A second fit in the same run directory is refused while the first one runs."""

import json
import os

import pytest

from prism_lightning.common.errors import UserError
from prism_lightning.run import lock as module
from prism_lightning.run.directory import RunPaths
from prism_lightning.run.lock import lock_run


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.1)


def test_the_error_of_the_second_process_names_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["prism", "fit"])
    lock = lock_run(RunPaths(tmp_path))
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on .* since 20.*another --run.dir"):
        lock_run(RunPaths(tmp_path))
    assert json.loads((tmp_path / "lock.json").read_text())["command"] == ["fit"]
    lock.release()
    lock_run(RunPaths(tmp_path)).release()


def test_a_damaged_record_of_the_holder_is_no_traceback(tmp_path):
    lock = lock_run(RunPaths(tmp_path))
    (tmp_path / "lock.json").write_text("{")
    with pytest.raises(UserError, match="in use by"):
        lock_run(RunPaths(tmp_path))
    lock.release()


def test_fit_refuses_a_directory_that_another_process_trains_in(cli, tiny, tmp_path):
    (tmp_path / "run").mkdir()
    lock = lock_run(RunPaths(tmp_path / "run"))
    result = cli("fit", *tiny)
    assert result.returncode == 2 and "is in use by process" in result.stderr
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["lock", "lock.json"]
    lock.release()
