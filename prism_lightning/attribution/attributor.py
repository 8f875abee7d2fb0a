"""Attribution of a model's predictions to its training data.

from prism_lightning.attribution.attributor import Attributor

attributor = Attributor.open("runs/quickstart")
for attribution in attributor.text("import os"):
    print(attribution.token, attribution.documents[0].source)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from prism_lightning.attribution.curvature.dictionary import own_dictionary
from prism_lightning.attribution.curvature.records import (
    LogitRecords,
    Records,
    contrast_gradient,
    contrast_losses,
    contrast_residuals,
    loss_gradients,
    residuals,
)
from prism_lightning.attribution.index.base import Hits, Index, Query
from prism_lightning.attribution.index.hidden_influence import HiddenIndex
from prism_lightning.attribution.index.opening import open_index
from prism_lightning.attribution.results import Attribution, Describer
from prism_lightning.common.errors import UserError
from prism_lightning.common.files import map_file, read_json
from prism_lightning.data.store import TokenStore
from prism_lightning.data.token_text import token_text
from prism_lightning.data.tokenizer import beginning_ids, encode
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.continuation import continued
from prism_lightning.run.directory import RunPaths
from prism_lightning.run.fingerprints import check_model, check_tokenizer, open_store
from prism_lightning.run.model_folder import load_exported

COMPETITORS = 16  # number of likeliest other tokens in an opposing query


@dataclass
class QueryTokens:
    """The Q tokens of a query, the hidden states that predicted them and the gradients of their losses."""

    ids: list[int]  # of the whole text
    positions: list[int]  # of the Q tokens in it
    z_QD: Tensor
    loss_Q: Tensor
    records: Records | LogitRecords


class Attributor:
    """A model, its index and its corpus.

    Args:
        model, tokenizer: as exported by `fit`.
        index: an index of this model.
        store: the training split of the index.
        top: number of training tokens, passages and documents in each result.
        rerank: whether the head's K-FAC scores the tokens that the prototypes propose (the index must store hidden
            states).
        opposing: whether results have the most negative influences in place of the most positive.

    Raises:
        UserError: an index of another tokenizer, or one that cannot re-rank.
    """

    def __init__(
        self,
        model: PrismForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        index: Index,
        store: TokenStore,
        top: int = 5,
        rerank: bool = False,
        opposing: bool = False,
    ) -> None:
        check_tokenizer(tokenizer, store)
        if rerank and "hidden_basis" not in index.curvature:
            raise UserError(
                "this index stores no hidden states to re-rank by: build one with --index.space hidden"
                " --index.hidden_rank 32"
            )
        self.model, self.tokenizer, self.index = model, tokenizer, index
        self.top, self.rerank, self.opposing = top, rerank, opposing
        tensors = map_file(index.folder / "dictionary.safetensors")
        prototypes_KD, metric_DD = (
            torch.tensor(tensors[name], device=model.device, dtype=model.lm_head.weight.dtype)
            if name in tensors
            else None
            for name in ("prototypes", "metric")
        )
        assert prototypes_KD is not None
        self.dictionary = own_dictionary(
            prototypes_KD, index.manifest["active"], metric_DD, model.lm_head.weight, exact=True
        )
        self.describe = Describer(store, index)
        self.indexed = indexed_text(store)
        self.notes: list[str] = []

    @classmethod
    def open(
        cls,
        run: str | Path,
        index: str | Path | None = None,
        top: int = 5,
        rerank: bool = False,
        opposing: bool = False,
        verify: bool = True,
        loaded: tuple[PrismForCausalLM, PreTrainedTokenizerFast] | None = None,
    ) -> Attributor:
        """Open a run directory with its index (by default RUN/index).

        Args:
            run: the run directory.
            index: folder of the index.
            top, rerank, opposing: see the class.
            verify: compare every file of the index with its checksum.
            loaded: the model and tokenizer, where they are loaded already, for example on a GPU.

        Raises:
            UserError: no model or index there, a damaged file, or an index of another model, tokenizer or corpus.
        """
        run = Path(run)
        model, tokenizer = loaded or load_exported(run)
        folder = Path(index) if index else default_index(run)
        opened = open_index(folder, verify)
        check_model(opened.manifest, model, folder, run)
        store = open_store(opened.manifest, folder, verify)
        attributor = cls(model, tokenizer, opened, store, top=top, rerank=rerank, opposing=opposing)
        attributor.indexed += training_note(RunPaths.of(run), store)
        return attributor

    def text(self, text: str) -> list[Attribution]:
        """Attribute every token of a text except the first, which nothing predicts; the last result is their sum.

        Raises:
            UserError: a text of fewer than two tokens.
        """
        ids = self._cut(self._ids(text), self.model.config.context_length, "text")
        if len(ids) < 2:
            raise UserError("the text is shorter than two tokens: there is no prediction in it to attribute")
        return self.attribute(ids, 1)

    def prompt(self, prompt: str, new_tokens: int = 5) -> list[Attribution]:
        """Let the model continue a prompt greedily, and attribute each new token; the last result is their sum.

        Raises:
            UserError: an empty prompt, or no room for a prompt before the new tokens.
        """
        ids = self._prompt_ids(prompt, new_tokens)
        return self.attribute(continued(self.model, ids, new_tokens), len(ids))

    def contrast(self, prompt: str, why: str, rather_than: str) -> Attribution:
        """Attribute the model's preference, after a prompt, for the first token of `why` over that of `rather_than`.

        Raises:
            UserError: an empty text, or the same token twice.
        """
        ids = self._prompt_ids(prompt, 1)
        words = ((why, "--why"), (rather_than, "--rather_than"))
        chosen, other = (self._ids(text, name, continued=True)[0] for text, name in words)
        if chosen == other:
            raise UserError(f"{why!r} and {rather_than!r} begin with the same token: contrast two different ones")
        tokens = self.query_tokens([*ids, chosen], len(ids), torch.tensor([other], device=self.model.device))
        attribution = self._describe(tokens, slice(0, 1), "contrast")
        attribution.other = token_text(self.tokenizer, [other])
        return attribution

    def attribute(self, ids: list[int], first: int) -> list[Attribution]:
        """Attribute the tokens of a text from position `first` >= 1 on; the last of several results is their sum."""
        tokens = self.query_tokens(ids, first)
        count = len(tokens.positions)
        attributions = [self._describe(tokens, slice(number, number + 1), "token") for number in range(count)]
        if count > 1:
            attributions.append(self._describe(tokens, slice(0, count), "sequence"))
        return attributions

    @torch.no_grad()
    def query_tokens(self, ids: list[int], first: int, other_Q: Tensor | None = None) -> QueryTokens:
        """Return the records of a text's tokens from position `first` on, or of their contrast to other tokens."""
        positions = list(range(first, len(ids)))
        ids_T = torch.tensor(ids, device=self.model.device)
        z_QD = self.model.hidden_states(ids_T[None, :-1])[0, first - 1 :]
        targets_Q = ids_T[first:]
        indices_Qk, activations_Qk = self.dictionary.assign(z_QD)
        if self.index.manifest["settings"]["dictionary"] == "model":
            # An intervention scales the terms of the model's own prototypes in the logits, hence their gradients.
            activations_Qk = activations_Qk * self.model.scaled_terms().factors(indices_Qk, targets_Q)
        records_in_space = self._hidden_records if isinstance(self.index, HiddenIndex) else self._logit_records
        loss_Q, records = records_in_space((indices_Qk, activations_Qk), z_QD, targets_Q, other_Q)
        return QueryTokens(ids, positions, z_QD, loss_Q, records)

    def _hidden_records(
        self, assigned: tuple[Tensor, Tensor], z_QD: Tensor, targets_Q: Tensor, other_Q: Tensor | None
    ) -> tuple[Tensor, Records]:
        head_VD, logits_of = self.model.lm_head.weight, self.model.logits
        if other_Q is None:
            loss_Q, delta_QD = loss_gradients(head_VD, z_QD, targets_Q, logits_of)
        else:
            loss_Q = contrast_losses(head_VD, z_QD, targets_Q, other_Q, logits_of)
            delta_QD = contrast_gradient(head_VD, targets_Q, other_Q)
        return loss_Q, Records(*assigned, delta_QD)

    def _logit_records(
        self, assigned: tuple[Tensor, Tensor], z_QD: Tensor, targets_Q: Tensor, other_Q: Tensor | None
    ) -> tuple[Tensor, LogitRecords]:
        head_VD, logits_of = self.model.lm_head.weight, self.model.logits
        if other_Q is not None:
            loss_Q = contrast_losses(head_VD, z_QD, targets_Q, other_Q, logits_of)
            return loss_Q, LogitRecords(*assigned, *contrast_residuals(targets_Q, other_Q))
        # A token is opposed by training tokens with other targets, where it was likely.
        competitors = min(COMPETITORS, len(head_VD) - 1) if self.opposing else 0
        loss_Q, tokens_Qc, values_Qc = residuals(head_VD, z_QD, targets_Q, competitors, logits_of)
        return loss_Q, LogitRecords(*assigned, tokens_Qc, values_Qc)

    def query(self, tokens: QueryTokens, selection: slice) -> Query:
        """Return the index's question about some of the tokens, summed."""
        return self.index.query(*tokens.records.arrays(selection))

    def hits(self, tokens: QueryTokens, selection: slice) -> tuple[Query, Hits]:
        """Return the influence of every training token on the summed loss of some of the query's tokens."""
        query = self.query(tokens, selection)
        if not self.rerank:
            return query, self.index.score(query)
        assert isinstance(self.index, HiddenIndex)
        parts = []
        for number in range(*selection.indices(len(tokens.positions))):  # each token re-ranks its own proposals
            token = slice(number, number + 1)
            proposed = self.index.score(self.query(tokens, token))
            _, _, delta_1D = tokens.records.arrays(token)
            parts.append(self.index.rescored(proposed, tokens.z_QD[number].float().cpu().numpy(), delta_1D[0]))
        return query, Hits.total(parts)

    def _describe(self, tokens: QueryTokens, selection: slice, kind: str) -> Attribution:
        query, hits = self.hits(tokens, selection)
        first, last = tokens.positions[selection][0], tokens.positions[selection][-1]
        prototypes_k = tokens.records.prototypes_Nk[selection.start].tolist()
        activations_k = tokens.records.activations_Nk[selection.start].tolist()
        active = sorted(zip(prototypes_k, activations_k, strict=True), key=lambda pair: -pair[1])
        passages, documents = self.describe.by_passage(hits), self.describe.by_document(hits)
        return Attribution(
            kind=kind,
            context=token_text(self.tokenizer, tokens.ids[max(0, first - 12) : first]),
            token=token_text(self.tokenizer, tokens.ids[first : last + 1]),
            loss=float(tokens.loss_Q[selection].sum()),
            scored_by="head K-FAC" if self.rerank else "prototypes",
            touched=len(hits.tokens),
            influence=float(hits.influence.sum(dtype=np.float64)),
            prototypes=[] if kind == "sequence" else [pair for pair in active if pair[1] != 0],
            tokens=self.describe.tokens(self._strongest(hits), query, with_prototypes=not self.rerank),
            passages=self.describe.passages(self._strongest(passages)),
            documents=self.describe.documents(self._strongest(documents)),
            indexed=self.indexed,
            notes=list(self.notes),
        )

    def _strongest(self, hits: Hits) -> Hits:
        return hits.strongest(self.top, self.opposing)

    def _ids(self, text: str, name: str = "text", continued: bool = False) -> list[int]:
        if not text:
            raise UserError(f"the {name.removeprefix('--')} is empty: give some text")
        return encode(self.tokenizer, text, continued)

    def _prompt_ids(self, prompt: str, new_tokens: int) -> list[int]:
        room = self.model.config.context_length - new_tokens
        if room < 1:
            raise UserError(
                f"{new_tokens} new tokens leave no room for a prompt in the context of"
                f" {self.model.config.context_length}: lower --max_new_tokens"
            )
        return self._cut(self._ids(prompt, "prompt"), room, "prompt")

    def _cut(self, ids: list[int], room: int, name: str) -> list[int]:
        """Return the last tokens that fit, after those that begin every text; a note says what was cut."""
        self.notes = []
        over = len(ids) - room
        if over <= 0:
            return ids
        beginning = beginning_ids(self.tokenizer)
        cut = token_text(self.tokenizer, ids[len(beginning) : len(beginning) + over])
        self.notes = [f"the {name} has {len(ids)} tokens, {room} fit: its first {over} were cut, up to {cut[-40:]!r}"]
        return beginning + ids[len(beginning) + over :]


def indexed_text(store: TokenStore) -> str:
    """Return the size and the names of the text of an index, for people."""
    inputs = store.manifest.get("inputs", {})  # a store in memory has none
    names = ["Python's standard library"] if "standard_library" in inputs else list(inputs.get("files", {}))
    names = names or [str(inputs.get("dataset", "a text without a name"))]
    more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    return f"{store.counts['documents']:,} documents of {names[0]}{more}"


def training_note(run: RunPaths, store: TokenStore) -> str:
    """Return whether a run trained its model on the text of an index, as the end of a sentence; "" where unknown."""
    trained_on = (read_json(run.environment) or {}).get("data_fingerprint")
    if trained_on is None:
        return ""
    is_retrofit = run.recipe.is_file() and run.recipe.read_text().startswith("retrofit:")
    if trained_on == store.manifest["fingerprint"] and not is_retrofit:
        return ", which the model was trained on"
    return ", which this run did not train the model on"


def default_index(run: Path) -> Path:
    """Return the path of a run's index, RUN/index."""
    return RunPaths.of(run).index
