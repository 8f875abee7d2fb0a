"""Figures as they are saved, so that a test can look at what is drawn in them."""

from pathlib import Path

from matplotlib.figure import Figure


def kept_figures(monkeypatch):
    """From now on, every figure that is saved, by the name of its file; "in memory" is the last one of no file."""
    kept, save = {}, Figure.savefig

    def saved(figure, file, *arguments, **settings):
        save(figure, file, *arguments, **settings)
        on_disk = isinstance(file, str | Path)
        assert (Path(file).stat().st_size if on_disk else file.tell()) > 0
        kept[Path(file).name if on_disk else "in memory"] = figure

    monkeypatch.setattr(Figure, "savefig", saved)
    return kept
