"""Old names of flags work for one version, with a note."""

from prism_lightning.cli.renamed_flags import replace_renamed_flags

NAMES = {"--fall": "--min_rate_reduction", "--rise": "--max_perplexity_increase"}


def test_old_flags_become_new_ones_with_a_note_each(capsys):
    arguments = ["--words", "fall", "--fall", "0.5", "--rise=0.1"]
    expected = ["--words", "fall", "--min_rate_reduction", "0.5", "--max_perplexity_increase=0.1"]
    assert replace_renamed_flags(arguments, NAMES) == expected
    assert capsys.readouterr().err.splitlines() == [
        "note: --fall is now --min_rate_reduction; the old name works until the next version",
        "note: --rise is now --max_perplexity_increase; the old name works until the next version",
    ]


def test_new_flags_stay_without_a_note(capsys):
    arguments = ["--min_rate_reduction", "0.5", "--falling"]
    assert replace_renamed_flags(arguments, NAMES) == arguments
    assert capsys.readouterr().err == ""
