"""The paths of a run directory, found from the directory and from the exported model in it."""

from pathlib import Path

import pytest

from prism_lightning.run.directory import RunPaths, exported_folder


@pytest.mark.parametrize(
    ("config", "path", "root"),
    [
        ("run/model", "run", "run"),
        ("run/model", "run/model", "run"),
        ("exported", "exported", "exported"),
        (None, "run", "run"),
    ],
)
def test_a_run_directory_is_found_from_the_exported_model_in_it(tmp_path, monkeypatch, config, path, root):
    monkeypatch.chdir(tmp_path)
    if config:
        Path(config).mkdir(parents=True)
        Path(config, "config.json").touch()
    for base in (Path(), tmp_path):
        assert RunPaths.of(base / path) == RunPaths(base / root)
        assert exported_folder(base / path) == (base / config if config else None)
