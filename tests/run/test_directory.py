"""The paths of a run directory, found from the directory and from the exported model in it."""

from pathlib import Path

import pytest
import yaml

from prism_lightning.common.errors import UserError
from prism_lightning.run.directory import RunDirectory, RunPaths, RunSettings, exported_folder


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


@pytest.mark.parametrize(("encoder", "same"), [("cosine", True), ("pursuit", False)])
def test_a_recipe_from_before_there_were_encoders_has_the_cosine(tmp_path, encoder, same):
    run = RunDirectory(RunSettings(dir=str(tmp_path / "run")))
    run.paths.checkpoints.mkdir(parents=True)
    (run.paths.checkpoints / "step-00000004.ckpt").touch()
    recipe = {"model": {"class_path": "PrismLM", "init_args": {"num_prototypes": 8}}}
    run.paths.recipe.write_text(yaml.safe_dump(recipe))
    recipe["model"]["init_args"] |= {"encoder": encoder, "pretrained": None, "lora": None}
    try:
        if same:
            run.record(recipe, "data")
        else:
            with pytest.raises(UserError, match="encoder: recorded cosine, requested pursuit"):
                run.record(recipe, "data")
    finally:
        run.unlock()
