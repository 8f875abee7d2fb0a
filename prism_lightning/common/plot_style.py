"""Colours, font sizes and figures of all charts of the package and its benchmarks.

The colours are Paul Tol's "muted" scheme (https://sronpersonalpages.nl/~pault), which people with red-green or
blue-yellow colour blindness can tell apart. Each role below has one colour in every chart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DENSE = "#555555"  # dense models and their heads
PRISM = "#332288"  # PRISM models
PROTOTYPES = PRISM  # prototypes of a PRISM model, and interventions on them
PROTOTYPES_ALTERNATIVE = "#88ccee"  # a second way to use the same prototypes
RIVALS = ("#cc6677", "#44aa99", "#882255", "#999933", "#aa4499", "#117733", "#bbbbbb")  # methods to compare with
SERIES = (PRISM, PROTOTYPES_ALTERNATIVE, *RIVALS)  # variants of PRISM models or of their prototypes, in this order
RANDOM_CONTROL = "#ddcc77"  # random prototypes, random scores, permuted labels
UNCHANGED_MODEL = "#000000"  # a model without the intervention that a chart is about
OTHER = "#661100"  # what has no colour of its own
GOAL_LINE = "#999999"  # goals, and reference levels such as chance and zero

LABEL_FONT_SIZE = 7  # labels beside points and bars
LEGEND_FONT_SIZE = 8  # legends, and tick labels that are long names


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure with constrained layout; sizes are in inches.

    The figure does not go through pyplot, so it needs no display and no closing.
    """
    from matplotlib.figure import Figure  # takes 0.4 s, which commands without charts need not spend

    return Figure(figsize=(width, height), layout="constrained")
