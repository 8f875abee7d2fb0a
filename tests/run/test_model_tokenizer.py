"""The tokenizer of a pretrained model."""

from tokenizers.processors import TemplateProcessing

from prism_lightning.data.tokenizer import encode, open_tokenizer, train_tokenizer
from prism_lightning.run.directory import RunDirectory, RunSettings
from prism_lightning.run.model_tokenizer import model_tokenizer, save_tokenizer


def test_a_run_s_tokenizer_begins_texts_as_the_model_s_own_does(tmp_path):
    tokenizer = train_tokenizer(["some text to train a tokenizer on"] * 20, 270)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>"]})
    number = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", number)])
    tokenizer.save_pretrained(tmp_path / "model")
    run = RunDirectory(RunSettings(dir=str(tmp_path / "run")))
    save_tokenizer(model_tokenizer(str(tmp_path / "model")), run)
    ids = encode(open_tokenizer(run.paths.tokenizer), "some text")
    assert ids == tokenizer("some text")["input_ids"] and ids[0] == number
