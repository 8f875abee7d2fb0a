"""Plot the exact split of logits: one bar per token, stacked from its prototypes' contributions and the residual.

python examples/plot_contributions.py --ckpt_path runs/quickstart --text "def __init__(self, name):" --out figure.svg
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from prism_lightning.inspection.explain import ExplainedToken, explain_text
from prism_lightning.run.model_folder import load_exported

RESIDUAL, POSITIVE, NEGATIVE = "#c9ced6", ("#24508c", "#4678b8", "#7ba3d4", "#aecbea"), "#d98a76"
CHARACTER_WIDTH = 0.13  # logits; a label is left out where its bar is narrower


def segments(token: ExplainedToken) -> list[tuple[float, str, str]]:
    """Return width, colour and label of a token's bar: its prototypes, strongest first, and the residual."""
    parts = []
    for rank, prototype in enumerate(token.prototypes):
        width = prototype["contribution"]
        colour = POSITIVE[min(rank, len(POSITIVE) - 1)] if width > 0 else NEGATIVE
        parts.append((width, colour, str(prototype["id"])))
    return [*parts, (token.residual, RESIDUAL, "residual")]


def figure_of(tokens: list[ExplainedToken]) -> Figure:
    """Return the figure: positive terms are stacked to the right of zero, negative ones to the left."""
    figure = Figure(figsize=(8, 0.45 * len(tokens) + 1.1), layout="constrained")
    axes = figure.subplots()
    for row, token in enumerate(tokens):
        ends = {True: 0.0, False: 0.0}
        for width, colour, label in segments(token):
            left = ends[width > 0]
            axes.barh(row, width, left=left, color=colour, edgecolor="white", height=0.72)
            ends[width > 0] += width
            if abs(width) >= CHARACTER_WIDTH * len(label):
                dark = colour in POSITIVE[:2]
                middle = left + width / 2
                axes.text(
                    middle, row, label, ha="center", va="center", fontsize=6.5, color="white" if dark else "black"
                )
        axes.plot([token.logit] * 2, [row - 0.42, row + 0.42], color="black", linewidth=1.6)
        note = f"{math.exp(token.log_probability):.0%}"
        axes.text(ends[True] + 0.15, row, note, va="center", fontsize=8, color="#444444")
    axes.set_yticks(range(len(tokens)), [repr(token.token)[1:-1] for token in tokens], family="monospace")
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("terms of the token's logit (blue: prototypes; grey: residual; black mark: their sum, the logit)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Read the command line and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", type=Path, required=True, help="run directory of a finished PRISM run")
    parser.add_argument("--text", default="def __init__(self, name):", help="text whose tokens are explained")
    parser.add_argument("--out", type=Path, required=True, help="figure to write; the suffix names the format")
    arguments = parser.parse_args()
    model, tokenizer = load_exported(arguments.ckpt_path)
    matplotlib.rcParams["svg.hashsalt"] = "prism"  # the same figure gives the same bytes
    figure = figure_of(explain_text(model, tokenizer, arguments.text))
    figure.savefig(arguments.out, metadata={"Date": None} if arguments.out.suffix == ".svg" else None, dpi=150)


if __name__ == "__main__":
    main()
