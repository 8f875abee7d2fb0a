"""Hooks of the documentation site: the build fails where a page would fetch something from elsewhere."""

import re

from mkdocs.exceptions import PluginError

ELSEWHERE = re.compile(
    r"""<(?:script|img|iframe|link\b[^>]*rel="stylesheet")[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"""
)


def on_post_page(output, page, config):
    """Return the page unchanged; raise PluginError where it loads a script, a style sheet or a picture by http."""
    if match := ELSEWHERE.search(output):
        raise PluginError(f"{page.file.src_uri} fetches from elsewhere: {match[0]}")
    return output
