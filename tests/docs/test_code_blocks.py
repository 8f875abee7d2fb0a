"""Every command and every example of the documentation: verbs and flags are known, files exist, Python compiles."""

import ast
import importlib
import inspect
import re
import shlex

import pytest
import yaml
from support.runs import ROOT

from prism_lightning import __version__
from prism_lightning.cli.main import VERBS, VERBS_ON_RECIPES
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.lightning_modules.prism import PrismLM

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.name != "LOG.md"]  # the log names commands as they were
BLOCK = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", flags=re.S | re.M)
PROGRAM = re.compile(r"(?:^|[ ;])(?:prism|(?:python3?|torchrun [\w= -]*)-m prism_lightning) +(?=\w)")


def blocks(language):
    """Page and text of every fenced block of a language."""
    for page in PAGES:
        for indent, name, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            if name == language:
                yield page, re.sub(rf"^{indent}", "", text, flags=re.M)


def commands():
    """Page and words of every command of this program: lines of bash blocks, and whole commands in inline code."""
    lines = [(page, line) for page, text in blocks("bash") for line in text.replace("\\\n", " ").splitlines()]
    for page in PAGES:
        prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
        lines += [(page, code) for code in re.findall(r"`([^`\n]+)`", prose)]
    for page, line in lines:
        if (program := PROGRAM.search(line)) and "VERB" not in line:
            yield page.relative_to(ROOT).as_posix(), tuple(shlex.split(line[program.end() :], comments=True))


COMMANDS = sorted(set(commands()))


@pytest.fixture(scope="module")
def known_flags():
    """Flags by verb, from what the verb's --help prints."""
    from prism_lightning.cli.main import main

    flags: dict[str, set[str]] = {}

    def of(verb, capsys):
        if verb not in flags:
            capsys.readouterr()
            arguments = [verb, "run", "--help"] if verb == "lm_eval" else [verb, "--help"]
            try:
                main(arguments)
            except SystemExit as stop:
                assert not stop.code
            flags[verb] = {"--help", *re.findall(r"(?<![\w-])--[\w.-]*\w", capsys.readouterr().out)}
        return flags[verb]

    return of


def test_the_pages_have_the_commands_and_examples_that_are_checked_here():
    assert len(COMMANDS) > 60 and {words[0] for _, words in COMMANDS if not words[0].startswith("-")} <= set(VERBS)
    assert {words[0] for _, words in COMMANDS} >= set(VERBS) - {"test"}
    assert len(list(blocks("python"))) >= 5


@pytest.mark.parametrize(
    "page, words", COMMANDS, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_a_command_has_a_known_verb_and_known_flags(page, words, known_flags, capsys):
    verb, *arguments = words
    if verb in ("--help", "--version"):
        return
    assert verb in VERBS, page
    known = known_flags(verb, capsys)
    for flag in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
        if verb in (*VERBS_ON_RECIPES, "sweep") and flag.startswith("--model.") and flag not in known:
            setting = flag.removeprefix("--model.").removeprefix("init_args.").split(".")[0]
            known_settings = {*inspect.signature(PrismLM).parameters, *inspect.signature(DenseLM).parameters}
            assert setting in known_settings, f"{page}: {flag}"
        elif verb == "sweep" and "." in flag:  # a setting of every trial's fit
            assert flag in known_flags("fit", capsys), f"{page}: {flag}"
        else:
            assert flag in known, f"{page}: {verb} has no {flag}"


@pytest.mark.parametrize(
    "page, words", COMMANDS, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_a_command_names_recipes_and_suites_that_exist(page, words):
    for word in words:
        if re.match(r"(recipes|evals|benchmarks)/", word):
            assert list(ROOT.glob(word)), f"{page}: {word}"


def test_every_module_that_is_run_exists():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if "results" not in page.parts)
    modules = set(re.findall(r"python -m (benchmarks[\w.]*)", text))
    assert len(modules) >= 8
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("page, text", list(blocks("python")), ids=lambda value: getattr(value, "stem", ""))
def test_an_example_compiles_and_what_it_imports_exists(page, text):
    tree = ast.parse(text, filename=str(page))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith(("prism_lightning", "benchmarks")):
            module = importlib.import_module(node.module)
            assert [name.name for name in node.names if not hasattr(module, name.name)] == [], page


def test_every_block_of_yaml_is_yaml():
    for _, text in blocks("yaml"):
        yaml.safe_load(text)


def test_the_api_reference_names_modules_that_exist():
    text = (ROOT / "docs" / "api.md").read_text()
    modules = re.findall(r"^::: ([\w.]+)$", text, flags=re.M)
    assert len(modules) > 10
    for module in modules:
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_of_pages_outside_the_site_lead_somewhere(name):
    """`mkdocs build --strict` checks those within."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (ROOT / target).exists(), target


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    assert citation["version"] == __version__
    (paper,) = citation["references"]
    assert paper["title"] == "Prototype Language Models" and "2607.00510" in paper["url"]
