"""Fine-tuning data in the packed store: targets, isolated documents, what is refused, and that plain text stays."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.chat_tokenizers import CHATML, MARKED, REWRITING, chat_tokenizer
from support.corpus_files import WRITERS, write
from support.fine_tuning import (
    COLUMNS,
    chat_data,
    chat_rows,
    completion_data,
    completion_rows,
    documents_with_targets,
    write_rows,
)
from tokenizers.processors import TemplateProcessing

from prism_lightning.common.errors import UserError
from prism_lightning.common.targets import IGNORED_TARGET
from prism_lightning.data.integrity import DamagedDataError, read_prepared
from prism_lightning.data.sample import sampled_store
from prism_lightning.data.sources import CompletionRows, MessageRows, hub_dataset, local_files
from prism_lightning.data.tokenizer import encode
from prism_lightning.lightning_modules.text_data import TextData


def test_a_completion_and_its_end_are_the_targets_of_a_row(tmp_path):
    data, rows = completion_data(tmp_path), completion_rows()
    seen = []
    for store in (data.train, data.validation):
        numbers = store.documents["row"].to_pylist()
        for number, (ids, flags) in zip(numbers, documents_with_targets(store), strict=True):
            prompt, completion = rows[number]["ask"]["text"], rows[number]["answer"]
            prompt_ids, completion_ids = encode(store.tokenizer, prompt), encode(store.tokenizer, completion)
            assert ids == [*prompt_ids, *completion_ids, store.tokenizer.eos_token_id]
            assert flags == [False] * len(prompt_ids) + [True] * (len(completion_ids) + 1)
            seen.append(number)
        total = sum(sum(flags) for _, flags in documents_with_targets(store))
        assert store.counts["targets"] == store.manifest[store.split]["targets"] == total
        said = sum(len(rows[number]["answer"].encode()) for number in numbers)
        assert store.bytes_per_token == pytest.approx(said / total)
    assert sorted(seen) == list(range(120))


def test_a_token_that_begins_every_text_is_no_target(tmp_path):
    tokenizer = chat_tokenizer("mistral")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"ask": {"text": ask}, "answer": "It is old."} for ask in ("How?", "") * 10]
    data = completion_data(tmp_path, rows, tokenizer=str(tmp_path / "tokenizer"), vocab_size=400)
    answer = [*encode(tokenizer, "It is old.", continued=True), tokenizer.eos_token_id]
    asked = encode(tokenizer, "How?", continued=True)
    documents = documents_with_targets(data.train)
    assert {tuple(ids) for ids, _ in documents} == {(0, *asked, *answer), (0, *answer)}
    assert all(flags == [False] * (len(ids) - len(answer)) + [True] * len(answer) for ids, flags in documents)


@pytest.mark.parametrize("kind", ["first", "always", "prepend"])
def test_a_completion_gets_no_space_of_its_own(tmp_path, kind):
    tokenizer = chat_tokenizer("mistral", kind)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"ask": {"text": f"Tell {n} me:"}, "answer": "more of it"} for n in range(40)]
    data = completion_data(tmp_path, rows, tokenizer=str(tmp_path / "tokenizer"), block_size=4)
    ids, flags = documents_with_targets(data.train)[0]
    row = data.train.documents["row"][0].as_py()
    assert tokenizer.decode(ids[:-1]) == f"Tell {row} me:more of it"
    said = tokenizer.convert_ids_to_tokens([i for i, flag in zip(ids[:-1], flags[:-1], strict=True) if flag])
    assert "".join(said).replace("▁", " ") == "more of it"


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("make", [completion_data, chat_data])
def test_blocks_have_masked_targets_and_restarting_positions(tmp_path, make, isolated):
    data = make(tmp_path, isolate_documents=isolated)
    store = data.train
    flags = np.concatenate([flags for _, flags in documents_with_targets(store)])
    starts, offset = set(store.starts.tolist()), 0
    targets = []
    for block in range(len(store)):
        item = store[block]
        for t in range(store.block_size):
            position = block * store.block_size + t
            offset = 0 if t == 0 or position in starts else offset + 1
            assert not isolated or item["position_ids"][t] == offset
            is_target = flags[position + 1] and not (isolated and position + 1 in starts)
            targets.append(int(store.tokens[position + 1]) if is_target else IGNORED_TARGET)
        assert isolated == ("position_ids" in item)
    items = store.__getitems__(list(range(len(store))))
    assert torch.cat([item["targets"] for item in items]).tolist() == targets
    expected = (np.array(targets).reshape(len(store), -1) != IGNORED_TARGET).sum(1)
    assert store.targets_in(range(len(store))).tolist() == expected.tolist()
    assert 0 < expected.sum() < len(targets)


def test_isolation_is_the_default_of_masked_data_alone(tmp_path):
    assert completion_data(tmp_path).train.isolated
    path = write_rows(tmp_path / "text.jsonl", [{"text": f"Some text of number {n}."} for n in range(60)])
    settings = {"path": str(path), "vocab_size": 300, "block_size": 16, "cache_dir": str(tmp_path / "cache")}
    plain, isolated = TextData(**settings), TextData(**settings, isolate_documents=True)
    plain.setup()
    isolated.setup()
    assert plain.train.folder == isolated.train.folder and not plain.train.masked
    assert set(plain.train[0]) == {"input_ids", "targets", "block_ids"}
    first = isolated.train.starts[1]  # the end of a document does not predict the next one's first token
    targets = torch.cat([item["targets"] for item in isolated.train.__getitems__([0, 1, 2])])
    assert targets[first - 1] == IGNORED_TARGET and (targets != IGNORED_TARGET).sum() > 40


def test_prepared_plain_text_keeps_its_folder(tmp_path):
    """The fingerprint is that of version 0.4, which had no masked targets."""
    rows = [{"text": f"Story {n}. Once upon a time there was a number {n * n}."} for n in range(200)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    folder = TextData(path=str(path), vocab_size=300, block_size=16, cache_dir=str(tmp_path / "cache")).prepare()
    assert folder.name == "9bbfaeca788c3ece"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["train"]) == {"tokens", "documents", "bytes", "max_id"}
    assert not list(folder.rglob("targets.bin"))


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_with_rows_has_prompts_and_completions(tmp_path, suffix):
    rows = [{"text": "a", "n": "one"}, {"text": "b", "n": None}, {"text": None, "n": "three"}, {"text": "c", "n": "x"}]
    source = local_files(str(write(tmp_path, suffix, rows=rows)), CompletionRows("text", "n"))
    assert [(d.text, d.prompt_length, d.row) for d in source.documents()] == [("aone", 1, 0), ("cx", 1, 3)]
    assert source.skipped_nulls == 2


def test_chats_in_a_table_have_no_fields_that_others_have(tmp_path):
    messages = [{"role": "user", "content": "hi", "name": "Ann"}, {"role": "assistant", "content": "ho", "name": None}]
    pq.write_table(pa.Table.from_pylist([{"chat": messages}]), tmp_path / "a.parquet")
    (document,) = local_files(str(tmp_path / "a.parquet"), MessageRows("chat")).documents()
    assert document.messages == [messages[0], {"role": "assistant", "content": "ho"}]


def test_a_hub_dataset_is_read_once_for_both_columns(monkeypatch):
    import datasets

    rows, reads = completion_rows(5), []

    def stream(*_, **__):
        reads.append(1)
        return iter(rows)

    monkeypatch.setattr(datasets, "load_dataset", stream)
    source = hub_dataset("some/data", None, "train", None, CompletionRows(*COLUMNS.values()))
    assert [d.text for d in source.documents()] == [row["ask"]["text"] + row["answer"] for row in rows]
    assert len(reads) == 1


def test_a_chat_template_of_the_recipe_goes_into_the_tokenizer(tmp_path):
    data = chat_data(tmp_path)
    other = CHATML.replace("You are helpful.", "You are brief.")
    changed = chat_data(tmp_path, chat_template=other)
    assert changed.train.folder != data.train.folder
    assert changed.train.tokenizer.chat_template == other
    assert "You are brief." in changed.train.tokenizer.decode(changed.train.document_tokens(0))


def test_the_fix_for_a_template_that_rewrites_turns_works(tmp_path):
    """The error's advice: a template in a file, with the assistant's text marked."""
    rows = [
        {"chat": [m | {"content": "hm</think>" + m["content"]} if m["role"] == "assistant" else m for m in row["chat"]]}
        for row in chat_rows()
    ]
    with pytest.raises(UserError, match="endgeneration"):
        chat_data(tmp_path, rows, chat_template=REWRITING)
    (tmp_path / "marked.jinja").write_text(MARKED)
    store = chat_data(tmp_path, rows, chat_template=str(tmp_path / "marked.jinja")).train
    ids, flags = documents_with_targets(store)[0]
    said = store.tokenizer.decode([i for i, flag in zip(ids, flags, strict=True) if flag])
    assert said.startswith("It is ") or said.startswith("hm</think>It is ")
    assert "<|im_start|>" not in said and "What" not in said


def test_a_template_that_is_no_jinja_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match="the chat template failed"):
        chat_data(tmp_path, chat_template="{% for m in messages %}")


def test_a_changed_template_of_the_tokenizer_is_prepared_anew(tmp_path):
    before = chat_data(tmp_path).train.folder
    tokenizer = tmp_path / "tokenizer"
    assert chat_data(tmp_path).train.folder == before
    (tokenizer / "chat_template.jinja").write_text(CHATML.replace("You are helpful.", "You are brief."))
    settings = {"tokenizer": str(tokenizer), "cache_dir": str(tmp_path / "cache"), "messages_column": "chat"}
    settings |= {"validation_fraction": 0.2, "block_size": 32}
    assert TextData(path=str(tmp_path / "chats.jsonl"), **settings).prepare() != before


def test_a_trained_tokenizer_takes_a_template_of_plain_text(tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    data = chat_data(tmp_path, tokenizer=None, vocab_size=300, chat_template=template)
    ids, flags = documents_with_targets(data.train)[0]
    said = data.train.tokenizer.decode([i for i, flag in zip(ids, flags, strict=True) if flag])
    assert said.startswith(" It is ") and "user" not in said


def test_few_rows_are_held_out_whole(tmp_path, capsys):
    data = completion_data(tmp_path, completion_rows(6), validation_fraction=0.001, block_size=4)
    rows = [store.documents["row"].to_pylist() for store in (data.train, data.validation)]
    assert rows == [[0, 1, 2, 3, 4], [5]]
    assert "too few documents to hold out random ones" in capsys.readouterr().out


def test_a_sample_keeps_targets_and_isolation(tmp_path):
    store = completion_data(tmp_path).train
    sample = sampled_store(store, 400, tmp_path / "sample")
    assert sample.isolated and 0 < sample.counts["targets"] < store.counts["targets"]
    everything = [tuple(map(tuple, document)) for document in documents_with_targets(store)]
    assert {tuple(map(tuple, document)) for document in documents_with_targets(sample)} < set(everything)


@pytest.mark.parametrize("harm", ["short", "removed"])
def test_damaged_targets_are_prepared_anew(tmp_path, harm):
    folder = completion_data(tmp_path).train.folder
    path = folder / "train" / "targets.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1]) if harm == "short" else path.unlink()
    with pytest.raises(DamagedDataError, match="targets.bin"):
        read_prepared(folder, checksums=True)
    assert completion_data(tmp_path).train.folder == folder and path.read_bytes() == content


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"completion_column": "completion"}, "data.completion_column needs data.prompt_column: give both"),
        ({"prompt_column": "prompt"}, "data.prompt_column needs data.completion_column: give both"),
        ({**COLUMNS, "messages_column": "chat"}, "data.messages_column and data.prompt_column exclude each other"),
        ({**COLUMNS, "path": None}, "data.prompt_column needs rows: give data.path or data.dataset"),
    ],
)
def test_columns_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(UserError, match=message) as error:
        TextData(**({"path": "x.jsonl"} | settings))
    assert len(error.value.problems) == 1


def prepared(tmp_path, rows, **settings):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    return TextData(path=str(path), cache_dir=str(tmp_path / "cache"), vocab_size=300, **settings).prepare()


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (completion_rows(9), {**COLUMNS, "prompt_column": "asks"}, r":1: no column 'asks' \(data.prompt_column\): "),
        (
            completion_rows(9),
            {**COLUMNS, "prompt_column": "ask"},
            r"not text but an object .* data.prompt_column ask.text",
        ),
        (chat_rows(9), {"prompt_column": "chat", "completion_column": "chat"}, "in one column by data.messages_column"),
        (completion_rows(9), {"messages_column": "answer"}, "'answer' is not a list of chat messages but a string"),
        (chat_rows(9), {"messages_column": "chat"}, "needs a chat template.*: give data.chat_template"),
        (
            [{"chat": row["chat"][:1]} for row in chat_rows(60)],
            {"messages_column": "chat", "chat_template": CHATML},
            "all targets of the train split are masked",
        ),
    ],
)
def test_data_that_cannot_be_used_are_refused_in_one_line(tmp_path, rows, settings, message):
    with pytest.raises(UserError, match=message) as error:
        prepared(tmp_path, rows, **settings)
    assert "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "cache").glob("*") if path.is_dir()]


def test_a_file_without_columns_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(UserError, match=r"notes.txt has no columns \(data.prompt_column .*leave it out of data.path"):
        TextData(path=str(tmp_path / "notes.txt"), cache_dir=str(tmp_path), **COLUMNS).prepare()
