"""Settings that would train another model than intended are refused."""

import pytest

from prism_lightning.common.errors import UserError
from prism_lightning.models.configuration import PrismConfig, backbone_configuration


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "gpt3"}, ["gpt3", "did you mean"]),
        ({"model_type": "gpt2", "n_layers": 4}, ["n_layers", "did you mean n_layer?"]),
        ({"n_layer": 4}, ["model_type"]),
        ({"model_type": "gpt2", "n_layer": "four"}, ["n_layer"]),
        ({"model_type": "bert"}, ["bert", "attends to the tokens that it predicts"]),
        ({"model_type": "bloom"}, ["bloom", "max_position_embeddings"]),
    ],
)
def test_bad_backbones_are_named(settings, words):
    with pytest.raises(UserError) as error:
        backbone_configuration(settings)
    assert all(word in str(error.value) for word in words)


def test_numbers_that_do_not_divide_each_other_are_named(make_model):
    with pytest.raises(UserError, match="gpt2: .*divisible"):
        make_model({"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 3})


def test_all_unknown_settings_are_named_at_once():
    with pytest.raises(UserError) as error:
        backbone_configuration({"model_type": "gpt2", "n_layers": 4, "n_headz": 2})
    assert len(error.value.problems) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"num_prototypes": 4, "active_prototypes": 5},
        {"num_prototypes": 4, "active_prototypes": 0},
        {"commitment": 1.5},
        {"num_prototypes": -1},
    ],
)
def test_impossible_prototypes_are_refused(settings):
    with pytest.raises(UserError):
        PrismConfig(backbone_config={"model_type": "gpt2"}, **settings)
