"""TRAK: one ridge regression on projected gradients of sequences' margins, by the library traker.

traker computes the gradients per sequence, the features and the scores; `TRAKer`, which drives them and keeps
intermediate files for each experiment, does not serve queries and is left out.

Shapes: S training sequences, Q queries, B of either, L = T + 1 tokens, V vocabulary, C checkpoints,
P parameters, k dimensions kept, n the power of two that P is padded to.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.attribution.task import PEERS, Method, Queries, Task
from prism_lightning.attribution.index.quantisation import quantised
from prism_lightning.common.errors import UserError
from prism_lightning.common.files import map_file, read_json, write_file
from prism_lightning.models import PrismForCausalLM

FACTOR = 32  # of a Hadamard matrix: products with matrices of this size are quickest
BATCH = 64  # sequences in a forward pass without gradients


class Trak(Method):
    """TRAK with the margins of whole sequences, averaged over checkpoints.

    A sequence's margin is the sum over its targets of log p / (1 - p), a query's the sum weighted by its weights; the
    out-to-loss factor of a training sequence is the mean of 1 - p over its targets, as each term of its loss has one.

    Args:
        task, folder: see `Method`.
        dimension: k.
        damping: ridge penalty (`lambda_reg`) as a share of the mean eigenvalue of X^T X, X the projected gradients.
            traker's own 0 inverts a singular matrix, silently, where k > S, and its float32 fails there below 1e-4.
            May be set between calls of `scores`.
        checkpoints: models to average over, all with the same parameters' shapes; the task's alone by default.
        modules: gradients of all the decoder's parameters, or of the head's weights alone.
        asked: a query is the weighted sum of its targets' "margin"s, as in TRAK, or of their "loss"es: each margin's
            gradient times 1 - p.
        seed: of the projections.
        precision: of the stored features.

    Raises:
        UserError: traker is not installed, or k exceeds the number of parameters.
    """

    def __init__(
        self,
        task: Task,
        folder: Path,
        dimension: int = 4096,
        damping: float = 1.0,
        checkpoints: list[PrismForCausalLM] | None = None,
        modules: Literal["all", "head"] = "all",
        asked: Literal["margin", "loss"] = "margin",
        seed: int = 0,
        precision: Literal["fp16", "fp32"] = "fp16",
    ) -> None:
        super().__init__(task, folder)
        try:
            import trak.gradient_computers
            import trak.score_computers
        except ModuleNotFoundError as error:
            raise UserError(f"method trak needs traker: {PEERS}") from error
        self.dimension, self.damping, self.precision = dimension, damping, precision
        self.seed, self.score_computer, self.asked = seed, trak.score_computers.BasicScoreComputer, asked
        self.gradient_computers = []
        for decoder in [Decoder(model, modules) for model in checkpoints or [task.model]]:
            size = sum(parameter.numel() for parameter in decoder.parameters())
            if dimension > size:
                raise UserError(f"dimension is {dimension}: the model has {size} parameters, give at most that")
            self.gradient_computers.append(
                trak.gradient_computers.IterativeGradientComputer(
                    decoder, SequenceMargin(), size, torch.float32, torch.device("cpu")
                )
            )

    @cached_property
    def projections(self) -> list[HadamardProjection]:
        """One projection per checkpoint, as in `TRAKer`; it is made again from the seed when the state is opened."""
        return [
            HadamardProjection(computer.grad_dim, self.dimension, self.seed + 10_000 * number)
            for number, computer in enumerate(self.gradient_computers)
        ]

    def fit(self) -> None:
        queries = Queries.of_sequences(self.task.train_SL)
        # Not part of the state: it serves changes of the damping.
        write_file(self.folder / "gradients.safetensors", {"gradients": self._gradients_CBk(queries).numpy()})
        features_CSk = self._finalised()
        # Only ratios matter in float16: features may be smaller than its smallest number.
        scale_C = features_CSk.abs().amax((1, 2))
        stored_CSk, _ = quantised((features_CSk / scale_C[:, None, None]).numpy(), self.precision)
        weight_S = self._out_to_loss_S(queries)
        tensors = {"features": stored_CSk, "scale": scale_C.numpy(), "out_to_loss": weight_S.numpy()}
        write_file(self.folder / "features.safetensors", tensors, damping=self.damping)

    def open(self) -> None:
        path = self.folder / "features.safetensors"
        tensors = {name: torch.from_numpy(tensor.astype(np.float32)) for name, tensor in map_file(path).items()}
        self.features_CSk = tensors["features"] * tensors["scale"][:, None, None]
        self.out_to_loss_S = tensors["out_to_loss"]
        self.finalised_with = (read_json(path.with_suffix(".json")) or {})["damping"]

    def scores(self, queries: Queries) -> Tensor:
        if self.damping != self.finalised_with:
            self.features_CSk, self.finalised_with = self._finalised(), self.damping
        num_targets = int(queries.weights_QT.any(0).nonzero().max()) + 1  # what follows the last target does not matter
        queries = Queries(queries.ids_QL[:, : num_targets + 1], queries.weights_QT[:, :num_targets])
        queries_CQk = self._gradients_CBk(queries, self.asked == "loss")
        scores_SQ = torch.zeros(self.features_CSk.shape[1], queries_CQk.shape[1])
        for features_Sk, queries_Qk in zip(self.features_CSk, queries_CQk, strict=True):
            self._score_computer().get_scores(features_Sk, queries_Qk, scores_SQ)
        return (scores_SQ * self.out_to_loss_S[:, None] / len(self.features_CSk)).T

    def state_bytes(self) -> int:
        """Return the bytes on disk that queries read; the gradients, kept for other dampings, are not among them."""
        return sum(path.stat().st_size for path in self.folder.glob("features.*"))

    @torch.enable_grad()
    def _gradients_CBk(self, queries: Queries, of_loss: bool = False) -> Tensor:
        """Projected gradients of the margins, or of minus the losses, normalised as `TRAKer` does."""
        rows_CBk = torch.empty(len(self.projections), len(queries.ids_QL), self.dimension)
        for rows_Bk, computer, projection in zip(rows_CBk, self.gradient_computers, self.projections, strict=True):
            # One at a time: on a CPU as fast as torch.func over 16, and twice as fast for one query.
            for number, row_k in enumerate(rows_Bk):
                ids_1L, weights_1T = queries.part(number, number + 1)
                if of_loss:
                    weights_1T = weights_1T * target_error_probabilities(computer.model, ids_1L)
                gradient_P = computer.compute_per_sample_grad((ids_1L, weights_1T))[0]
                row_k[:] = projection.project(gradient_P) / len(gradient_P) ** 0.5
        return rows_CBk

    @torch.no_grad()
    def _out_to_loss_S(self, queries: Queries) -> Tensor:
        parts = [queries.part(start, start + BATCH) for start in range(0, len(queries.ids_QL), BATCH)]
        weights_CS1 = [torch.cat([c.compute_loss_grad(tuple(part)) for part in parts]) for c in self.gradient_computers]
        return torch.stack(weights_CS1).mean(0)[:, 0]

    def _finalised(self) -> Tensor:
        """Features X (X^T X + lambda)^-1 of every checkpoint, [C, S, k]."""
        features = []
        for gradients_Sk in map_file(self.folder / "gradients.safetensors")["gradients"]:
            rows_Sk = torch.from_numpy(gradients_Sk.copy())
            penalty = self.damping * float(rows_Sk.square().sum()) / self.dimension
            computer = self._score_computer(penalty)
            features.append(computer.get_x_xtx_inv(rows_Sk, computer.get_xtx(rows_Sk)))
        return torch.stack(features)

    def _score_computer(self, penalty: float = 0.0) -> Any:
        return self.score_computer(torch.float32, torch.device("cpu"), logging_level="ERROR", lambda_reg=penalty)


class Decoder(nn.Module):
    """Logits of a model as a function of its decoder and head alone, without prototypes."""

    def __init__(self, model: PrismForCausalLM, modules: str = "all") -> None:
        super().__init__()
        self.decoder = (model.backbone,)  # a tuple: not among the parameters
        if modules == "all":
            self.backbone = model.backbone
        self.head = model.lm_head

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        """Return logits [B, T, V]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and "backbone" in self._modules):
            z_BTD = self.decoder[0](input_ids=input_ids_BT, use_cache=False).last_hidden_state
        return self.head(z_BTD)


@torch.no_grad()
def target_error_probabilities(decoder: nn.Module, ids_BL: Tensor) -> Tensor:
    """Return 1 - p [B, T] of every target."""
    p_BTV = decoder(ids_BL[:, :-1]).float().softmax(-1)
    return 1 - p_BTV.gather(-1, ids_BL[:, 1:, None])[..., 0]


class SequenceMargin:
    """The output that TRAK regresses on, with the interface of traker's `AbstractModelOutput`."""

    @staticmethod
    def get_output(decoder: nn.Module, parameters: None, buffers: None, ids_BL: Tensor, weights_BT: Tensor) -> Tensor:
        """Return margins [B]: sum_t w_t (logit of the target - logsumexp of all others)."""
        logits_BTV, targets_BT1 = decoder(ids_BL[:, :-1]).float(), ids_BL[:, 1:, None]
        others_BT = logits_BTV.scatter(-1, targets_BT1, -torch.inf).logsumexp(-1)
        return ((logits_BTV.gather(-1, targets_BT1)[..., 0] - others_BT) * weights_BT).sum(1)

    @staticmethod
    def get_out_to_loss_grad(
        decoder: nn.Module, parameters: None, buffers: None, batch: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the mean of 1 - p over the targets, [B, 1]."""
        return target_error_probabilities(decoder, batch[0]).mean(1, keepdim=True)


class HadamardProjection:
    """Random signs, then k random rows of a Hadamard matrix: entries +-1, as in traker's Rademacher projection.

    Such a fast Johnson-Lindenstrauss transform (Ailon and Chazelle, 2009) keeps inner products as well as independent
    signs do, in n log n operations. traker's projector for CPUs draws a P x k matrix, 12 GB for 0.7 M parameters and
    k = 4,096, anew for each batch.
    """

    def __init__(self, parameters: int, dimension: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.size = 2 ** max(1, (parameters - 1).bit_length())
        self.signs_P = torch.randint(0, 2, (parameters,), generator=generator).float() * 2 - 1
        self.kept_k = torch.randperm(self.size, generator=generator)[:dimension]

    def project(self, gradient_P: Tensor) -> Tensor:
        """Return the projection [k] of a gradient."""
        padded_n = torch.zeros(self.size)
        torch.mul(gradient_P, self.signs_P, out=padded_n[: len(gradient_P)])
        return hadamard(padded_n)[self.kept_k]


def hadamard(vector_n: Tensor) -> Tensor:
    """Return the product of a Hadamard matrix of entries +-1 with a vector whose length is a power of two."""
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    stride = 1
    while stride < len(vector_n):
        matrix = torch.ones(1, 1)
        while len(matrix) < min(FACTOR, len(vector_n) // stride):
            matrix = torch.kron(pair, matrix)
        parts = vector_n.view(-1, len(matrix), stride)
        vector_n = (parts[..., 0] @ matrix if stride == 1 else matrix @ parts).reshape(-1)
        stride *= len(matrix)
    return vector_n
