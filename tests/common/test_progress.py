"""Progress without a terminal: a line with the time left at least every ten seconds, on stderr alone."""

import re
import time

import pytest

from prism_lightning.common import progress as module
from prism_lightning.common.progress import PhaseProgress, TokenCountStreamer


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(module, "LINE_SECONDS", 0.2)


def test_lines_come_while_one_step_takes_long(capsys):
    with PhaseProgress() as progress:
        progress("indexing", 1, 4)
        time.sleep(0.7)
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) in (2, 3)
    assert all(re.fullmatch(r"indexing 1/4  \d+ s, \d+ s left", line) for line in err.splitlines())


def test_short_work_prints_nothing(capsys):
    with PhaseProgress() as progress:
        progress("indexing", 4, 4)
    assert capsys.readouterr() == ("", "")


def test_the_time_left_is_of_the_phase(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    progress = PhaseProgress()
    progress("first", 0, 10)
    assert progress.line() == "first 0/10  0 s, time left unknown"
    clock[0] = 100.0
    progress("second", 0, 1_000)
    clock[0] = 104.0
    progress("second", 200, 1_000)
    assert progress.line() == "second 200/1,000  4 s, 16 s left"


def test_generated_tokens_are_counted_without_the_prompt():
    calls = []
    streamer = TokenCountStreamer(lambda *call: calls.append(call), 3)
    for _ in range(3):
        streamer.put(None)
    streamer.end()
    assert calls == [("generating", 0, 3), ("generating", 1, 3), ("generating", 2, 3)]
