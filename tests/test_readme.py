"""The README's names exist, and continuous integration runs what it says; the commands themselves run in tox's `user`.

`tests/readme_walk.py` runs them, in the environment of the README's install line.
"""

import configparser
import re
import shlex

import readme_walk
from support.runs import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def bash_of(heading):
    """The first bash block under a heading."""
    return re.search(r"```bash\n(.*?)```", README[README.index(heading) :], flags=re.S)[1]


def walked():
    """Every command that the walk starts, as words after the program's name."""
    return [shlex.split(command)[3:] for command in readme_walk.commands()]


def test_every_command_is_walked_through_or_listed_as_made_for_elsewhere():
    """Counted by another rule than the walk's own: each occurrence of the program's name, wherever it stands."""
    said = [re.split(r"[`\n|#]", rest)[0].strip() for rest in README.split("python -m prism_lightning ")[1:]]
    known = [shlex.join(words) for words in walked()]
    assert [command for command in said if shlex.join(shlex.split(command)) not in known] == []
    left_out = [words for words in walked() if readme_walk.ELSEWHERE & set(words)]
    assert {words[0] for words in left_out} == {"fit"} and len(left_out) < len(known) / 4
    assert ["fit", "--config", "recipes/quickstart.yaml"] in walked()


def test_the_walk_shortens_a_command_and_changes_nothing_else_in_it():
    for command in readme_walk.commands():
        words, full = readme_walk.arguments(command, full=False), readme_walk.arguments(command, full=True)
        assert full[1:] == shlex.split(command)[1:] and words[: len(full)] == full, command


def test_the_user_s_environment_is_the_readme_s_install_line():
    """And nothing is added to it: no packages of tox, no extras."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    user = tox["testenv:user"]
    install = [line for line in bash_of("## First command").splitlines() if "pip install" in line]
    stated = re.search(r"pip install (.*?)(?: *[#&].*)?$", install[0])[1]
    assert user["commands_pre"].split("pip install ")[1].split() == stated.split()
    assert user["skip_install"] == "true" and not {"deps", "extras", "dependency_groups"} & set(user)
    assert "python tests/readme_walk.py" in user["commands"] and "user" in tox["tox"]["env_list"]


def test_every_recipe_and_verb_it_names_exists(cli):
    for words in walked():
        assert words[0] in cli(words[0], "--help", check=0).stdout
        if "--config" in words:
            assert (ROOT / words[words.index("--config") + 1]).is_file()
    table = README[README.index("| recipes |") :]
    stated = set(re.findall(r"`([a-z_0-9{},]+)`", table[: table.index("##")].replace("{dense,prism}", "prism")))
    stated = {name for name in stated if "_" in name or name == "quickstart"}
    assert len(stated) >= 5 and stated <= {path.stem for path in (ROOT / "recipes").glob("*.yaml")}


def test_every_folder_and_file_of_the_map_exists():
    rows = README[README.index("## Where things are") :]
    folders = re.findall(r"^\| `([^`]+/)`", rows, flags=re.M)
    assert len(folders) >= 5 and [folder for folder in folders if not (ROOT / folder).is_dir()] == []
    for name in re.findall(r"`(\w+\.(?:py|md))`", rows):
        assert any(list((ROOT / part).rglob(name)) for part in ("prism_lightning", "benchmarks", "docs")), name


def test_continuous_integration_runs_exactly_the_test_command():
    assert bash_of("## Second command") in (ROOT / ".ci" / "run").read_text()
