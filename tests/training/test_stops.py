"""SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint, print one true line and exit with the code that a shell reports."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from support.processes import fit, run, start
from support.runs import in_run

from prism_lightning.cli.main import main, stop_line
from prism_lightning.common.stops import Stopped, StopRequest, defer_stops, stop_signals_raise

LONG = ["--trainer.logger", "false", "--trainer.max_steps", "44", "--run.checkpoint_interval", "50"]
LONG += ["--trainer.val_check_interval", "20", "--data.validation_blocks", "120"]


def stopped_fit(arguments, line, number):
    """Run fit until it prints a line, and send it a signal; returns exit code and stderr."""
    child = start("fit", *arguments)
    child.wait_for(line)
    child.send_signal(number)
    return child.wait(), child.stderr


def test_signals_save_a_checkpoint_and_the_resumed_weights_are_bit_equal(tiny, tmp_path):
    """The last signal comes during a validation: the process stops before its end, and the resumed run is the same."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    fit(in_run(tiny, whole, *LONG))
    moments = [("step 10/", signal.SIGTERM, 143), ("step 30/", signal.SIGUSR1, 138), ("step 40/", signal.SIGINT, 130)]
    for line, number, code in moments:
        returned, errors = stopped_fit(in_run(tiny, stopped, *LONG), line, number)
        assert returned == code and "Traceback" not in errors
        newest = max((stopped / "checkpoints").glob("step-*.ckpt")).stem.removeprefix("step-").lstrip("0")
        assert int(newest) >= int(line.split()[1].rstrip("/"))
        saved = f"stopped by {number.name}: the checkpoint of step {newest} is saved"
        assert errors.strip().splitlines()[-1] == f"{saved}; run the same command again to resume there"
    assert "resuming from" in fit(in_run(tiny, stopped, *LONG))
    expected, resumed = (load_file(folder / "model" / "model.safetensors") for folder in (whole, stopped))
    assert [name for name in expected if not torch.equal(expected[name], resumed[name])] == []


def test_a_signal_to_the_whole_group_does_not_kill_the_loaders_workers(tiny, tmp_path):
    """A terminal's Ctrl-C and a scheduler's SIGTERM go to the trainer and to its children."""
    child = start("fit", *in_run(tiny, tmp_path / "run", *LONG), "--data.num_workers", "1", before=os.setsid)
    child.wait_for("step 10/")
    os.killpg(child.pid, signal.SIGTERM)
    assert child.wait() == 143 and "is saved; run the same command again to resume there" in child.stderr
    assert "Traceback" not in child.stderr and list((tmp_path / "run" / "checkpoints").glob("step-*.ckpt"))


def test_a_signal_raises_at_once_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals_raise(), pytest.raises(Stopped) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) is before


def test_a_deferred_signal_is_noted_and_a_late_second_one_raises(monkeypatch):
    request = StopRequest()
    with stop_signals_raise():
        defer_stops(request)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # as a terminal and a parent send it: counted once
        assert request.signal == signal.SIGINT
        monkeypatch.setattr("prism_lightning.common.stops.SECOND_SIGNAL_SECONDS", -1.0)
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with stop_signals_raise():
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_line_is_true_for_verbs_that_keep_nothing(monkeypatch, capsys):
    assert stop_line("generate", Stopped(signal.SIGTERM)) == "stopped by SIGTERM"
    line = stop_line("index", Stopped(signal.SIGINT))
    assert line.endswith("finished work is kept; run the same command again to resume")

    def interrupted(arguments):
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr("prism_lightning.cli.models.generate", interrupted)
    assert main(["generate"]) == 138
    assert capsys.readouterr().err == "stopped by SIGUSR1\n"


def stop_itself(*_):
    """Replaces a function: a scheduler's signal comes while it runs."""
    os.kill(os.getpid(), signal.SIGTERM)


def train_no_tokenizer():
    from prism_lightning.data import preparation as prepare

    prepare.train_tokenizer = stop_itself


def test_a_stop_while_the_tokenizer_trains_leaves_nothing_half_done(tiny, tmp_path):
    """The signal comes while data are prepared: there is no run directory yet, and no folder in the cache."""
    result = run("fit", *tiny, "--data.cache_dir", tmp_path / "cache", before=train_no_tokenizer)
    assert result.returncode == 143 and "stopped by SIGTERM" in result.stderr
    assert not (tmp_path / "run").exists()
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
