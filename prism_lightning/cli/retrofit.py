"""The verb `retrofit`: prototypes for a frozen pretrained decoder."""

from __future__ import annotations

from jsonargparse import ArgumentError, ArgumentParser

from prism_lightning.common.errors import UserError, user_error_in
from prism_lightning.common.json_text import as_json
from prism_lightning.data.corpus import Corpus
from prism_lightning.retrofit.settings import RetrofitSettings

DESCRIPTION = (
    "Fit prototypes to the hidden states of a frozen pretrained decoder on your own text, and write a run directory"
    " that all verbs on a trained model take. The model's weights and predictions stay as they are. Run the same"
    " command again to resume."
)


def retrofit(arguments: list[str]) -> None:
    """Fit prototypes to a pretrained model and print the results as JSON."""
    parser = ArgumentParser(prog="python -m prism_lightning retrofit", description=DESCRIPTION, exit_on_error=False)
    parser.add_class_arguments(RetrofitSettings)
    parser.add_class_arguments(Corpus, "data", skip={"tokenizer", "vocab_size"})
    try:
        parsed = parser.instantiate_classes(parser.parse_args(arguments))
        settings = RetrofitSettings(**{name: value for name, value in parsed.items() if name != "data"})
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        problem = " ".join(str(error).split())[:300].replace("the following arguments are required: ", "give --")
        raise user_error_in(error) or UserError(problem) from error

    from prism_lightning.retrofit.run import retrofit as run_retrofit

    results = run_retrofit(settings, parsed["data"])
    print(f"model: {settings.out}/model")
    print(as_json(results))
