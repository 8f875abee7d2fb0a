"""Texts from users: on the command line, and in a file of questions."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from prism_lightning.common.errors import UserError

QUESTIONS = ({"text"}, {"prompt"}, {"prompt", "why", "rather_than"})
PRINTED_PROBLEMS = 20  # of one file
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def decode_options(options: argparse.Namespace, *names: str) -> None:
    """Decode the texts of command-line options, single or in lists, so that they can be encoded again.

    Args:
        options: parsed options; the decoded texts replace their values.
        names: of the options with texts.

    Raises:
        UserError: texts are not UTF-8; the message names every such option.
    """
    problems = []
    for name in names:
        value = getattr(options, name)
        try:
            if isinstance(value, str):
                setattr(options, name, _decoded(value))
            elif value is not None:
                setattr(options, name, [_decoded(text) for text in value])
        except UnicodeError as error:
            problems.append(f"--{name} is not UTF-8 (byte {error.args[2] + 1} of it): give the text in UTF-8")
    if problems:
        raise UserError(problems)


def _decoded(text: str) -> str:
    # In a locale without UTF-8, Python turns its bytes into lone surrogates, also those of correct UTF-8.
    return text.encode("utf-8", "surrogateescape").decode("utf-8")


def surrogate_in(text: str) -> str | None:
    """Return the first lone surrogate in a text, escaped, since no encoding accepts it; None without any."""
    return next((f"\\u{ord(c):04x}" for c in text if 0xD800 <= ord(c) < 0xE000), None)


def read_questions(path: Path) -> list[dict[str, str]]:
    """Return the questions in a file of JSON lines: each has "text", or "prompt", or "prompt", "why" and "rather_than".

    Raises:
        UserError: the file cannot be read or has no question; or lines are not questions, and the message names them.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"queries file {path} not found") from error
    except OSError as error:
        raise UserError(f"queries file {path} cannot be read: {error.strerror}") from error
    if content.startswith(UTF16):
        raise UserError(f"queries file {path} is UTF-16: convert it, iconv -f UTF-16 -t UTF-8 {path} > converted.jsonl")
    problems, questions = [], []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            question = _question(line)
            if isinstance(question, str):
                problems.append(f"{path}:{number} {question}")
            else:
                questions.append(question)
    if problems or not questions:
        raise UserError(_first_problems(problems) or f"queries file {path} is empty")
    return questions


def _question(line: bytes) -> dict[str, str] | str:
    """Return the question on a line, or what is wrong with the line."""
    try:
        question = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {error.start + 1} of the line): convert the file to UTF-8"
    except (ValueError, RecursionError):
        return "is no JSON object of texts"
    if not isinstance(question, dict) or not all(isinstance(value, str) for value in question.values()):
        return "is no JSON object of texts"
    if set(question) not in QUESTIONS:
        return f"has {_names(sorted(question))}: give text, or prompt, or prompt, why, rather_than"
    surrogates = {name: surrogate for name, text in question.items() if (surrogate := surrogate_in(text))}
    if surrogates:
        problems = (f"has half a character, {surrogate}, in its {name}" for name, surrogate in surrogates.items())
        return "; ".join(f"{problem}: write the whole character" for problem in problems)
    return question


def _names(names: Sequence[str]) -> str:
    first_names = ", ".join(repr(name[:40]) for name in names[:5])
    return f"[{first_names}{', ...' if len(names) > 5 else ''}]"


def _first_problems(problems: list[str]) -> list[str]:
    remaining = len(problems) - PRINTED_PROBLEMS
    return problems[:PRINTED_PROBLEMS] + ([f"{remaining:,} more lines are no questions"] if remaining > 0 else [])
