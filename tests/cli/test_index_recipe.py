"""index without --config takes the recipe that the run directory recorded."""

from support.refusals import refused
from support.runs import copied_run

SMALL = ["--index.prototypes", "32", "--index.active", "2", "--index.fit_steps", "3"]


def indexed(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_the_recorded_recipe_gives_the_index_that_the_recipe_gives(cli, finished_run, tmp_path):
    run, arguments = copied_run(finished_run, tmp_path / "run")
    cli("index", *arguments, *SMALL, "--index.dir", tmp_path / "expected", check=0)
    cli("index", f"--ckpt_path={run}/model", *SMALL, "--index.dir", tmp_path / "index", check=0)
    assert indexed(tmp_path / "index") == indexed(tmp_path / "expected") != {}


def test_without_a_recipe_the_text_has_to_be_named(cli, finished_run, tmp_path):
    run, _ = copied_run(finished_run, tmp_path / "run")
    (run / "recipe.yaml").unlink()
    refused(cli("index", "--ckpt_path", run, *SMALL), f"{run} has no recipe.yaml: name the text to index by --config")
    refused(cli("index", *SMALL), "--config")
