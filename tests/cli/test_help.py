"""Help, version and the page of settings; they import nothing heavy."""

import re
import subprocess
import sys

import pytest
from support.processes import child_environment, command, run
from support.refusals import refused
from support.runs import ROOT

from prism_lightning import __version__


def print_settings_page():
    from prism_lightning.cli.settings_page import settings_page

    print(settings_page(), end="")
    sys.exit(0)


def test_the_settings_page_is_what_the_parser_knows():
    page = (ROOT / "prism_lightning" / "cli" / "settings.txt").read_text()
    assert page == run(before=print_settings_page).stdout, "run python -m prism_lightning.cli.settings_page"


def test_the_module_runs_as_a_program():
    """A true start: elsewhere processes are forked with the imports done."""
    result = subprocess.run(
        command("validate", "--config", "tests/tiny.yaml", "--run.dir", "/nowhere"),
        capture_output=True,
        text=True,
        env=child_environment(),
        cwd=ROOT,
    )
    refused(result, "/nowhere holds neither")
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["attribute", "python -m prism_lightning fit --config recipes/quickstart.yaml"]),
        (["fit", "--help"], ["fit: train a model", "--trainer.max_steps"]),
        (["explain", "--help"], ["--ckpt_path", "--text"]),
        (["generate", "--help"], ["--ckpt_path", "--prompt", "--max_new_tokens"]),
        (["--version"], [__version__]),
    ],
)
def test_help_imports_nothing_heavy(arguments, words):
    script = (
        "import sys\nfrom prism_lightning.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'transformers', 'jsonargparse'} & set(sys.modules)\nassert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert [word for word in words if word not in result.stdout] == []


def test_help_explains_every_setting():
    page = (ROOT / "prism_lightning" / "cli" / "settings.txt").read_text()
    entries = re.split(r"\n  (?=--)", page)[1:]
    assert len(entries) > 80
    unexplained = [
        entry.split()[0]
        for entry in entries
        if not re.search(
            r"[a-z]{3,} \w+", re.sub(r"\((required|type|default).*", "", entry.partition(" ")[2], flags=re.S)
        )
    ]
    assert unexplained == []
