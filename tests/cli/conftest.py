"""A finished run for the tests of the command line."""

import pytest
from support.runs import copied_run


@pytest.fixture(scope="module")
def finished(finished_run, tmp_path_factory):
    """A finished tiny run that these tests may write to: its folder, arguments and output."""
    return *copied_run(finished_run, tmp_path_factory.mktemp("finished") / "run"), finished_run[2]
