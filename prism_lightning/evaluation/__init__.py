"""Evaluation with the LM Evaluation Harness: suites, a model of the harness's own kind, results to compare."""
