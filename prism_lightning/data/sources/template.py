"""Untrusted Jinja templates, compiled for a sandbox."""

from __future__ import annotations

from typing import NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prism_lightning.common.errors import UserError


class _ReportedWhenPrinted(jinja2.Undefined):
    """A missing name: false in a condition, as templates of models expect, but an error when it is printed."""

    def __str__(self) -> str:
        raise jinja2.UndefinedError(self._undefined_message)


def compiled(template: str) -> jinja2.Template:
    """Return a compiled template that can neither reach Python's internals nor change its arguments.

    Raises:
        UserError: the template is not valid Jinja.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=_ReportedWhenPrinted,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.globals["raise_exception"] = _raise
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"data.chat_template, line {error.lineno}: {error.message}: correct it") from error


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
