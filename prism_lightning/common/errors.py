"""Errors meant for the person at the keyboard: one line that names the thing and the fix, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Something the user can mend. Several problems may be given at once; each is printed on a line of its own."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [visible(one) for one in ([problems] if isinstance(problems, str) else problems)]
        super().__init__("\n".join(self.problems))


def visible(text: str, keep: str = "") -> str:
    """Text that is safe to show: control characters, which could steer a terminal, written out, except those kept."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known: the closest known one, or all of them when they are few."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    return f"known are {', '.join(known)}" if 0 < len(known) <= 20 else "see --help"


def causes(error: BaseException | None) -> list[BaseException]:
    """An error and all that led to it: libraries wrap ours in their own, or fail again while they clean up."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def user_error_in(error: BaseException) -> UserError | None:
    """What the user can mend about an error: a UserError among its causes, or a full disk."""
    for cause in causes(error):
        if isinstance(cause, UserError):
            return cause
    if disk_is_full(error):
        return UserError("the disk is full: free space and run the same command; earlier checkpoints are whole")
    return None


def disk_is_full(error: BaseException) -> bool:
    """Whether a write failed for want of space or quota; a database says so in words only."""
    return any(
        (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
        or "disk is full" in str(cause)
        for cause in causes(error)
    )
