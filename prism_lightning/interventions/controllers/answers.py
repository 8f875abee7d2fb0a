"""Multiple-choice items as controllers need them: hidden states and tokens of every answer, and nothing else.

Shapes: n answer tokens, D hidden size, A answers of all items.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from torch import Tensor

from prism_lightning.common.errors import UserError
from prism_lightning.evaluation.harness import PrismHarnessModel, Request
from prism_lightning.interventions.controllers.choice_model import items_of
from prism_lightning.interventions.hidden_states import token_losses
from prism_lightning.models import PrismForCausalLM

CERTAIN = 1e9  # nats between one answer and all others, to find out whether a task counts it as right
DIVIDED_BY_LENGTH = {"acc": False, "acc_norm": True}


class AnswerRecorder(PrismHarnessModel):
    """The bridge to the harness, with hidden states and tokens of answers in place of log-likelihoods."""

    def _answers(
        self, batch: list[tuple[int, ...]], row_requests: list[tuple[int, int]], requests: list[Request]
    ) -> list[Any]:
        z_nD, targets_n, lengths = self.states(batch, row_requests, requests)
        return list(zip(z_nD.cpu().split(lengths), targets_n.cpu().split(lengths), strict=True))


@dataclass
class Answers:
    """Answers of multiple-choice items.

    Attributes:
        z_nD: Hidden states that predict the answers' tokens.
        targets_n: The answers' tokens.
        answer_n: The answer that each token belongs to.
        item_A: The item that each answer belongs to, ascending.
        right_A: Whether an answer is right.
        length_A: Divisor of an answer's log-likelihood: its characters for `acc_norm`, 1 for `acc`.
        names: Names of the items, "task number".
        questions: Texts of the items' questions.
        texts: Texts of the answers.
    """

    z_nD: Tensor
    targets_n: Tensor
    answer_n: np.ndarray
    item_A: np.ndarray
    right_A: np.ndarray
    length_A: np.ndarray
    names: list[str]
    questions: list[str]
    texts: list[str]

    @property
    def items(self) -> int:
        """Number of items."""
        return len(self.names)

    def correct(self, scores_A: np.ndarray) -> np.ndarray:
        """Return whether the answer with the highest score is right, for every item.

        Of equal scores the first counts, as in the harness.
        """
        item_ranges = zip(*items_of(self.item_A), strict=True)
        best = [start + int(np.argmax(scores_A[start : start + size])) for start, size in item_ranges]
        return self.right_A[best]

    def of(self, items: list[int]) -> Answers:
        """Return the answers of some items, given in ascending order."""
        kept_A = np.isin(self.item_A, items)
        kept_n = kept_A[self.answer_n]
        new_answer_A, new_item = np.cumsum(kept_A) - 1, np.cumsum(np.isin(np.arange(self.items), items)) - 1
        return Answers(
            z_nD=self.z_nD[torch.from_numpy(kept_n)],
            targets_n=self.targets_n[torch.from_numpy(kept_n)],
            answer_n=new_answer_A[self.answer_n[kept_n]],
            item_A=new_item[self.item_A[kept_A]],
            right_A=self.right_A[kept_A],
            length_A=self.length_A[kept_A],
            names=[self.names[item] for item in items],
            questions=[self.questions[item] for item in items],
            texts=[text for text, kept in zip(self.texts, kept_A.tolist(), strict=True) if kept],
        )

    def log_likelihoods(self, model: PrismForCausalLM) -> np.ndarray:
        """Return the log-likelihood [A] of every answer under the model's interventions, divided as its metric does."""
        losses_n = token_losses(model, self.z_nD, self.targets_n).double().numpy()
        return np.bincount(self.answer_n, -losses_n, len(self.item_A)) / self.length_A


def record(
    bridge: AnswerRecorder, name: str, task: ConfigurableTask, docs: list[dict[str, Any]], metric: str
) -> Answers:
    """Return the answers of a task's documents, without few-shot examples.

    Args:
        bridge: The bridge with the model.
        name: Name of the task.
        task: The harness's task.
        docs: Documents of the task.
        metric: The suite's metric, acc or acc_norm.

    Raises:
        UserError: the task is not multiple-choice, or is scored by another metric.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or metric not in DIVIDED_BY_LENGTH:
        raise UserError(
            f"task {name} is {task.OUTPUT_TYPE}, scored by {metric}: give tasks of multiple choice, scored by acc or"
            " acc_norm"
        )
    requests: list[Instance] = []
    item: list[int] = []
    right: list[bool] = []
    length: list[float] = []
    questions: list[str] = []
    texts: list[str] = []
    for number, doc in enumerate(docs):
        context = task.fewshot_context(doc, 0)
        choices = [str(choice) for choice in task.doc_to_choice(doc)]
        task_requests = task.construct_requests(doc, context, metadata=(name, number, 1))
        requests += list(islice(task_requests, len(choices)))  # unconditional requests may follow
        item += [number] * len(choices)
        right += [_is_right(task, doc, choice, len(choices)) for choice in range(len(choices))]
        length += [max(1.0, len(choice)) if DIVIDED_BY_LENGTH[metric] else 1.0 for choice in choices]
        questions.append(context if isinstance(context, str) else context[0])
        texts += choices
    states: list[Any] = bridge.loglikelihood(requests)  # pairs of z and targets: see AnswerRecorder
    return Answers(
        z_nD=torch.cat([z for z, _ in states]),
        targets_n=torch.cat([targets for _, targets in states]),
        answer_n=np.repeat(np.arange(len(states)), [len(targets) for _, targets in states]),
        item_A=np.array(item),
        right_A=np.array(right),
        length_A=np.array(length),
        names=[f"{name} {number}" for number in range(len(docs))],
        questions=questions,
        texts=texts,
    )


def _is_right(task: ConfigurableTask, doc: dict[str, Any], choice: int, choices: int) -> bool:
    """Return whether the task counts a choice as right: its accuracy if the model were certain of that choice."""
    results = [(0.0 if number == choice else -CERTAIN, False) for number in range(choices)]
    if "acc_mutual_info" in task.aggregation():  # which expects as many unconditional results after them
        results *= 2
    return bool(task.process_results(doc, results)["acc"])


def joined(parts: list[Answers]) -> Answers:
    """Return the answers of several tasks as one set."""
    first_answers = np.cumsum([0] + [len(part.item_A) for part in parts])
    first_items = np.cumsum([0] + [part.items for part in parts])
    return Answers(
        z_nD=torch.cat([part.z_nD for part in parts]),
        targets_n=torch.cat([part.targets_n for part in parts]),
        answer_n=np.concatenate([part.answer_n + first for part, first in zip(parts, first_answers, strict=False)]),
        item_A=np.concatenate([part.item_A + first for part, first in zip(parts, first_items, strict=False)]),
        right_A=np.concatenate([part.right_A for part in parts]),
        length_A=np.concatenate([part.length_A for part in parts]),
        names=[name for part in parts for name in part.names],
        questions=[question for part in parts for question in part.questions],
        texts=[text for part in parts for text in part.texts],
    )
