"""Evaluation with the LM Evaluation Harness: suites, a model of the harness's own kind, results to compare."""

import os

# The harness draws a bar for every step of a task, and tqdm reads this once, when it is imported.
os.environ.setdefault("TQDM_DISABLE", "1")
