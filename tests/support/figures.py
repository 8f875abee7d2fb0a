"""Figures as they are saved, so that a test can look at what is drawn in them."""

from pathlib import Path

from matplotlib.figure import Figure


def kept_figures(monkeypatch):
    """From now on, every figure that is saved, by the name of its file."""
    kept, save = {}, Figure.savefig

    def saved(figure, file, *arguments, **settings):
        save(figure, file, *arguments, **settings)
        if isinstance(file, str | Path):
            assert Path(file).stat().st_size > 0
            kept[Path(file).name] = figure

    monkeypatch.setattr(Figure, "savefig", saved)
    return kept
