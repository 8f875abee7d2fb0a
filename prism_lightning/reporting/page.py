"""A report as Markdown and as one self-contained HTML page. Text from runs is escaped in both."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

from prism_lightning.common.markdown import escaped
from prism_lightning.common.markdown import table as markdown_table
from prism_lightning.reporting.tables import Table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #888; }
td.text { text-align: left; white-space: normal; }
tr:hover td { background: #f4f4f4; } p.note { color: #555; font-size: .85rem; max-width: 60rem; }
svg { max-width: 100%; height: auto; } pre { background: #f6f6f6; padding: .6rem; overflow-x: auto; font-size: .8rem; }
@media (prefers-color-scheme: dark) {
  body { background: #1b1b1b; color: #ddd; } th, td { border-color: #444; } tr:hover td { background: #262626; }
  pre { background: #262626; } p.note { color: #aaa; } figure { background: #fff; }
}
"""


@dataclass
class Report:
    """What a report shows, in order.

    Attributes:
        title, head: its name, and a paragraph on where and when it was made.
        tables: see `Table`; one without rows only says what fills it.
        figures: SVG files and what they show.
    """

    title: str
    head: str
    tables: list[Table]
    figures: list[tuple[Path, str]]


def write(report: Report, folder: Path) -> list[Path]:
    """report.md and report.html in a folder that exists."""
    paths = [folder / "report.md", folder / "report.html"]
    paths[0].write_text(markdown(report))
    paths[1].write_text(page(report))
    return paths


def markdown(report: Report) -> str:
    """The report as Markdown, figures as links."""
    sections = [f"# {escaped(report.title)}", escaped(report.head)]
    for table in report.tables:
        sections.append(f"## {escaped(table.title)}")
        if table.rows:
            sections.append(markdown_table(table.columns, table.rows))
        if table.note:
            sections.append(escaped(table.note))
        if table.missing:
            sections.append("Missing; to fill it:\n\n```bash\n" + "\n".join(table.missing) + "\n```")
    sections += [f"![{escaped(caption)}]({path.name})" for path, caption in report.figures]
    return "\n\n".join(sections) + "\n"


def page(report: Report) -> str:
    """The report as one HTML page without scripts, figures inside."""
    parts = [f"<h1>{html.escape(report.title)}</h1>", f"<p>{html.escape(report.head)}</p>"]
    for table in report.tables:
        parts.append(f"<h2>{html.escape(table.title)}</h2>")
        if table.rows:
            parts.append(_table(table))
        if table.note:
            parts.append(f'<p class="note">{html.escape(table.note)}</p>')
        if table.missing:
            commands = html.escape("\n".join(table.missing))
            parts.append(f'<p class="note">Missing; to fill it:</p><pre>{commands}</pre>')
    for path, caption in report.figures:
        text = html.escape(caption)
        parts.append(f"<h2>{text}</h2><figure role='img' aria-label='{text}'>{path.read_text()}</figure>")
    head = f"<meta charset='utf-8'><title>{html.escape(report.title)}</title><style>{STYLE}</style>"
    head += "<meta name='viewport' content='width=device-width'>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _table(table: Table) -> str:
    heads = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = ""
    for row in table.rows:
        cells = "".join(f"<td{' class=text' if len(cell) > 30 else ''}>{html.escape(cell)}</td>" for cell in row)
        rows += f"<tr>{cells}</tr>"
    return f"<div class='scroll'><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
