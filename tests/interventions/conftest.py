"""A finished tiny run whose prototypes were polished, for all tests of interventions."""

import pytest
from conftest import fit, tiny_arguments


@pytest.fixture(scope="session")
def run(corpus, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("intervened") / "run"
    fit([*tiny_arguments(folder, corpus, cache), "--trainer.max_steps", "60", "--model.learning_rate", "1e-2"])
    return folder
