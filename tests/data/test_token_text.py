"""Parts of characters are shown as their bytes, which differ between parts and from a real U+FFFD."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prism_lightning.data.token_text import token_bytes, token_text
from prism_lightning.data.tokenizer import encode, encoding_plain_text, train_tokenizer
from prism_lightning.inspection.explain import explain_text, explanation_table

WORDS = ["the quick brown fox, the lazy dog and the café\n" * 9]
FAMILY = "你好 👩‍👩‍👧"


def byte_fallback():
    """As Llama's: words with ▁ for the blank before, bytes such as <0xE4> for what it has no token for."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_of_vocabulary = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "</s>", *bytes_of_vocabulary], show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    return encoding_plain_text(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))


TOKENIZERS = {"byte-level": train_tokenizer(WORDS, 300), "byte-fallback": byte_fallback()}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_parts_of_a_character_are_bytes_and_whole_ones_are_text(kind):
    tokenizer = TOKENIZERS[kind]
    ids = encode(tokenizer, "x你\ufffd")
    assert [token_text(tokenizer, [token]) for token in ids[-6:]] == ["<E4>", "<BD>", "<A0>", "<EF>", "<BF>", "<BD>"]
    assert token_text(tokenizer, ids).strip() == "x你\ufffd"
    assert token_text(tokenizer, ids[:-4]).strip() == "x<E4 BD>"
    assert token_text(tokenizer, ids[-4:]) == "<A0>\ufffd"


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(), cut=st.integers(0, 50))
@settings(deadline=None, max_examples=100)
def test_bytes_are_those_of_the_text_however_it_is_cut(kind, text, cut):
    tokenizer = TOKENIZERS[kind]
    ids = encode(tokenizer, text)
    whole = token_bytes(tokenizer, ids[:cut]) + token_bytes(tokenizer, ids[cut:])
    if kind == "byte-fallback":
        assert whole.decode().replace("▁", " ") == (" " + text if text else "").replace("▁", " ")
    else:
        assert whole.decode() == text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_words_keep_their_blanks_and_special_tokens_their_names(kind):
    tokenizer = TOKENIZERS[kind]
    ids = encode(tokenizer, "the quick fox")
    assert "".join(token_text(tokenizer, [token]) for token in ids).strip() == "the quick fox"
    assert token_text(tokenizer, [tokenizer.eos_token_id]) == tokenizer.eos_token
    assert token_text(tokenizer, [5000]) == "<token 5000>"


def test_a_tokenizer_of_words_is_decoded_by_itself():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    assert token_text(PreTrainedTokenizerFast(tokenizer_object=tokenizer), [1, 2]) == "playing"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_explain_shows_bytes_and_its_json_keeps_them(kind, make_model, backbone):
    tokenizer = TOKENIZERS[kind]
    model = make_model(backbone | {"vocab_size": 400}, num_prototypes=8, active_prototypes=2)
    explained = explain_text(model, tokenizer, FAMILY)
    records = json.loads(json.dumps([token.as_dict() for token in explained]))
    first = token_bytes(tokenizer, encode(tokenizer, FAMILY)[:1])
    assert (first + bytes.fromhex("".join(record["token_bytes"] for record in records))).decode().strip() == FAMILY
    out = io.StringIO()
    Console(file=out, width=200).print(explanation_table(explained))
    assert "\ufffd" not in out.getvalue() and "<E5>" in out.getvalue() and "<F0>" in out.getvalue()
    assert not any("\ufffd" in record["context"] for record in records)
    assert explained[-1].context.count("👩") == 1  # whole characters before are readable
