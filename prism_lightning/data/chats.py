"""Chats rendered by a tokenizer's template, and which of their tokens the assistant said.

Special tokens of the template are special tokens. Text in a message that spells one is plain text: it is replaced by a
placeholder before the template sees it, and restored when the text around it is encoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from prism_lightning.common.errors import UserError
from prism_lightning.data.pieces import context_before
from prism_lightning.data.sources import Document, place_of

Message = dict[str, Any]
Span = tuple[int, int]  # first character and the one after the last
# Templates may mark the assistant's text by this pair of tags.
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
PRIVATE_CHARACTERS = range(0xE000, 0xF900)  # No text means anything by them; one that a chat lacks marks placeholders.


class Rendering(NamedTuple):
    """A rendered chat.

    Attributes:
        text: with placeholders where a message spells a special token.
        spans: what the assistant said, the end markers of its turns included.
        placeholder: matches a placeholder, whose group 1 is a number of `spellings`.
        spellings: the texts that the placeholders stand for.
    """

    text: str
    spans: list[Span]
    placeholder: re.Pattern[str]
    spellings: list[str]

    def restored(self, start: int, end: int) -> str:
        """Return a part of the text, with spellings in place of their placeholders."""
        return self.placeholder.sub(lambda match: self.spellings[int(match[1])], self.text[start:end])


class ChatEncoder:
    """Encodes chats for one tokenizer.

    Args:
        tokenizer: has the template.

    Raises:
        UserError: it has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.backend = tokenizer, tokenizer.backend_tokenizer
        try:
            self.template: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(
                "data.messages_column needs a chat template, which this tokenizer does not have: give"
                " data.chat_template, or a data.tokenizer with a template"
            ) from error
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = {number for number, token in added.items() if token.special}
        names = sorted((added[number].content for number in self.special_ids), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, names)) or "(?!)")
        # Whether every text between special tokens gets a space in front, or only one at the very beginning.
        self.spaces_all_runs = not names or self._encode(names[0] + "a", special=True)[0][1:] == self._encode("a")[0]

    def encode(self, document: Document) -> tuple[np.ndarray, np.ndarray, int]:
        """Return the ids of a chat, whether each is a target, and the bytes of the assistant's text.

        The ids are those of the whole rendered text, unless a message spells a special token. A token that is partly
        the assistant's is a target.

        Raises:
            UserError: the template fails, or changes what it has written for a turn when others follow.
        """
        assert document.messages is not None
        rendering = self._rendered(document.messages, place_of(document.name, document.row))
        ids, offsets = self._encode(rendering.text, special=True)
        spans = rendering.spans
        if rendering.placeholder.search(rendering.text):
            ids, targets = self._encode_runs(rendering, ids, offsets)
        else:
            targets = [_overlaps(place, spans) for place in offsets]
        said = (self.special.sub("", rendering.text[start:end]) for start, end in spans)
        said_bytes = sum(len(rendering._replace(text=text).restored(0, len(text)).encode()) for text in said)
        return np.array(ids, np.uint32), np.array(targets, bool), said_bytes

    def _encode(self, text: str, special: bool = False) -> tuple[list[int], list[Span]]:
        """Return the ids of a text and the characters of each.

        Args:
            text: that is encoded.
            special: whether text that spells a special token is that token.
        """
        self.backend.encode_special_tokens = not special
        try:
            encoding = self.backend.encode(text, add_special_tokens=False)
        finally:
            self.backend.encode_special_tokens = True  # as everywhere else
        return encoding.ids, encoding.offsets

    def _encode_runs(self, rendering: Rendering, ids: list[int], offsets: list[Span]) -> tuple[list[int], list[bool]]:
        """Return ids and targets of a rendering in which runs between special tokens have placeholders."""
        new_ids: list[int] = []
        targets: list[bool] = []
        for first, last, place in self._runs(len(rendering.text), ids, offsets):
            if not rendering.placeholder.search(rendering.text, *place):
                new_ids += ids[first:last]
                targets += [_overlaps(offset, rendering.spans) for offset in offsets[first:last]]
                continue
            start, end = place
            bounds = [(min(max(a, start), end), min(max(b, start), end)) for a, b in rendering.spans]
            spans = [(len(rendering.restored(start, a)), len(rendering.restored(start, b))) for a, b in bounds]
            run_ids, run_offsets = self._encode_run(rendering.restored(start, end), first == 0)
            new_ids += run_ids
            targets += [_overlaps(offset, spans) for offset in run_offsets]
        return new_ids, targets

    def _runs(self, length: int, ids: list[int], offsets: list[Span]) -> Iterator[tuple[int, int, Span]]:
        """Yield first token, token after the last, and characters of every special token and every run between them."""
        first, start = 0, 0
        for number, (token, (begin, end)) in enumerate(zip(ids, offsets, strict=True)):
            if token in self.special_ids:
                if begin > start:
                    yield first, number, (start, begin)
                yield number, number + 1, (begin, end)
                first, start = number + 1, end
        if start < length:
            yield first, len(ids), (start, length)

    def _encode_run(self, text: str, at_start: bool) -> tuple[list[int], list[Span]]:
        """Encode text between two special tokens as plain text, with the spaces that the tokenizer puts there."""
        if at_start or self.spaces_all_runs:
            return self._encode(text)
        context = context_before(text)
        dropped = len(self._encode(context)[0])
        ids, offsets = self._encode(context + text)
        return ids[dropped:], [(a - len(context), b - len(context)) for a, b in offsets[dropped:]]

    def _rendered(self, messages: list[Message], where: str) -> Rendering:
        spellings: list[str] = []
        content = json.dumps(messages, ensure_ascii=False, default=str)
        mark = next(char for char in map(chr, PRIVATE_CHARACTERS) if char not in content)

        def placeholder(match: re.Match[str]) -> str:
            spellings.append(match[0])
            return f"{mark}{len(spellings) - 1}{mark}"

        messages = _replaced(messages, lambda text: self.special.sub(placeholder, text))
        try:
            text, spans = self._with_spans(messages, where)
        except UserError:
            raise
        except Exception as error:  # A template can fail in any way.
            cause = " ".join(str(error).split())[:200]
            raise UserError(
                f"{where}: the chat template failed ({cause}): correct the row, or give another data.chat_template"
            ) from error
        return Rendering(text, spans, re.compile(f"{mark}(\\d+){mark}"), spellings)

    def _with_spans(self, messages: list[Message], where: str) -> tuple[str, list[Span]]:
        """Return the rendered chat and the assistant's parts of it."""
        if GENERATION_TAG.search(self.template):
            texts, spans_of_texts = self._render(messages, return_assistant_tokens_mask=True)
            return texts[0], [span for span in spans_of_texts[0] if span[0] < span[1]]
        whole = self._render(messages)[0][0]
        spans: list[Span] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], add_generation_prompt=True)[0][0]
            after = self._render(messages[: number + 1])[0][0]
            if not (after.startswith(before) and whole.startswith(after)):
                raise UserError(
                    f"{where}: the chat template writes message {number + 1} in another way when others follow, so what"
                    " the assistant said is unknown: give data.chat_template that marks it by"
                    " {% generation %} and {% endgeneration %}"
                )
            spans.append((len(before), self._end_of_turn(whole, len(before), len(after))))
        return whole, spans

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        """Return where a turn ends: after its last special token, if only space follows, which nobody generates."""
        last = max((match.end() for match in self.special.finditer(text, start, end)), default=start)
        return last if last > start and not text[last:end].strip() else end

    def _render(self, messages: list[Message], **options: Any) -> tuple[list[str], list[list[Span]]]:
        options |= self.tokenizer.special_tokens_map
        rendered: Any = render_jinja_template([messages], chat_template=self.template, **options)
        return rendered


def _overlaps(place: Span, spans: list[Span]) -> bool:
    """Return whether a token has a character in one of the spans; one without characters, whether it stands in one."""
    start, end = place
    return any(start < b and a < max(end, start + 1) for a, b in spans if a < b)


def _replaced(value: Any, change: Any) -> Any:
    """Return a JSON value with every text in it changed, but not the names of fields."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: _replaced(item, change) for name, item in value.items()}
    return [_replaced(item, change) for item in value] if isinstance(value, list | tuple) else value
