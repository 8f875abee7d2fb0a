"""Output to a stream whose encoding lacks some characters has substitutes."""

import io
import sys

from prism_lightning import __version__
from prism_lightning.cli.main import main
from prism_lightning.common.streams import SUBSTITUTES, tolerate_any_character


def printed(monkeypatch, encoding, action):
    """What an action prints where stdout has that encoding, as PYTHONIOENCODING sets it."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        action()
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def test_characters_that_a_stream_lacks_have_substitutes(monkeypatch):
    def action():
        tolerate_any_character()
        print("├█ “a”… ⏎ 你 \ud800 é")

    assert printed(monkeypatch, "ascii", action) == '?# "a". / ? ? ?\n'
    assert printed(monkeypatch, "latin-1", action) == '?# "a". / ? ? é\n'
    assert printed(monkeypatch, "utf-8", action) == "├█ “a”… ⏎ 你 ? é\n"
    assert all(len(substitute) == 1 and substitute.isascii() for substitute in SUBSTITUTES.values())


def test_the_command_line_tolerates_any_character(monkeypatch):
    def action():
        assert main(["--version"]) == 0
        print("█")

    assert printed(monkeypatch, "ascii", action) == f"prism_lightning {__version__}\n#\n"
