"""Evaluation with the LM Evaluation Harness: suites, a model of the harness's own kind, results to compare."""

# Tokens in one forward pass, padding included. It is defined here because the harness takes seconds to import.
BATCH_TOKENS = 8192
