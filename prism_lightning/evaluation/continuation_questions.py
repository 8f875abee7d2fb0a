"""Multiple-choice questions from any corpus: which of four continuations belongs to the beginning of a document?"""

from __future__ import annotations

import random
from typing import Any

from prism_lightning.common.errors import UserError

CHOICES = 4


def long_enough(texts: list[str], length: int) -> list[list[str]]:
    """Return the words of every text that has at least `length` words."""
    words = [text.split(" ") for text in texts]
    return [document for document in words if len(document) >= length]


def continuations(texts: list[str], count: int, context: int, continuation: int, seed: int) -> list[dict[str, Any]]:
    """Return questions with `context`, four `choices` of equally many words, and the `label` of the true choice.

    Args:
        texts: held-out documents.
        count: maximum number of questions; a document gives at most one.
        context, continuation: number of words of each.
        seed: of the order of documents, the false continuations and the order of choices.

    Raises:
        UserError: too few documents are long enough.
    """
    generator = random.Random(seed)
    long = long_enough(texts, context + continuation)
    if len(long) < CHOICES:
        raise UserError(
            f"{len(long)} of {len(texts)} held-out documents have {context + continuation} words, {CHOICES} are needed:"
            " lower context or continuation of the task"
        )
    generator.shuffle(long)
    questions = []
    for number, document in enumerate(long[:count]):
        others = generator.sample([n for n in range(len(long)) if n != number], CHOICES - 1)
        choices = [" ".join(document[context : context + continuation])]
        choices += [" ".join(long[other][context : context + continuation]) for other in others]
        order = generator.sample(range(CHOICES), CHOICES)
        questions.append(
            {
                "context": " ".join(document[:context]),
                "choices": [choices[place] for place in order],
                "label": order.index(0),
            }
        )
    return questions
