"""The tokenizer of a pretrained model."""

import pytest
from tokenizers.processors import TemplateProcessing

from prism_lightning.data.tokenizer import starting_token, train_tokenizer
from prism_lightning.run.model_tokenizer import model_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some text to train a tokenizer on"] * 20, 270)


def test_a_token_before_every_text_is_named_because_data_are_encoded_without_it(tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "plain")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>"]})
    number = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", number)])
    tokenizer.save_pretrained(tmp_path / "begins")
    assert starting_token(model_tokenizer(str(tmp_path / "plain"))) is None
    assert "begins every text" not in capsys.readouterr().err
    assert starting_token(model_tokenizer(str(tmp_path / "begins"))) == "<s>"
    assert "begins every text with <s>; data and queries are encoded without it" in capsys.readouterr().err
