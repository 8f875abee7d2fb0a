"""Small fine-tuning data: prompts with completions, and chats, as files and as open corpora."""

import json

from prism_lightning.lightning_modules.text_data import TextData
from support.chat_tokenizers import chat_tokenizer

COLUMNS = {"prompt_column": "ask.text", "completion_column": "answer"}


def completion_rows(count=120):
    """Questions of different lengths with answers of different lengths; every tenth has no question."""
    return [
        {
            "ask": {"text": "" if number % 10 == 9 else f"What is {number} plus {number % 7}? " * (1 + number % 3)},
            "answer": f"It is {number + number % 7}." + " Yes!" * (number % 5),
        }
        for number in range(count)
    ]


def chat_rows(count=120):
    """Chats of one or two turns."""
    rows = []
    for number in range(count):
        messages = [
            {"role": "user", "content": f"What is {number} times 3?"},
            {"role": "assistant", "content": f"It is {3 * number}."},
        ]
        if number % 2:
            messages += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes, I am."}]
        rows.append({"chat": messages})
    return rows


def write_rows(path, rows):
    """Write rows as JSON Lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def completion_data(folder, rows=None, **settings):
    """Prompts and completions as open data in blocks of 32 tokens."""
    path = write_rows(folder / "rows.jsonl", completion_rows() if rows is None else rows)
    defaults = {"vocab_size": 300, "block_size": 32, "validation_fraction": 0.2, "cache_dir": str(folder / "cache")}
    data = TextData(path=str(path), **(defaults | COLUMNS | settings))
    data.setup()
    return data


def chat_data(folder, rows=None, family="chatml", **settings):
    """Chats as open data in blocks of 32 tokens, with the tokenizer of a family."""
    path = write_rows(folder / "chats.jsonl", chat_rows() if rows is None else rows)
    chat_tokenizer(family).save_pretrained(folder / "tokenizer")
    defaults = {"tokenizer": str(folder / "tokenizer"), "block_size": 32, "validation_fraction": 0.2}
    defaults |= {"cache_dir": str(folder / "cache"), "messages_column": "chat"}
    data = TextData(path=str(path), **(defaults | settings))
    data.setup()
    return data


def documents_with_targets(store):
    """Ids and flags of every document of a store, read token by token."""
    return [
        (store.document_tokens(n).tolist(), store.target_flags[store.span(n)].tolist())
        for n in range(store.counts["documents"])
    ]
