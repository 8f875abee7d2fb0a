"""Write a report as Markdown and as one self-contained HTML page. Text from runs is escaped in both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from prism_lightning.common import markdown
from prism_lightning.reporting.tables import Table

TEMPLATES = Path(__file__).with_name("templates")


@dataclass
class Report:
    """The content of a report, in order.

    Attributes:
        title: Heading of the report.
        head: Paragraph on the number of runs and the date.
        tables: Tables to show; of one without rows, only its note and the missing commands appear.
        figures: SVG files with their captions.
    """

    title: str
    head: str
    tables: list[Table]
    figures: list[tuple[Path, str]]


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write report.md and report.html into an existing folder and return their paths."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name == "report.html",  # Markdown has other special characters: see `escaped`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"escaped": markdown.escaped, "markdown_table": markdown.table}
    paths = []
    for name in ("report.md", "report.html"):
        paths.append(folder / name)
        paths[-1].write_text(environment.get_template(name).render(report=report).rstrip() + "\n")
    return paths
