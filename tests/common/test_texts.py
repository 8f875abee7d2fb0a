"""Texts on the command line and questions in a file: bytes and lines that are not valid are refused."""

import argparse
import codecs
import os

import pytest

from prism_lightning.common.errors import UserError
from prism_lightning.common.texts import decode_options, read_questions


def argument(content: bytes) -> str:
    """What Python makes of an argument's bytes."""
    return content.decode("utf-8", "surrogateescape")


def test_texts_that_are_utf8_stay_as_they_are():
    options = argparse.Namespace(prompt="import 你\n", words=["é", "x"], why=None)
    decode_options(options, "prompt", "words", "why")
    assert options == argparse.Namespace(prompt="import 你\n", words=["é", "x"], why=None)


def test_a_locale_without_utf8_loses_nothing():
    """Under LC_ALL=C each byte of a character arrives as a lone surrogate."""
    options = argparse.Namespace(prompt="# é".encode().decode("ascii", "surrogateescape"))
    decode_options(options, "prompt")
    assert options.prompt == "# é"


def test_every_option_that_is_not_utf8_is_named():
    options = argparse.Namespace(prompt=argument(b"a\xff"), words=["x", argument(b"\xe9")], text="fine")
    with pytest.raises(UserError) as caught:
        decode_options(options, "prompt", "words", "text")
    assert [problem.split(" (")[0] for problem in caught.value.problems] == [
        "--prompt is not UTF-8",
        "--words is not UTF-8",
    ]


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("generate", ["--prompt", argument(b"a\xff")]),
        ("explain", ["--prompt", argument(b"a\xff")]),
        ("explain", ["--text", argument(b"a\xff")]),
        ("attribute", ["--text", argument(b"a\xff")]),
        ("attribute", ["--prompt", "a", "--why", argument(b"a\xff"), "--rather_than", "b"]),
        ("suppress", ["--words", "fine", argument(b"a\xff"), "--name", "x"]),
    ],
)
def test_every_verb_that_takes_a_text_refuses_other_bytes(cli, tmp_path, verb, arguments):
    result = cli(verb, "--ckpt_path", tmp_path, *arguments, check=2)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: --") and "is not UTF-8" in line


def refusals(tmp_path, content: bytes) -> list[str]:
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_questions(path)
    assert all("\n" not in problem and len(problem) < 400 + len(str(path)) for problem in caught.value.problems)
    return [problem.replace(str(path), "q") for problem in caught.value.problems]


def test_right_questions_are_read(tmp_path):
    path = tmp_path / "q.jsonl"
    lines = [b'{"text": "a\\u2028\\ud83d\\ude00"}', b"", b'{"prompt": "p", "why": "w", "rather_than": "r"}', b"  "]
    path.write_bytes(codecs.BOM_UTF8 + b"\r\n".join(lines))
    expected = [{"text": "a\u2028😀"}, {"prompt": "p", "why": "w", "rather_than": "r"}]
    assert read_questions(path) == expected
    path.write_bytes(b'{"text": "' + b"x" * 3_000_000 + b'"}')
    assert len(read_questions(path)[0]["text"]) == 3_000_000


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[" * 100_000, "is no JSON object of texts"),
        (b'{"text": ' + b"[" * 100_000, "is no JSON object of texts"),
        (b'{"text": ' + b"9" * 401 + b"}", "is no JSON object of texts"),
        (b'{"text": ' + b"9" * 5000 + b"}", "is no JSON object of texts"),
        (b'{"text": 1e999}', "is no JSON object of texts"),
        (b'{"text": NaN}', "is no JSON object of texts"),
        (b'{"text": "a\0b"}', "is no JSON object of texts"),
        (b"\0\0\0\0", "is no JSON object of texts"),
        (b'"text"', "is no JSON object of texts"),
        (b'{"text": "caf\xe9"}', "is not UTF-8 (byte 14 of the line)"),
        (b'{"text": "a\\ud800b"}', "has half a character, \\ud800, in its text"),
        (b'{"prompt": "\\udfff"}', "has half a character, \\udfff, in its prompt"),
        (b'{"\\ud800": "a"}', "has ['\\ud800']: give text"),
        (b'{"text": "a", "prompt": "b"}', "has ['prompt', 'text']: give text"),
        (b"{}", "has []"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, words):
    (problem,) = refusals(tmp_path, b'{"text": "fine"}\n' + line + b"\n")
    assert problem.startswith("q:2 ") and words in problem


def test_other_files_are_named(tmp_path):
    assert "is UTF-16: convert it, iconv" in refusals(tmp_path, '{"text": "a"}'.encode("utf-16"))[0]
    assert "is empty" in refusals(tmp_path, b"\n \r\n")[0]
    with pytest.raises(UserError, match="not found"):
        read_questions(tmp_path / "none")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_questions(tmp_path)
    problems = refusals(tmp_path, b"x\n" * 1000)
    assert problems[0].startswith("q:1 ") and problems[-1] == "980 more lines are no questions"
    assert os.linesep not in problems[-1]
