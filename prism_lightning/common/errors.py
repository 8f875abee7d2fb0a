"""Errors for users: one line that names the problem and the fix, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """A problem that the user can fix. Several problems may be given; each is printed on a line of its own."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [visible(problem) for problem in ([problems] if isinstance(problems, str) else problems)]
        super().__init__("\n".join(self.problems))


def visible(text: str, keep: str = "") -> str:
    """Return text that is safe to print: control characters, which could steer a terminal, are escaped.

    Args:
        text: to print.
        keep: control characters that are left unchanged.
    """
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the closest known name, or all of them if there are at most 20."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    return f"known are {', '.join(known)}" if 0 < len(known) <= 20 else "see --help"


def causes(error: BaseException | None) -> list[BaseException]:
    """Return an error and all its causes: libraries wrap our errors in theirs, or fail again while they clean up."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def user_error_in(error: BaseException) -> UserError | None:
    """Return the UserError for an error: one among its causes, or one for a full disk; None for other errors."""
    for cause in causes(error):
        if isinstance(cause, UserError):
            return cause
    if disk_is_full(error):
        return UserError("the disk is full: free space and run the same command; earlier checkpoints are whole")
    return None


def disk_is_full(error: BaseException) -> bool:
    """Return whether a write failed for lack of space or quota; databases report this in words only."""
    return any(
        (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
        or "disk is full" in str(cause)
        for cause in causes(error)
    )
