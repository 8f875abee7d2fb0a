"""Explanations of tokens by prototypes: the decomposition of a text's logits, as a table and as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from prism_lightning.common.errors import UserError, visible
from prism_lightning.data.token_text import token_bytes, token_text
from prism_lightning.data.tokenizer import encode
from prism_lightning.models import PrismForCausalLM, decompose
from prism_lightning.models.continuation import check_length, continued
from prism_lightning.models.decomposition import promoted_tokens

BAR_WIDTH = 12


@dataclass
class ExplainedToken:
    """One token, and the prototypes that were active when the model predicted it, strongest contribution first.

    `token` and `context` are for people; `token_bytes` is the token's UTF-8 in hexadecimal digits.
    `mixture_log_probability` is the token's by the prototypes alone, without the residual in any logit.
    """

    position: int
    context: str
    token_id: int
    token: str
    token_bytes: str
    log_probability: float
    mixture_log_probability: float
    logit: float
    residual: float
    prototypes: list[dict[str, Any]]  # id, activation, factor, contribution, promotes

    @property
    def total(self) -> float:
        """The residual plus all contributions, which is the logit up to rounding."""
        return self.residual + sum(p["contribution"] for p in self.prototypes)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return self.__dict__ | {"sum": self.total}


def explain_text(
    model: PrismForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, first: int = 1, promoted: int = 4
) -> list[ExplainedToken]:
    """Explain every token of a text from position `first` on; nothing predicts the first token of all.

    Raises:
        UserError: a dense model, or a text too short or too long to explain.
    """
    ids = encode(tokenizer, text)
    return explain_ids(model, tokenizer, ids, first, promoted)


def explain_prompt(
    model: PrismForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, new_tokens: int, promoted: int = 4
) -> list[ExplainedToken]:
    """Let the model continue a prompt greedily, and explain each new token. Raises as `explain_text` does."""
    if not prompt:
        raise UserError("the prompt is empty: give some text by --prompt")
    ids = encode(tokenizer, prompt)
    check_length(model, len(ids) + new_tokens)
    return explain_ids(model, tokenizer, continued(model, ids, new_tokens), len(ids), promoted)


def explain_ids(
    model: PrismForCausalLM, tokenizer: PreTrainedTokenizerFast, ids: list[int], first: int, promoted: int
) -> list[ExplainedToken]:
    """Explain the tokens from position `first` on. Raises as `explain_text` does."""
    if model.prototypes is None:
        raise UserError("this model is dense: it has no prototypes to explain with; train a PrismLM recipe")
    if len(ids) < 2:
        raise UserError("the text is shorter than two tokens: there is no prediction in it to explain")
    check_length(model, len(ids))
    tokens_1T = torch.tensor([ids], device=model.device)
    split = decompose(model, tokens_1T[:, :-1], tokens_1T[:, 1:])
    promotes: dict[int, list[str]] = {}
    explained = []
    for position in range(max(1, first), len(ids)):
        row = position - 1
        terms = []
        for index, activation, factor, contribution in zip(
            split.prototypes_BTk[0, row].tolist(),
            split.activations_BTk[0, row].tolist(),
            split.factors_BTk[0, row].tolist(),
            split.contributions_BTk[0, row].tolist(),
            strict=True,
        ):
            if index not in promotes:
                promotes[index] = [token_text(tokenizer, [t]) for t in promoted_tokens(model, index, promoted)]
            term = {"id": index, "activation": activation, "factor": factor, "contribution": contribution}
            terms.append(term | {"promotes": promotes[index]})
        explained.append(
            ExplainedToken(
                position=position,
                context=token_text(tokenizer, ids[max(0, position - 12) : position]),
                token_id=ids[position],
                token=token_text(tokenizer, [ids[position]]),
                token_bytes=token_bytes(tokenizer, [ids[position]]).hex(),
                log_probability=split.log_probability_BT[0, row].item(),
                mixture_log_probability=split.mixture_log_probability_BT[0, row].item(),
                logit=split.logit_BT[0, row].item(),
                residual=split.residual_BT[0, row].item(),
                prototypes=sorted(terms, key=lambda term: -abs(term["contribution"])),
            )
        )
    return explained


def explanation_table(tokens: list[ExplainedToken]) -> Table:
    """Return a table: each token with its prototypes' contributions, the residual, and their sum, the logit."""
    table = Table(title="Which prototypes made each token likely", show_lines=False, expand=False)
    for header in ("token", "prob.", "prototype", "activation", "contribution"):
        table.add_column(header, justify="left" if header in ("token", "contribution") else "right", no_wrap=True)
    table.add_column("promotes")  # the only column that shrinks on a narrow terminal; its cells are cut, not wrapped
    for number, token in enumerate(tokens):
        largest = max(abs(value) for value in (token.residual, *(p["contribution"] for p in token.prototypes))) or 1.0
        rows = [
            (_scaled(p), f"{p['activation']:.3f}", _bar(p["contribution"], largest), _words(p["promotes"]))
            for p in token.prototypes
        ]
        rows.append(("residual", "", _bar(token.residual, largest), Text("unexplained part", style="dim")))
        rows.append(("sum", "", Text(f"{token.total:+7.2f}  = logit {token.logit:.2f}", style="bold"), Text("")))
        alone = f"{math.exp(token.mixture_log_probability):.1%}"
        rows.append(("", "", Text(f"prototypes alone {alone}", style="dim"), Text("")))
        if number:
            table.add_section()
        for line, cells in enumerate(rows):
            name = Text(visible(token.token), style="bold reverse") if line == 0 else Text("")
            probability = f"{math.exp(token.log_probability):.1%}" if line == 0 else ""
            table.add_row(name, probability, *cells)
    return table


def _scaled(prototype: dict[str, Any]) -> str:
    """A prototype's number, and the factor of an intervention on it."""
    return str(prototype["id"]) + (f" x {prototype['factor']:g}" if prototype["factor"] != 1 else "")


def _words(words: list[str]) -> Text:
    return Text(" ".join(f"“{visible(word)}”" for word in words), no_wrap=True, overflow="ellipsis")


def _bar(value: float, largest: float) -> Text:
    cells = round(BAR_WIDTH * abs(value) / largest)
    return Text(f"{value:+7.2f}  {'█' * cells}", style="green" if value >= 0 else "red")
