"""The README's names exist, and continuous integration runs what it says; the commands themselves run in tox's `user`.

`tests/readme_walk.py` runs them, in the environment of the README's install line.
"""

import configparser
import re
import shlex

import readme_walk
from support.runs import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def first_bash_block(heading):
    """The first bash block under a heading."""
    return re.search(r"```bash\n(.*?)```", README[README.index(heading) :], flags=re.S)[1]


def walked():
    """Every command that the walk starts, as words after the program's name."""
    return [shlex.split(command)[3:] for command in readme_walk.commands()]


def test_every_command_is_walked_through():
    """Counted by another rule than the walk's own: each occurrence of the program's name, wherever it stands."""
    for text in (README, readme_walk.TASKS):
        named = [re.split(r"[`\n|#]", rest)[0].strip() for rest in text.split("python -m prism_lightning ")[1:]]
        words = [shlex.split(command) for command in named if not command.startswith("VERB")]
        assert len(words) > 5 and [command for command in words if command not in walked()] == []
    assert walked()[0] == ["fit", "--config", "recipes/quickstart.yaml"]


def test_the_walk_shortens_a_command_and_changes_nothing_else_in_it():
    for command in readme_walk.commands():
        words, full = readme_walk.arguments(command, full=False), readme_walk.arguments(command, full=True)
        assert full[1:] == shlex.split(command)[1:] and words[: len(full)] == full, command
    assert set(readme_walk.SHORTER) <= {words[0] for words in walked()}


def test_the_user_s_environment_is_the_readme_s_install_line():
    """And nothing is added to it: no packages of tox, no extras."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    user = tox["testenv:user"]
    install = [line for line in first_bash_block("## Install and quickstart").splitlines() if "pip install" in line]
    stated = re.search(r"pip install (.*?)(?: *[#&].*)?$", install[0])[1]
    assert user["commands_pre"].split("pip install ")[1].split() == stated.split()
    assert user["skip_install"] == "true" and not {"deps", "extras", "dependency_groups"} & set(user)
    assert "python tests/readme_walk.py" in user["commands"] and "user" in tox["tox"]["env_list"]


def test_every_recipe_of_the_table_exists():
    table = readme_walk.TASKS[readme_walk.TASKS.index("| Recipes |") :]
    stated = set(re.findall(r"`([a-z_0-9{},]+)`", table[: table.index("##")].replace("{dense,prism}", "prism")))
    assert len(stated) >= 5 and stated <= {path.stem for path in (ROOT / "recipes").glob("*.yaml")}


def test_every_folder_of_the_tree_exists_and_every_package_is_in_it():
    tree = re.search(r"```text\n(prism_lightning/.*?)```", README, flags=re.S)[1]
    package, others = set(), set()
    for line in tree.splitlines()[1:]:
        names = re.findall(r"\w+", re.match(r" *((?:\w+/ *)+)", line)[1])
        (package if line.startswith("  ") else others).update(names)
    packages = {path.parent.name for path in (ROOT / "prism_lightning").glob("*/__init__.py")}
    assert package == packages
    assert others >= {"recipes", "benchmarks", "tests", "docs"} and all((ROOT / name).is_dir() for name in others)


def test_every_folder_and_file_of_the_map_exists():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = page[page.index("## Where things are") :]
    folders = re.findall(r"`([\w/]+/)`", "\n".join(re.findall(r"^\| (.*?) \|", rows, flags=re.M)))
    assert len(folders) >= 15 and [folder for folder in folders if not (ROOT / folder).is_dir()] == []
    for name in re.findall(r"`(\w+\.(?:py|txt))`", rows):
        assert any((ROOT / "prism_lightning").rglob(name)), name


def test_continuous_integration_runs_exactly_the_test_command():
    assert first_bash_block("## Tests") in (ROOT / ".ci" / "run").read_text()
