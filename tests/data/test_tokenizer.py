"""The trained tokenizer is lossless, loaded ones are checked, and all encode in the same way."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from prism_lightning.common.errors import UserError
from prism_lightning.data.tokenizer import (
    encode,
    encode_batch,
    load_tokenizer,
    open_tokenizer,
    tokenizer_size,
    train_tokenizer,
)
from prism_lightning.lightning_modules.text_data import TextData

TOKENIZER = train_tokenizer(["def f(x):\n    return x\n" * 20], vocab_size=280)


@given(st.text())
@settings(deadline=None, max_examples=200)
def test_any_text_survives_encoding(text):
    assert TOKENIZER.decode(encode(TOKENIZER, text)) == text


def test_a_text_that_spells_the_end_token_is_not_one():
    ids = encode(TOKENIZER, "a <|endoftext|> b")
    assert TOKENIZER.eos_token_id not in ids
    assert TOKENIZER.eos_token_id == 0


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UserError, match="257"):
        train_tokenizer(["x"], 100)


def test_loading_by_folder_and_by_file(tmp_path, capfd):
    TOKENIZER.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(str(path))
        assert encode(loaded, "def g") == encode(TOKENIZER, "def g")
        assert loaded.eos_token_id == 0 and tokenizer_size(loaded) == len(TOKENIZER)
    assert capfd.readouterr().err == ""


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="could not be loaded"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def foreign(path, specials, post_processor=None):
    """A tokenizer.json as others write it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["def f(x):\n    return x + 1\n" * 20], trainer)
    if post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=post_processor, special_tokens=[(s, tokenizer.token_to_id(s)) for s in specials]
        )
    tokenizer.save(str(path))
    return tokenizer.get_vocab_size()


@pytest.mark.parametrize("name", ["</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[EOS]"])
def test_a_bare_file_s_own_end_token_is_used_and_said(tmp_path, capfd, name):
    path = tmp_path / "other.json"
    size = foreign(path, ["<pad>", name])
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer_size(tokenizer)) == (name, 1, size)
    assert capfd.readouterr().err == f"tokenizer {path}: documents end with its own {name}, id 1\n"


def test_what_a_tokenizer_puts_behind_a_text_ends_it(tmp_path, capfd):
    path = tmp_path / "tokenizer.json"
    foreign(path, ["<begin>", "<over>", "</s>"], "<begin> $A <over>")
    assert load_tokenizer(str(path)).eos_token == "<over>"
    assert "own <over>, id 1" in capfd.readouterr().err
    foreign(path, ["<begin>", "<over>", "</s>"], "<begin> $A")
    assert load_tokenizer(str(path)).eos_token == "</s>"


@pytest.mark.parametrize("end", ["<over>", {"content": "<over>", "special": True, "__type": "AddedToken"}])
def test_the_configuration_beside_a_file_comes_first(tmp_path, end):
    foreign(tmp_path / "tokenizer.json", ["</s>", "<over>"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(str(path)).eos_token_id == 1


@pytest.mark.parametrize("specials", [["<pad>"], []])
def test_an_end_token_that_is_added_is_said_with_its_id_and_the_size(tmp_path, capfd, specials):
    path = tmp_path / "other.json"
    size = foreign(path, specials)
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.eos_token_id, tokenizer_size(tokenizer)) == (size, size + 1)
    note = f"tokenizer {path} has no end token: <|endoftext|> is added as id {size}, {size + 1} tokens in all\n"
    assert capfd.readouterr().err == note
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<none such>"}))
    path = path.rename(tmp_path / "tokenizer.json")
    assert load_tokenizer(str(path)).eos_token == "<none such>"
    assert f"<none such> is added as id {size}" in capfd.readouterr().err


@pytest.mark.parametrize("specials", [["<pad>", "</s>"], ["<pad>"]])
def test_prepared_data_end_with_that_token_and_name_the_right_size(corpus, tmp_path, specials):
    size = foreign(tmp_path / "other.json", specials)
    data = TextData(
        path=f"{corpus}/*.txt",
        tokenizer=str(tmp_path / "other.json"),
        block_size=32,
        validation_fraction=0.2,
        cache_dir=str(tmp_path / "cache"),
    )
    data.setup()
    end, whole_size = (1, size) if "</s>" in specials else (size, size + 1)
    assert data.train.manifest["tokenizer_size"] == whole_size
    assert data.train.document_tokens(0)[-1] == data.train.tokenizer.eos_token_id == end


def test_a_vocabulary_that_leaves_ids_out_has_the_size_of_its_largest(tmp_path):
    path = tmp_path / "other.json"
    size = foreign(path, ["</s>"])
    content = json.loads(path.read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": size + 50, "content": "<far>"})
    content["model"]["vocab"]["<far>"] = size + 50
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer_size(tokenizer) == size + 51 > len(tokenizer)


def test_truncation_and_padding_of_a_tokenizer_file_are_not_applied(tmp_path):
    path = tmp_path / "other.json"
    foreign(path, ["</s>"])
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path))
    assert [len(ids) for ids in encode_batch(load_tokenizer(str(path)), ["zq" * 20, "z"])] == [40, 1]


TEXTS = ["x<|endoftext|>y", "</s>", "a </s><s> b <pad>", "plain text", "你好 👩‍👩‍👧", ""]


def test_every_way_to_encode_gives_the_ids_of_training(tmp_path, make_model):
    from prism_lightning.evaluation.harness import PrismHarnessModel
    from prism_lightning.run.model_folder import load_exported, save_exported

    foreign(tmp_path / "other.json", ["<pad>", "</s>", "<s>"], "<s> $A </s>")
    for number, tokenizer in enumerate((TOKENIZER, load_tokenizer(str(tmp_path / "other.json")))):
        whole = [array.tolist() for array in encode_batch(tokenizer, TEXTS)]
        beginning = [[], [2]][number]
        assert all(row[: len(beginning)] == beginning for row in whole)
        ids = [row[len(beginning) :] for row in whole]
        assert [encode(tokenizer, text, continued=True) for text in TEXTS] == ids
        special = set(tokenizer.added_tokens_decoder)
        assert special and not special.intersection(token for row in ids for token in row)
        folder = tmp_path / f"model{number}"
        save_exported(make_model(), tokenizer, folder)
        model, loaded = load_exported(folder)
        bridge = PrismHarnessModel(model=model, tokenizer=loaded)
        for variant in (tokenizer, loaded, open_tokenizer(folder), load_tokenizer(str(folder))):
            assert [encode(variant, text) for text in TEXTS] == whole
            assert variant(TEXTS, add_special_tokens=False)["input_ids"] == ids
            assert [variant(text, add_special_tokens=False)["input_ids"] for text in TEXTS] == ids
            assert [variant.encode(text, add_special_tokens=False) for text in TEXTS] == ids
            assert [variant.convert_tokens_to_ids(variant.tokenize(text)) for text in TEXTS] == ids
        assert [bridge.tok_encode(text) for text in TEXTS] == whole
        batch, _ = bridge.tok_batch_encode(TEXTS[:1])
        assert batch[0].tolist() == whole[0]


def test_documents_begin_as_the_tokenizer_begins_texts(corpus, tmp_path):
    """Data that were prepared before it did have another fingerprint."""
    folders = []
    for template in (None, "<s> $A"):
        foreign(tmp_path / "other.json", ["<pad>", "</s>", "<s>"], template)
        data = TextData(
            path=f"{corpus}/*.txt", tokenizer=str(tmp_path / "other.json"), block_size=32, cache_dir=str(tmp_path)
        )
        data.setup()
        folders.append(data.prepare())
        ids = data.train.document_tokens(0).tolist()
        text = data.train.tokenizer.decode(ids, skip_special_tokens=True)
        assert ids == [*data.train.tokenizer(text)["input_ids"], 1]  # the tokenizer's own way
        assert (2 in ids) == (template is not None)
    assert folders[0] != folders[1]


def test_attribute_and_explain_ask_with_these_ids(make_model):
    from prism_lightning.inspection.explain import explain_text

    model = make_model(num_prototypes=8, active_prototypes=2)
    text = "x<|endoftext|>y"
    assert [token.token_id for token in explain_text(model, TOKENIZER, text)] == encode(TOKENIZER, text)[1:]
