"""Chat messages rendered as one text by a Jinja template."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_lightning.common.errors import UserError
from prism_lightning.data.sources.source import RecordError

if TYPE_CHECKING:
    from jinja2 import Template

DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content or '' }}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Chat:
    """Renders lists of messages, each an object with role and content.

    Templates of Hugging Face tokenizers work. They get empty special tokens, since these would be encoded as text.

    Args:
        template: Jinja template that uses `messages`; None for "role: content" with a blank line between messages.

    Raises:
        UserError: the template is not valid Jinja.
    """

    template: str | None = None

    @classmethod
    def of(cls, setting: str | None) -> Chat:
        """Return the renderer of a setting: None, a template, or the name of a file with one, which has no braces.

        Raises:
            UserError: the file cannot be read; the template is not valid Jinja.
        """
        return cls(template_of(setting))

    def __post_init__(self) -> None:
        if self.template is not None:
            _ = self._compiled  # Reports a mistake before anything is read.

    @cached_property
    def _compiled(self) -> Template:
        from prism_lightning.data.sources.template import compiled  # jinja2 takes 80 ms to import

        return compiled(DEFAULT_TEMPLATE if self.template is None else self.template)

    def render(self, messages: list[dict[str, Any]], where: str) -> str:
        """Return the text of a chat.

        Args:
            messages: of one row.
            where: place of the row, for error messages.

        Raises:
            RecordError: the default template cannot render the content; the template fails.
        """
        content_is_text = all(isinstance(message["content"], str | None) for message in messages)
        if self.template is None and not content_is_text:
            raise RecordError(where, "the content of a chat message is not text: give data.chat_template that reads it")
        try:
            return self._compiled.render(
                messages=messages, add_generation_prompt=False, bos_token="", eos_token="", tools=None, documents=None
            )
        except Exception as error:  # A template can fail in any way.
            cause = " ".join(str(error).split())[:200]
            raise RecordError(where, f"data.chat_template failed ({cause}): correct the template or the row") from error


def template_of(setting: str | None) -> str | None:
    """Return the template of a setting: None, a template, or the name of a file with one, which has no braces.

    Raises:
        UserError: the file cannot be read.
    """
    if setting is None or "{" in setting:
        return setting
    try:
        return Path(setting).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problem = "is neither a Jinja template nor a file of UTF-8 text"
        raise UserError(f"data.chat_template {setting} {problem}: give one of them") from error


def is_chat(value: Any) -> bool:
    """Return whether a value is a list of chat messages."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value)
    )
