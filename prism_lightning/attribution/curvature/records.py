"""Records of tokens: the gradient of a token's loss with respect to each active prototype (section 4.1).

Shapes: N tokens, C of them in a chunk, D hidden size, V vocabulary, K prototypes, k active,
c entries of a gradient with respect to the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Size of one chunk of the head's probabilities; the whole [N, V] matrix is never in memory.
CHUNK_BYTES = 32 * 2**20
CACHED_BYTES = 4 * 2**20  # on a CPU; at V = 4,096 a loss took 31 microseconds in chunks of 32 MB, 18 in these
MIN_CHUNK_TOKENS = 128  # fewer slow the product with the head: at V 49,152, 2.6 ms a token with 128 and 4.7 with 32

LogitsOf = Callable[[Tensor], Tensor]  # logits [C, V] of hidden states [C, D]


class Records(NamedTuple):
    """Gradients of N tokens' losses: token t has g_ti = activations[t, i] * delta[t] for its i-th active prototype."""

    prototypes_Nk: Tensor
    activations_Nk: Tensor
    delta_ND: Tensor

    def gradients_NkD(self) -> Tensor:
        """Return g_ti of every active prototype."""
        return self.activations_Nk[..., None] * self.delta_ND[:, None]

    def arrays(self, selection: slice) -> list[np.ndarray]:
        """Return the arguments of `HiddenIndex.query` for some tokens."""
        tensors = (self.prototypes_Nk, self.activations_Nk.float(), self.delta_ND.float())
        return [tensor[selection].cpu().numpy() for tensor in tensors]


class LogitRecords(NamedTuple):
    """The same in the space of logits: entry targets[t, c] of g_ti is -activations[t, i] * residuals[t, c]."""

    prototypes_Nk: Tensor
    activations_Nk: Tensor
    targets_Nc: Tensor
    residuals_Nc: Tensor

    def arrays(self, selection: slice) -> list[np.ndarray]:
        """Return the arguments of `LogitIndex.query` for some tokens."""
        tensors = (self.prototypes_Nk, self.activations_Nk.float(), self.targets_Nc, self.residuals_Nc.float())
        return [tensor[selection].cpu().numpy() for tensor in tensors]


class Residuals(NamedTuple):
    """Losses of N tokens in nats, and entries of their negative gradients with respect to the logits."""

    losses_N: Tensor
    tokens_Nc: Tensor  # the target first
    values_Nc: Tensor


class HeadChunk(NamedTuple):
    """The head's predictions for some rows of z."""

    rows: slice
    probabilities_CV: Tensor
    mean_CD: Tensor  # sum_v pi_v W_v


def chunk_size(head_VD: Tensor) -> int:
    """Return the number of tokens whose probabilities are in memory at once."""
    token = head_VD.element_size() * head_VD.shape[0]
    if head_VD.device.type == "cpu":
        return max(1, min(CHUNK_BYTES // token, max(MIN_CHUNK_TOKENS, CACHED_BYTES // token)))
    return max(1, CHUNK_BYTES // token)


def head_chunks(head_VD: Tensor, z_ND: Tensor) -> Iterator[HeadChunk]:
    """Yield predicted probabilities and the head rows' mean under them, a bounded number of tokens at a time."""
    size = chunk_size(head_VD)
    for start in range(0, z_ND.shape[0], size):
        rows = slice(start, start + size)
        probabilities_CV = (z_ND[rows] @ head_VD.T).softmax(-1)
        yield HeadChunk(rows, probabilities_CV, probabilities_CV @ head_VD)


def log_probability_chunks(
    head_VD: Tensor, z_ND: Tensor, logits_of: LogitsOf | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of rows and their log-probabilities [C, V], a bounded number of tokens at a time.

    Args:
        head_VD, z_ND: W and hidden states.
        logits_of: computes the logits where they are not W z, as with an intervention (`PrismForCausalLM.logits`).
    """
    size = chunk_size(head_VD)
    for start in range(0, len(z_ND), size):
        rows = slice(start, start + size)
        logits_CV = z_ND[rows] @ head_VD.T if logits_of is None else logits_of(z_ND[rows])
        yield rows, logits_CV.log_softmax(-1)


def residuals(
    head_VD: Tensor, z_ND: Tensor, targets_N: Tensor, competitors: int = 0, logits_of: LogitsOf | None = None
) -> Residuals:
    """Return losses, and the entries of e_y - pi at the target and at the likeliest other tokens.

    Args:
        head_VD, z_ND, targets_N: W, hidden states and targets.
        competitors: c - 1, the number of likeliest other tokens.
        logits_of: see `log_probability_chunks`.
    """
    parts = []
    for rows, log_p_CV in log_probability_chunks(head_VD, z_ND, logits_of):
        tokens_C1 = targets_N[rows, None]
        losses_C1 = -log_p_CV.gather(1, tokens_C1)
        tokens, values = [tokens_C1], [-torch.expm1(-losses_C1)]
        if competitors:
            others_Cc, pi_Cc = likeliest_others(log_p_CV.exp(), tokens_C1, competitors)
            tokens, values = [*tokens, others_Cc], [*values, -pi_Cc]
        parts.append(Residuals(losses_C1[:, 0], torch.cat(tokens, 1), torch.cat(values, 1)))
    return Residuals(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def target_error_probability(head_VD: Tensor, z_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Return 1 - pi [N] of every target: the negative gradient of its loss with respect to its own logit."""
    return residuals(head_VD, z_ND, targets_N).values_Nc[:, 0]


def likeliest_others(probabilities_CV: Tensor, own_C1: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the likeliest tokens and their probabilities [C, c], without the targets."""
    values_Cc, tokens_Cc = probabilities_CV.scatter(1, own_C1, -1.0).topk(count, dim=1)
    return tokens_Cc, values_Cc


def loss_gradients(
    head_VD: Tensor, z_ND: Tensor, targets_N: Tensor, logits_of: LogitsOf | None = None
) -> tuple[Tensor, Tensor]:
    """Return losses [N] in nats and their gradients delta [N, D] with respect to hidden states; see `residuals`."""
    losses, deltas = [], []
    for rows, log_p_CV in log_probability_chunks(head_VD, z_ND, logits_of):
        losses.append(-log_p_CV.gather(1, targets_N[rows, None])[:, 0])
        deltas.append(loss_gradient(head_VD, log_p_CV.exp() @ head_VD, targets_N[rows]))
    return torch.cat(losses), torch.cat(deltas)


def contrast_losses(
    head_VD: Tensor, z_ND: Tensor, chosen_N: Tensor, other_N: Tensor, logits_of: LogitsOf | None = None
) -> Tensor:
    """Return logit_other - logit_chosen [N]; see `residuals` for the other arguments."""
    parts = []
    for rows, log_p_CV in log_probability_chunks(head_VD, z_ND, logits_of):
        parts.append(log_p_CV.gather(1, other_N[rows, None]) - log_p_CV.gather(1, chosen_N[rows, None]))
    return torch.cat(parts)[:, 0]


def contrast_residuals(chosen_N: Tensor, other_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return a contrast's tokens [N, 2], and the negative gradient of its loss at their logits: 1 and -1."""
    values_N2 = torch.tensor([[1.0, -1.0]], device=chosen_N.device).expand(len(chosen_N), 2)
    return torch.stack([chosen_N, other_N], 1), values_N2


def loss_gradient(head_VD: Tensor, mean_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Return delta_t = dCE/dz = W^T (pi_t - e_y), from the mean of W's rows under pi_t."""
    return mean_ND - head_VD[targets_N]


def contrast_gradient(head_VD: Tensor, chosen_N: Tensor, other_N: Tensor) -> Tensor:
    """Return d(logit_other - logit_chosen)/dz [N, D], the gradient of a contrast's loss."""
    return head_VD[other_N] - head_VD[chosen_N]
