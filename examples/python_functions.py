"""Write short functions of the running Python's standard library as JSON Lines, one in each line.

python examples/python_functions.py functions.jsonl
"""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
import textwrap
from pathlib import Path

PACKAGES, LONGEST = ("asyncio", "email", "http", "logging"), 1000  # characters


def write_functions(path: Path) -> int:
    """Write a row with `text` and `module` for every short function and method; return the number of rows."""
    library = Path(sysconfig.get_paths()["stdlib"])
    rows = []
    for package in PACKAGES:
        for file in sorted((library / package).rglob("*.py")):
            source = file.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    text = textwrap.dedent(ast.get_source_segment(source, node, padded=True) or "")
                    if len(text) <= LONGEST:
                        rows.append({"text": text, "module": file.relative_to(library).as_posix()})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


if __name__ == "__main__":
    print(write_functions(Path(sys.argv[1])), "rows")
