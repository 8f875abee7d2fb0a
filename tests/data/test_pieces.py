"""Long texts that are cut into pieces have the ids of the whole text, with every kind of tokenizer."""

import json
import random
import time

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prism_lightning.data import pieces as module
from prism_lightning.data.pieces import Cutter
from prism_lightning.data.sources import standard_library
from prism_lightning.data.tokenizer import LONGEST_WORD, encode_batch, encoding_plain_text, train_tokenizer

PIECE = 10 * LONGEST_WORD
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def documents():
    return [text for _, text in zip(range(40), (d.text for d in standard_library().documents()), strict=False)]


def foreign(documents, pre_tokenizer, byte_level):
    """A tokenizer as others make it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=not byte_level, unk_token=None if byte_level else "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    specials = ["</s>"] if byte_level else ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if byte_level else []
    if byte_level:
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(documents):
    byte_level = pre_tokenizers.ByteLevel
    metaspace = foreign(documents, pre_tokenizers.Metaspace(), byte_level=False)
    llama = json.loads(metaspace.to_str()) | {"pre_tokenizer": None}
    llama = Tokenizer.from_str(json.dumps(llama))
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    cl100k = [pre_tokenizers.Split(Regex(CL100K), "isolated"), byte_level(add_prefix_space=False, use_regex=False)]
    made = {
        "gpt2": foreign(documents, byte_level(add_prefix_space=False), byte_level=True),
        "prefix": foreign(documents, byte_level(add_prefix_space=True), byte_level=True),
        "cl100k": foreign(documents, pre_tokenizers.Sequence(cl100k), byte_level=True),
        "metaspace": metaspace,
        "llama": llama,
    }
    made = {name: PreTrainedTokenizerFast(tokenizer_object=tokenizer) for name, tokenizer in made.items()}
    made = {name: encoding_plain_text(tokenizer) for name, tokenizer in made.items()}
    return {"own": train_tokenizer(documents, 900)} | made


def cut_and_whole(tokenizer, texts, monkeypatch):
    """Ids of texts in pieces, and those of the whole texts."""
    monkeypatch.setattr(module, "PIECE_CHARACTERS", PIECE)
    assert max(len(list(Cutter(tokenizer.backend_tokenizer).pieces(text))) for text in texts) > 1
    cut = [ids.tolist() for ids in encode_batch(tokenizer, texts)]
    return cut, tokenizer(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["own", "gpt2", "prefix", "cl100k", "metaspace", "llama"])
def test_ordinary_text_has_the_ids_of_the_whole(tokenizers, documents, name, monkeypatch):
    letters = random.Random(0)
    mixed = ["".join(letters.choices("aé你9 \n\t.,'{}_👩r s", k=20_000)) for _ in range(5)]
    assert Cutter(tokenizers[name].backend_tokenizer).places_are_safe
    cut, whole = cut_and_whole(tokenizers[name], [*documents, *mixed], monkeypatch)
    assert cut == whole


UNBROKEN = {
    "one letter": "a" * 20_000,
    "letters": "".join(random.Random(0).choices("abcdefg", k=20_000)),
    "han": "".join(random.Random(0).choices("你好世界天地人", k=20_000)),
    "blanks": " " * 20_000 + "x",
    "line ends": "\n" * 20_000 + "x",
    "signs": "\t{" * 10_000,
    "contractions": "'re" * 7_000,
    "empty lines": "x\n\n" * 7_000,
}


@pytest.mark.parametrize("kind", UNBROKEN)
def test_our_tokenizer_has_the_same_ids_for_unbroken_text_too(tokenizers, kind, monkeypatch):
    cut, whole = cut_and_whole(tokenizers["own"], [UNBROKEN[kind]], monkeypatch)
    assert cut == whole
    assert tokenizers["own"].decode(cut[0]) == UNBROKEN[kind]


@pytest.mark.parametrize("name", ["gpt2", "prefix", "cl100k", "metaspace", "llama"])
def test_a_word_longer_than_a_piece_keeps_its_text(tokenizers, name, monkeypatch):
    tokenizer = tokenizers[name]
    cut, whole = cut_and_whole(tokenizer, [UNBROKEN["letters"], UNBROKEN["han"]], monkeypatch)
    assert tokenizer.batch_decode(cut) == tokenizer.batch_decode(whole)


def test_a_vocabulary_that_reaches_across_blanks_is_not_cut_there(documents, monkeypatch):
    words = foreign([text.replace(" ", "▁") for text in documents[:3]], pre_tokenizers.Split("\n", "isolated"), False)
    tokenizer = encoding_plain_text(PreTrainedTokenizerFast(tokenizer_object=words))
    assert any("▁" in token.lstrip("▁") for token in tokenizer.get_vocab())
    assert not Cutter(tokenizer.backend_tokenizer).places_are_safe
    cut, whole = cut_and_whole(tokenizer, documents[:3], monkeypatch)
    assert cut == whole


def test_the_standard_library_has_the_vocabulary_and_the_ids_of_uncut_words(documents):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    ours = train_tokenizer(documents, 1500)
    assert json.loads(ours.backend_tokenizer.to_str())["model"] == json.loads(tokenizer.to_str())["model"]
    plain = [encoding.ids for encoding in tokenizer.encode_batch_fast(documents)]
    assert [ids.tolist() for ids in encode_batch(ours, documents)] == plain


def test_training_on_unbroken_text_takes_time_in_proportion():
    def seconds(characters):
        text = "".join(random.Random(0).choices("abcdefghij", k=characters))
        started = time.process_time()
        train_tokenizer([text], 300)
        return time.process_time() - started

    seconds(1000)
    small, large = (min(seconds(n) for _ in range(2)) for n in (50_000, 400_000))
    assert large < 24 * max(small, 0.02)  # in proportion: 8 times; quadratic: 64 times


def test_unbroken_stretches_are_left_out_of_training_once_there_were_many(monkeypatch):
    from prism_lightning.data import tokenizer as tokenizers_module

    monkeypatch.setattr(tokenizers_module, "UNBROKEN_CHARACTERS", 1000)
    texts = ["x" * 600 + " and", "Ab1+/" * 120 + " or", "zZ9" * 200 + " not", "é" * 600 + "!", "你好,世界。" * 100]
    assert list(tokenizers_module._without_unbroken(texts)) == [*texts[:2], " not", "!", texts[4]]
