"""Influence functions with an EK-FAC curvature, by the library kronfluence: g_q^T (H + damping)^-1 g_s over the layers.

Only the curvature is stored: every call of `scores` takes a pass over all training sequences.
"""

from __future__ import annotations

import copy
import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.attribution.task import PEERS, Method, Queries, Task, query_loss
from prism_lightning.common.errors import UserError
from prism_lightning.models import PrismForCausalLM


class EkFac(Method):
    """Influence of every sequence on a query, through all linear layers of the decoder.

    A sequence's gradient g_s is that of its targets' summed cross-entropies, a query's that of its weighted sum. The
    curvature is the Fisher matrix with labels drawn from the model, one block a layer:

    - "ekfac": in the eigenbases of the layer's input and output-gradient covariances (means over tokens), the mean over
      sequences of a sequence's squared gradient. It is of a whole sequence, hence about T times that of "kfac".
    - "kfac": the products of the two covariances' eigenvalues, which are of one token.
    - "diagonal": the mean over sequences of the squared gradient, weight by weight.
    - "identity": none; scores are g_q . g_s, and nothing is fitted.

    A share of the layer's mean value is added to each of these values before they divide.

    Args:
        task, folder: see `Method`.
        strategy: the curvature.
        damping: that share, a tenth in the library. (One absolute number for all layers, its alternative, is too much
            for some layers where it is right for others.) May be changed between calls of `scores`.
        rank: of each layer's divided query gradient, cut by a singular value decomposition to save memory where many
            queries share a pass; None keeps them whole, 4 bytes a weight and query.
        modules: the attention and MLP layers, or these and the head, or the head alone.
        train_batch: sequences in a forward and backward pass.
        query_batch: queries in one.
        queries_per_pass: a pass over the training sequences answers so many queries at once (rounded up to batches).
        seed: of the drawn labels.

    Raises:
        UserError: kronfluence is not installed, or the decoder's layers are no `nn.Linear`.
    """

    def __init__(
        self,
        task: Task,
        folder: Path,
        strategy: Literal["ekfac", "kfac", "diagonal", "identity"] = "ekfac",
        damping: float = 0.1,
        rank: int | None = None,
        modules: Literal["layers", "layers+head", "head"] = "layers",
        train_batch: int = 32,
        query_batch: int = 64,
        queries_per_pass: int = 512,
        seed: int = 0,
    ) -> None:
        try:
            import kronfluence  # noqa: F401
        except ImportError as error:
            raise UserError(f"method ekfac needs kronfluence: {PEERS}") from error
        super().__init__(task, folder)
        self.strategy, self.damping, self.rank, self.seed = strategy, damping, rank, seed
        self.train_batch, self.query_batch, self.queries_per_pass = train_batch, query_batch, queries_per_pass
        self.language = LanguageTask(_linear_layers(task.model, modules))

    def fit(self) -> None:
        from kronfluence.utils.constants import COVARIANCE_FACTOR_NAMES

        analyzer = self._analyzer()
        self.language.generator = torch.Generator(self.task.model.device).manual_seed(self.seed)
        with _quiet():
            analyzer.fit_all_factors(
                self.strategy,
                TensorDataset(self.task.train_SL),
                per_device_batch_size=self.train_batch,
                factor_args=self._factor_arguments(),
                overwrite_output_dir=True,
            )
        for name in COVARIANCE_FACTOR_NAMES:  # only their eigenbases answer queries
            (analyzer.factors_output_dir(self.strategy) / f"{name}.safetensors").unlink(missing_ok=True)

    def open(self) -> None:
        self.analyzer = self._analyzer()
        self.factors = self.analyzer.load_all_factors(self.strategy)

    def scores(self, queries: Queries) -> Tensor:
        from kronfluence.arguments import ScoreArguments
        from kronfluence.score.pairwise import compute_pairwise_scores_with_loaders

        arguments = ScoreArguments(
            damping_factor=None,  # `_damped` sets it
            query_gradient_low_rank=self.rank,
            use_full_svd=True,  # closer than the randomised one, and the same in every call
            query_gradient_accumulation_steps=-(-self.queries_per_pass // self.query_batch),
        )
        # Not `compute_pairwise_scores`, which would read all factors again, and write the scores to files.
        with _quiet(), _damped(self.damping):
            scores_by_module = compute_pairwise_scores_with_loaders(
                loaded_factors=self.factors,
                model=self.analyzer.model,
                state=self.analyzer.state,
                task=self.language,
                query_loader=DataLoader(TensorDataset(*queries), self.query_batch),
                per_device_query_batch_size=self.query_batch,
                train_loader=DataLoader(TensorDataset(self.task.train_SL), self.train_batch),
                score_args=arguments,
                factor_args=self._factor_arguments(),
                tracked_module_names=None,
                disable_tqdm=True,
            )
        return scores_by_module["all_modules"]

    def _factor_arguments(self) -> Any:
        from kronfluence.arguments import FactorArguments

        return FactorArguments(strategy=self.strategy, covariance_max_examples=None, lambda_max_examples=None)

    def _analyzer(self) -> Any:
        """Return the library's interface to a copy of the model, whose layers it wraps in place."""
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.utils.state import State

        logging.getLogger("kronfluence").setLevel(logging.ERROR)
        model = copy.deepcopy(self.task.model)
        # The library finds layers by their exact type; the head's own computation of a loss is not used here.
        head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False, device="meta")
        head.weight = model.lm_head.weight
        model.lm_head = head
        State._reset_state()  # one per process, which would keep the device of the first model
        on_cpu = self.task.model.device.type == "cpu"
        prepared = prepare_model(model, self.language)
        return Analyzer("", prepared, self.language, cpu=on_cpu, disable_tqdm=True, output_dir=str(self.folder))


class LanguageTask:
    """The differentiated losses, with the interface of kronfluence's `Task`; its base class may not be installed.

    Args:
        layers: names of the modules whose weights count.
    """

    enable_post_process_per_sample_gradient = False
    generator: torch.Generator | None = None  # of drawn labels

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers

    def compute_train_loss(self, batch: list[Tensor], model: PrismForCausalLM, sample: bool = False) -> Tensor:
        """Return the summed loss; a mean would give the sequences of a short last batch more weight."""
        (ids_BL,) = batch
        logits_NV = model(ids_BL[:, :-1], use_cache=False).logits.flatten(0, 1)
        targets_N = ids_BL[:, 1:].flatten()
        if sample:
            targets_N = self.draw(logits_NV.detach())
        return F.cross_entropy(logits_NV, targets_N, reduction="sum")

    def draw(self, logits_NV: Tensor) -> Tensor:
        """Draw tokens [N] from the model's distribution, with which the curvature is the Fisher matrix."""
        total_NV = logits_NV.softmax(-1).cumsum(-1)  # torch.multinomial takes 20 times as long
        at_N1 = torch.rand(len(total_NV), 1, generator=self.generator, device=total_NV.device) * total_NV[:, -1:]
        return torch.searchsorted(total_NV, at_N1, right=True)[:, 0].clamp(max=total_NV.shape[1] - 1)

    def compute_measurement(self, batch: list[Tensor], model: PrismForCausalLM) -> Tensor:
        """Return the summed loss of all queries in the batch."""
        return query_loss(model, Queries(*batch)).sum()

    def get_influence_tracked_modules(self) -> list[str]:
        """Return the names of the layers."""
        return self.layers

    def get_attention_mask(self, batch: list[Tensor]) -> None:
        """Return None: no sequence is padded."""


def _linear_layers(model: PrismForCausalLM, modules: str) -> list[str]:
    layers = [f"backbone.{name}" for name, part in model.backbone.named_modules() if isinstance(part, nn.Linear)]
    if not layers:
        kind = model.config.get_text_config().model_type
        raise UserError(f"method ekfac needs a decoder of nn.Linear layers, which {kind} is not: take llama")
    return {"layers": layers, "layers+head": [*layers, "lm_head"], "head": ["lm_head"]}[modules]


@contextmanager
def _damped(share: float) -> Iterator[None]:
    """Set the library's damping to a share of each layer's mean value; it has no argument for it."""
    from kronfluence.factor import config

    usual = config.HEURISTIC_DAMPING_SCALE
    config.HEURISTIC_DAMPING_SCALE = share
    try:
        yield
    finally:
        config.HEURISTIC_DAMPING_SCALE = usual


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the library's deprecation warnings, and most of the time that it spends on garbage collection."""
    gc.freeze()  # each collection, around every pass over the data, takes 0.2 s with all of torch's objects
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        gc.unfreeze()
