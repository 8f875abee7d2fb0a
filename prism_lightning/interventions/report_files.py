"""Files that `suppress` and `calibrate` write beside an intervention."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from prism_lightning.common.files import write_json, write_whole
from prism_lightning.interventions.intervention import FORMAT
from prism_lightning.run.environment import environment


def write_report(path: Path, details: dict[str, Any], report: str, figure: Figure) -> None:
    """Write all numbers, the plot and the report beside an intervention.

    Args:
        path: File of the intervention, NAME.json.
        details: All numbers, for NAME.details.json.
        report: Markdown, for NAME.md.
        figure: The plot, for NAME.png and NAME.svg.
    """
    write_json(path.with_suffix(".details.json"), {"format": FORMAT} | details | {"environment": environment()})
    for suffix in (".png", ".svg"):
        image = io.BytesIO()
        figure.savefig(image, dpi=150, format=suffix[1:])
        write_whole(path.with_suffix(suffix), image.getvalue())
    write_whole(path.with_suffix(".md"), report.encode())
    for partial in path.parent.glob(f"{path.stem}.*.partial"):  # left by processes that were killed
        partial.unlink(missing_ok=True)
