"""The figure of the README: its bars add up to the logits, and the script writes the same bytes each time."""

import sys

import pytest
from support.runs import ROOT

sys.path.insert(0, str(ROOT / "examples"))
from plot_contributions import figure_of, main, segments

from prism_lightning.inspection.explain import explain_text
from prism_lightning.run.model_folder import load_exported

TEXT = "def name(self):"


@pytest.fixture(scope="module")
def tokens(finished_run):
    return explain_text(*load_exported(finished_run[0]), TEXT)


def test_a_bar_has_a_segment_for_each_active_prototype_and_the_residual(tokens):
    for token in tokens:
        widths = [width for width, _, _ in segments(token)]
        assert len(widths) == 5 and sum(widths) == pytest.approx(token.logit, abs=1e-3)


def test_the_figure_draws_every_segment_once_and_stacks_by_sign(tokens):
    axes = figure_of(tokens).axes[0]
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert len(bars) == 5 * len(tokens)
    for row, token in enumerate(tokens):
        own = [(left, width) for middle, left, width in bars if middle == pytest.approx(row)]
        assert sum(width for _, width in own) == pytest.approx(token.logit, abs=1e-3)
        positive = sum(width for _, width in own if width > 0)
        ends = [left + width for left, width in own]
        assert max([0, *ends]) == pytest.approx(positive) and all(left >= 0 for left, width in own if width > 0)


def test_the_script_writes_the_same_bytes_each_time(finished_run, tmp_path, monkeypatch):
    written = []
    for name in ("a.svg", "b.svg"):
        options = ["--ckpt_path", str(finished_run[0]), "--text", TEXT, "--out", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["plot_contributions.py", *options])
        main()
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1] and written[0].lstrip().startswith(b"<?xml")
