"""Options generated from dataclasses: flags, defaults, help and refusals."""

import argparse
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from support.runs import ROOT

from prism_lightning.cli.dataclass_options import add_options, attribute_texts, parsed_options
from prism_lightning.cli.interventions import OutputOptions, ScoredSuites
from prism_lightning.interventions.controllers.settings import ControllerSettings
from prism_lightning.interventions.suppression.settings import BehaviourSource, SuppressionSettings


@dataclass(frozen=True)
class Example:
    """An example.

    Attributes:
        name: Name of the thing.
        share: Share of the thing in all things, 100 %
            of them at most.
        count: Number of things.
        paths: Files of things.

    Raises:
        ValueError: the share is above 1.
    """

    name: str
    share: float = 0.5
    count: int = 200_000
    paths: list[Path] | None = None

    def __post_init__(self):
        if self.share > 1:
            raise ValueError("--share must be at most 1")


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser(prog="example")
    add_options(parser, Example)
    return parser


def parse(parser, *arguments):
    return parsed_options(parser, parser.parse_args(arguments), Example)


def test_types_and_defaults_are_those_of_the_fields(parser):
    assert parse(parser, "--name", "a") == Example("a")
    example = parse(parser, "--name", "a", "--share", "0.25", "--count", "3", "--paths", "b", "c")
    assert example == Example("a", 0.25, 3, [Path("b"), Path("c")])


def test_help_has_the_docstring_and_the_default(parser):
    page = " ".join(parser.format_help().split())
    assert "--name NAME Name of the thing." in page
    assert "Share of the thing in all things, 100 % of them at most (default 0.5)." in page
    assert "Number of things (default 200,000)." in page
    assert "--paths PATHS [PATHS ...] Files of things." in page


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "required: --name"),
        (["--name", "a", "--count", "b"], "argument --count: invalid int value: 'b'"),
        (["--name", "a", "--share", "2"], "example: error: --share must be at most 1"),
    ],
)
def test_bad_values_exit_with_2_and_one_line(parser, capsys, arguments, reason):
    with pytest.raises(SystemExit) as stop:
        parse(parser, *arguments)
    assert stop.value.code == 2 and reason in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("cls", [BehaviourSource, SuppressionSettings, ControllerSettings, OutputOptions, ScoredSuites])
def test_every_option_is_documented_by_a_sentence(cls):
    texts = attribute_texts(cls)
    assert set(texts) == {field.name for field in fields(cls)}
    assert all(text[0].isupper() and text.endswith(".") for text in texts.values())


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        (
            "suppress",
            ["--words", "--id", "--min_rate_reduction", "--draws", "--suite", "--device", "(default 200,000)"],
        ),
        ("calibrate", ["--suite", "--items", "--permutations", "--traced", "--dtype", "(default 2,000)"]),
    ],
)
def test_help_of_the_verbs_imports_nothing_heavy(verb, flags):
    script = (
        "import sys\nfrom prism_lightning.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'transformers', 'jsonargparse', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", script, verb, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert [flag for flag in flags if flag not in result.stdout] == []
    assert "--fall" not in result.stdout and "--rise" not in result.stdout
