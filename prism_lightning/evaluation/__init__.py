"""Evaluation with the LM Evaluation Harness: suites of tasks, the harness's view of our models, and paired results.

To add a task of the harness, or another metric of a task: give its name and its `metric` in a suite, evals/*.yaml. Any
metric that the task computes will do. Set `chance` for an accuracy: such tasks are compared document by document.

To add a kind of task of our own: add its name to `SuiteTask.kind`, and to `tasks.OWN_KINDS` a function that makes the
harness's task from validation texts. Its `metric_list` names metrics of the harness; register a new one with
`lm_eval.api.registry`. Result files keep all metrics of a task, so that tables, reports and sweeps need no change.
"""

# Tokens in one forward pass, padding included. It is defined here because the harness takes seconds to import.
BATCH_TOKENS = 8192
