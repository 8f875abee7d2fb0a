"""Output on terminals and in files that do not take every character."""

from __future__ import annotations

import codecs
import sys

# One character for one, so that columns stay where they are.
STAND_INS = {"█": "#", "…": ".", "“": '"', "”": '"', "⏎": "/", "±": "~", "Σ": "S", "¦": "|", "│": "|", "─": "-"}


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    """An error handler for encoding: a stand-in of ours, otherwise a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(STAND_INS.get(c, "?") for c in error.object[error.start : error.end]), error.end


codecs.register_error("stand_in", _stand_in)


def tolerate_any_character() -> None:
    """Have stdout and stderr show a stand-in for a character that their encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="stand_in")
