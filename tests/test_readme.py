"""What the README says to type works, and continuous integration types the same."""

import re
import shlex

import pytest
from conftest import ROOT

from prism_lightning.data.store import TokenStore

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
VERB = "python -m prism_lightning "
# The first command on a smaller run: a quarter of a minute in place of minutes.
SMALLER = [
    *("--trainer.max_steps", "12", "--trainer.val_check_interval", "12", "--model.placement_step", "4"),
    *("--model.polish_steps", "5", "--model.polish_tokens", "8192", "--data.validation_blocks", "8"),
]


def commands():
    """Every line of a bash block, and every whole command in the tables."""
    lines = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    lines += [cell for cell in re.findall(r"`([^`]+)`", prose) if cell.startswith(VERB)]
    return [shlex.split(line)[3:] for line in dict.fromkeys(lines) if line.startswith(VERB)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


def moved(command, place):
    """The command with its run directory under a temporary folder."""
    return [str(place / part) if part.startswith("runs/") else part for part in command]


def test_the_first_command_and_what_follows_it(cli, place, monkeypatch):
    """The index is of the first blocks of the corpus, the rest as the README says."""
    fit = ["fit", "--config", "recipes/quickstart.yaml"]
    assert fit in commands()
    where = ["--run.dir", str(place / "runs/quickstart"), "--data.cache_dir", str(place)]
    out = cli(*fit, *where, *SMALLER, check=0).stdout
    assert "Which prototypes made each token likely" in out
    for command in commands():
        if command[0] in ("generate", "explain") and "--intervention" not in command:
            cli(*moved(command, place), check=0)
        elif command[0] in ("validate", "predict"):
            cli(*command, *where, *SMALLER, check=0)
    blocks = TokenStore.__len__
    monkeypatch.setattr(TokenStore, "__len__", lambda store: min(100, blocks(store)))
    smaller = {"index": [*where, "--index.fit_steps", "2"], "curvature": ["--tokens", "8192", "--sample", "200"]}
    asked = [command for command in commands() if command[0] in ("index", "attribute", "prototypes", "curvature")]
    assert {command[0] for command in asked} == {"index", "attribute", "prototypes", "curvature"}
    for command in asked:
        cli(*moved(command, place), *smaller.get(command[0], []), check=0)
    # 30,000 tokens are four files of the standard library, and in some versions of Python all of them raise something.
    few = ["--tokens", "100000", "--prompts", "40", "--draws", "1"]
    acted = [command for command in commands() if command[0] == "suppress" or "--intervention" in command]
    assert [command[0] for command in acted] == ["suppress", "generate"]
    for command in acted:
        cli(*moved(command, place), *(few if command[0] == "suppress" else []), check=0)
    compared = [command for command in commands() if command[0] in ("evaluate", "sweep", "report")]
    assert {command[0] for command in compared} == {"evaluate", "sweep", "report"}
    for command in compared:
        cli(*moved(command, place), check=0)
    for language, code in BLOCKS:
        if language == "python":
            exec(compile(code.replace("runs/quickstart", f"{place}/runs/quickstart"), "README.md", "exec"), {})


def test_every_recipe_and_verb_it_names_exists(cli):
    for command in commands():
        assert cli(command[0], "--help", check=0).stdout
        if "--config" in command:
            assert (ROOT / command[command.index("--config") + 1]).is_file()
    table = README[README.index("| recipes |") :]
    stated = set(re.findall(r"`([a-z_0-9{},]+)`", table[: table.index("##")].replace("{dense,prism}", "prism")))
    assert {name for name in stated if "_" in name or name == "quickstart"} <= {
        p.stem for p in (ROOT / "recipes").glob("*.yaml")
    }


def test_every_folder_and_file_of_the_map_exists():
    rows = README[README.index("## Where things are") :]
    for folder in re.findall(r"^\| `([^`]+/)` ", rows, flags=re.M):
        assert (ROOT / folder).is_dir(), folder
    for name in re.findall(r"`(\w+\.(?:py|md))`", rows):
        assert list(ROOT.glob(f"*/**/{name}")), name


def test_continuous_integration_runs_exactly_the_test_command():
    block = README[README.index("## Second command") :]
    command = re.search(r"```bash\n(.*?)```", block, flags=re.S)[1]
    assert command in (ROOT / ".ci" / "run").read_text()
