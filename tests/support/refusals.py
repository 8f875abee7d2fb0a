"""The form of a refusal on the command line."""


def refused(result, *words):
    """Assert exit code 2, one line per problem on stderr, no traceback, and each of the words in some line."""
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors and "Traceback" not in result.stderr + result.stdout
    for word in words:
        assert any(word in line for line in errors), (word, errors)
