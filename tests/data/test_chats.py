"""What the assistant said in a chat: the library's ids, its turns alone, and no special token by spelling."""

import numpy as np
import pytest
from support.chat_tokenizers import CHAT, CHATML, FAMILIES, PLAIN, REWRITING, SAID, chat_tokenizer

from prism_lightning.common.errors import UserError
from prism_lightning.data.chats import ChatEncoder
from prism_lightning.data.sources import Document
from prism_lightning.data.tokenizer import encode, encoding_plain_text

KINDS = ["bytes", "first", "always", "prepend"]


def encoded(tokenizer, messages):
    document = Document("text", "chats.jsonl", "chats.jsonl", 6, messages=messages)
    return ChatEncoder(encoding_plain_text(tokenizer)).encode(document)


def said_by(tokenizer, ids, targets):
    """The text of every run of targets."""
    starts = np.flatnonzero(np.diff(targets.astype(int), prepend=0) == 1)
    ends = np.flatnonzero(np.diff(targets.astype(int), append=0) == -1) + 1
    return [tokenizer.decode(ids[start:end].tolist()) for start, end in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_whole_text_and_targets_the_assistants(family, kind):
    ids, targets, said_bytes = encoded(chat_tokenizer(family, kind), CHAT)
    fresh = chat_tokenizer(family, kind)
    assert ids.tolist() == fresh.apply_chat_template(CHAT, return_dict=False)
    end = FAMILIES[family][3]
    if kind == "bytes":
        said = said_by(fresh, ids, targets)
        assert [text.removeprefix(" ") for text in said] == [text + end for text in SAID]
        assert said_bytes == sum(len(text.encode()) for text in SAID) + sum(text.startswith(" ") for text in said)
    numbers = np.flatnonzero(targets)
    assert (np.diff(numbers) > 1).sum() == 1  # two turns
    assert all(
        ids[numbers[at]] == fresh.convert_tokens_to_ids(end) for at in (np.flatnonzero(np.diff(numbers) > 1)[0], -1)
    )


def test_marks_of_the_template_decide_as_in_transformers():
    """The template leaves out thoughts of earlier turns, which prefixes of the chat could not show."""
    thoughts = [m | {"content": "hm</think>" + m["content"]} if m["role"] == "assistant" else m for m in CHAT]
    ids, targets, _ = encoded(chat_tokenizer("marked"), thoughts)
    expected = chat_tokenizer("marked").apply_chat_template(
        thoughts, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids.tolist() == expected["input_ids"]
    assert targets.astype(int).tolist() == expected["assistant_masks"]
    assert said_by(chat_tokenizer("marked"), ids, targets) == [f"{SAID[0]}<|im_end|>", f"hm</think>{SAID[1]}<|im_end|>"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_text_that_spells_a_special_token_stays_text(family, kind):
    tokenizer, special = chat_tokenizer(family, kind), FAMILIES[family][1]
    spelled = [dict(message) for message in CHAT]
    spelled[0]["content"] = f"Is {special[-1]} a token? {special[1]}{special[-1]}"
    spelled[3]["content"] = f"{special[-1]} is {special[0]}"
    ids, targets, said_bytes = encoded(tokenizer, spelled)
    plain_ids, *_ = encoded(chat_tokenizer(family, kind), CHAT)
    numbers = [tokenizer.convert_tokens_to_ids(token) for token in special]
    assert [i for i in ids if i in numbers] == [i for i in plain_ids if i in numbers]
    if kind != "bytes":
        return
    whole = tokenizer.apply_chat_template(spelled, tokenize=False)
    assert tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False) == whole
    end = FAMILIES[family][3]
    said = [SAID[0] + end, spelled[3]["content"] + end]
    assert [text.removeprefix(" ") for text in said_by(tokenizer, ids, targets)] == said
    if family != "mistral":  # whose turns begin with a space
        assert ids[targets][-1 - len(encode(tokenizer, spelled[3]["content"])) : -1].tolist() == encode(
            tokenizer, spelled[3]["content"]
        )
        assert said_bytes == len((SAID[0] + spelled[3]["content"]).encode())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_a_spelled_token_has_the_spaces_that_it_has_without(kind):
    """A token that is no special one in another tokenizer shows what ids the text has."""
    content = "Say <|other|> now"
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    knowing = chat_tokenizer("chatml", kind)
    knowing.add_special_tokens({"additional_special_tokens": ["<|other|>"]})
    expected = chat_tokenizer("chatml", kind).apply_chat_template(chat, return_dict=False)
    assert encoded(knowing, chat)[0].tolist() == expected


def test_roles_and_other_fields_cannot_inject_special_tokens():
    tokenizer = chat_tokenizer()
    ids, *_ = encoded(tokenizer, [{"role": "user<|im_end|>", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert (ids == tokenizer.convert_tokens_to_ids("<|im_end|>")).sum() == 3  # system, user, assistant


def test_a_template_without_special_tokens():
    ids, targets, _ = encoded(chat_tokenizer(template=PLAIN), CHAT)
    assert said_by(chat_tokenizer(), ids, targets) == [f" {text}\n\n" for text in SAID]


def test_a_chat_without_the_assistant_has_no_target():
    _, targets, said_bytes = encoded(chat_tokenizer(), CHAT[:1])
    assert not targets.any() and said_bytes == 0


def test_a_template_that_rewrites_turns_is_refused():
    thoughts = [m | {"content": "hm</think>" + m["content"]} if m["role"] == "assistant" else m for m in CHAT]
    with pytest.raises(UserError, match=r"chats.jsonl:7: .* message 2 in another way .* \{% generation %\}"):
        encoded(chat_tokenizer(template=REWRITING), thoughts)


def test_a_chat_that_the_template_refuses_is_named():
    with pytest.raises(UserError, match=r"chats.jsonl:7: the chat template failed \(roles must alternate"):
        encoded(chat_tokenizer("mistral"), CHAT[1:])


def test_a_tokenizer_without_a_template_is_refused():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="needs a chat template.* give data.chat_template"):
        ChatEncoder(tokenizer)
    tokenizer.chat_template = CHATML
    assert ChatEncoder(tokenizer)
