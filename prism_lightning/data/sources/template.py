"""Jinja templates of strangers: compiled for a sandbox."""

from __future__ import annotations

from typing import NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prism_lightning.common.errors import UserError


class _ReportedWhenPrinted(jinja2.Undefined):
    """A name that is not there: false in a test, as templates of models expect, but an error in the text."""

    def __str__(self) -> str:
        raise jinja2.UndefinedError(self._undefined_message)


def compiled(template: str) -> jinja2.Template:
    """A template that can neither reach Python's internals nor change its arguments.

    Raises:
        UserError: it is no Jinja.
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
