"""Text in nested fields and chats is read; errors describe columns that hold no text."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.corpus_files import PACKERS, WRITERS, documents, write

from prism_lightning.common.errors import UserError
from prism_lightning.data.sources import local_files

NESTED_KINDS = [".jsonl", ".json", ".parquet", ".arrow", ".stream.arrow"]
CHAT = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi.\nThere."}]


def only_text(folder, rows, column, suffix=".jsonl", **settings):
    (document,) = documents(write(folder, suffix, rows=rows), column, **settings)
    return document.text


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("suffix", WRITERS)
def test_a_missing_column_is_named_with_the_nearest(tmp_path, suffix, packed):
    with pytest.raises(UserError, match=r"corpus\S+( row 0|:1)?: no column 'txt' .*did you mean text\?"):
        documents(write(tmp_path, suffix, packed), "txt")


@pytest.mark.parametrize("suffix", NESTED_KINDS)
def test_a_dotted_path_names_a_field(tmp_path, suffix):
    rows = [{"a": {"b": {"c": "one"}}}, {"a": {"b": None}}, {"a": None}, {"a": {"b": {"c": "two"}}}]
    source = local_files(str(write(tmp_path, suffix, rows=rows)), "a.b.c")
    assert [(d.text, d.row) for d in source.documents()] == [("one", 0), ("two", 3)] and source.skipped_nulls == 2


@pytest.mark.parametrize("suffix", NESTED_KINDS)
def test_a_column_whose_name_has_a_dot_wins(tmp_path, suffix):
    assert only_text(tmp_path, [{"a": {"b": "field"}, "a.b": "column"}], "a.b", suffix) == "column"
    assert only_text(tmp_path, [{"a.b": {"c": "field"}}], "a.b.c", suffix) == "field"


def test_a_dotted_column_of_a_csv_file_is_its_name(tmp_path):
    (tmp_path / "a.csv").write_text("n,text.content\n1,one\n")
    assert [d.text for d in documents(tmp_path / "a.csv", "text.content")] == ["one"]


@pytest.mark.parametrize("suffix", NESTED_KINDS)
def test_an_object_says_which_field_to_give_and_the_advice_works(tmp_path, suffix):
    rows = [{"text": {"id": "7", "content": "one"}}]
    with pytest.raises(UserError, match="is not text but an object with (id, content|content, id).*") as error:
        only_text(tmp_path, rows, "text", suffix)
    column = str(error.value).rpartition("set data.text_column ")[2]
    assert column == "text.content" and only_text(tmp_path, rows, column, suffix) == "one"
    with pytest.raises(UserError, match=r"no column 'content'.*did you mean text.content\?"):
        only_text(tmp_path, rows, "content", suffix)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[1, 2]", "a list, its first item a number"),
        ('["a", "b"]', "a list of strings: join the strings"),
        ("[]", "an empty list"),
        ("3", "a number: set data.text_column"),
        ("true", "true or false"),
        ("{}", "an empty object"),
        (
            '[{"from": "a", "value": "b"}]',
            "with from, value: chat messages are objects with role and content",
        ),
    ],
)
def test_other_values_are_described(tmp_path, value, words):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x"}}\n{{"text": {value}}}\n')
    with pytest.raises(UserError, match="a.jsonl:2: column 'text' is not text but") as error:
        documents(tmp_path / "a.jsonl")
    assert words in str(error.value)


@pytest.mark.parametrize("column", [[1, 2], [b"a", b"b"], [["a"], ["b"]]])
def test_columns_of_tables_that_are_no_text_are_described(tmp_path, column):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match="a.parquet row 0: column 'text' is not text but (a number|bytes|a list of str)"
    ):
        documents(tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", NESTED_KINDS)
def test_chats_become_blocks_of_role_and_content(tmp_path, suffix):
    text = "user: Say hi.\n\nassistant: Hi.\nThere."
    assert only_text(tmp_path, [{"messages": CHAT}], "messages", suffix) == text
    assert only_text(tmp_path, [{"a": {"messages": CHAT}}], "a.messages", suffix) == text


def test_a_template_renders_chats_and_is_part_of_the_identity_only_when_given(tmp_path):
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    rows = [{"messages": CHAT}]
    assert (
        only_text(tmp_path, rows, "messages", chat_template=template) == "<|user|>Say hi.\n<|assistant|>Hi.\nThere.\n"
    )
    path = str(write(tmp_path, ".jsonl", rows=rows))
    plain, rendered = (local_files(path, "messages", chat_template=t).identity for t in (None, template))
    assert "chat_template" not in plain and rendered == plain | {"chat_template": template}
    (tmp_path / "chat.jinja").write_text(template)
    assert local_files(path, "messages", chat_template=str(tmp_path / "chat.jinja")).identity == rendered


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.text }}{% endfor %}", ["corpus.jsonl:1", "no attribute 'text'"]),
        ("{{ ''.__class__.__mro__ }}", ["corpus.jsonl:1", "unsafe"]),
        ("{{ messages.append(1) }}", ["corpus.jsonl:1", "data.chat_template failed"]),
        ("{{ raise_exception('roles must alternate') }}", ["corpus.jsonl:1", "roles must alternate"]),
        ("{% for m in %}", ["data.chat_template, line 1"]),
        ("absent.jinja", ["data.chat_template absent.jinja", "neither"]),
    ],
)
def test_a_template_that_fails_is_named(tmp_path, template, words):
    with pytest.raises(UserError) as error:
        only_text(tmp_path, [{"messages": CHAT}], "messages", chat_template=template)
    assert all(word in str(error.value) for word in words), error.value


def test_content_in_parts_needs_a_template(tmp_path):
    rows = [{"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}]
    with pytest.raises(UserError, match="content of a chat message is not text: give data.chat_template"):
        only_text(tmp_path, rows, "messages")
    assert only_text(tmp_path, rows, "messages", chat_template="{{ messages[0].content[0].text }}") == "hi"


def test_a_surrogate_in_a_chat_is_found(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": [{"role": "user", "content": "\ud83d"}]}))
    with pytest.raises(UserError, match="a.jsonl:1: half a surrogate pair"):
        documents(tmp_path / "a.jsonl")
