"""Flags with a new name: the old name works for one version, with a note."""

from __future__ import annotations

import sys


def replace_renamed_flags(arguments: list[str], new_names: dict[str, str]) -> list[str]:
    """Return the arguments with old flags replaced by new ones; print a note on stderr for each.

    Args:
        arguments: A verb's arguments, with `--flag value` or `--flag=value`.
        new_names: New flag by old flag, such as {"--fall": "--min_rate_reduction"}.
    """
    replaced = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        new = new_names.get(flag)
        if new:
            print(f"note: {flag} is now {new}; the old name works until the next version", file=sys.stderr)
        replaced.append(new + equals + value if new else argument)
    return replaced
