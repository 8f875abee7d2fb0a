"""Behaviours in text: words, signs, examples, and the tokens that they are."""

import pytest

from prism_lightning.common.errors import UserError
from prism_lightning.interventions.suppression.behaviours import ExampleBehaviour, WordBehaviour, marked_passages
from prism_lightning.run.model_folder import load_exported


@pytest.fixture(scope="module")
def tokenizer(run):
    return load_exported(run)[1]


def test_words_are_found_whole_in_either_case(tokenizer):
    behaviour = WordBehaviour(["cry", "very sad"], tokenizer)
    assert behaviour.present("They CRY.") and behaviour.present("a Very sad dog")
    assert not behaviour.present("crying, sad, outcry")
    assert behaviour.spans("Cry! cry") == [(0, 3), (5, 8)]


def test_signs_are_found_anywhere(tokenizer):
    assert WordBehaviour(['"'], tokenizer).spans('x"y') == [(1, 2)]


def test_split_words_are_said(tokenizer):
    behaviour = WordBehaviour(["unimaginable"], tokenizer)
    assert len(tokenizer.tokenize(" unimaginable")) > 1
    assert "splits unimaginable into" in behaviour.notes[0]
    with pytest.raises(UserError, match="empty word"):
        WordBehaviour([" "], tokenizer)


def test_passages_mark_every_token_of_a_word(tokenizer):
    behaviour = WordBehaviour(["return"], tokenizer)
    texts = ["def f(x):\n    return x\n" * 4, "import os\n"]
    pieces_of_all = marked_passages(texts, [behaviour.spans(text) for text in texts], tokenizer, 16)
    for number, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        pieces = [p for p in pieces_of_all if p.text == number]
        assert [t for p in pieces for t in p.ids[1:]] == ids[1:]  # each token but the first is a target once
        assert all(len(p.ids) == len(p.marked_T) + 1 <= 17 for p in pieces)
    marked = "".join(
        tokenizer.decode([t]) for p in pieces_of_all for t, m in zip(p.ids[1:], p.marked_T, strict=True) if m
    )
    assert marked.split() == ["return"] * 4


def test_examples_are_told_apart_by_their_words():
    with_it, without_it = (
        [f"the dog was {n} sad today" for n in range(20)],
        [f"the dog was {n} glad today" for n in range(20)],
    )
    behaviour = ExampleBehaviour("sadness", with_it, without_it)
    assert behaviour.present("a sad cat") and not behaviour.present("a glad cat")
    assert behaviour.words[0] == "sad" and "100.0 %" in behaviour.notes[0]
    with pytest.raises(UserError, match="--without_texts has 3 texts: give 10"):
        ExampleBehaviour("sadness", with_it, without_it[:3])
