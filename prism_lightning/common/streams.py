"""Output to terminals and files whose encoding lacks some characters."""

from __future__ import annotations

import codecs
import sys

# Each substitute is one character, so that columns stay aligned.
SUBSTITUTES = {"█": "#", "…": ".", "“": '"', "”": '"', "⏎": "/", "±": "~", "Σ": "S", "¦": "|", "│": "|", "─": "-"}


def _substitute(error: UnicodeError) -> tuple[str, int]:
    """Handle an encoding error: replace a character by its substitute, or by a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(SUBSTITUTES.get(c, "?") for c in error.object[error.start : error.end]), error.end


codecs.register_error("substitute", _substitute)


def tolerate_any_character() -> None:
    """Make stdout and stderr print a substitute for a character that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="substitute")
