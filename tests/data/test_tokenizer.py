"""The trained tokenizer loses nothing; foreign ones are checked."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_lightning.data.tokenizer import encode, encode_batch, load_tokenizer, train_tokenizer
from prism_lightning.errors import UserError

TOKENIZER = train_tokenizer(["def f(x):\n    return x\n" * 20], vocab_size=280)


@given(st.text())
@settings(deadline=None, max_examples=200)
def test_any_text_survives_encoding(text):
    assert TOKENIZER.decode(encode_batch(TOKENIZER, [text])[0]) == text


def test_a_text_that_spells_the_end_token_is_not_one():
    ids = encode_batch(TOKENIZER, ["a <|endoftext|> b"])[0]
    assert TOKENIZER.eos_token_id not in ids
    assert TOKENIZER.eos_token_id == 0


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UserError, match="257"):
        train_tokenizer(["x"], 100)


def test_loading_by_folder_and_by_file(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert encode(load_tokenizer(str(path)), "def g") == encode(TOKENIZER, "def g")


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="could not be loaded"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
