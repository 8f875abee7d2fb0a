"""What one token tells the prototypes: the gradient of its loss with respect to each active prototype (section 4.1).

Shapes: N tokens, C of them in a chunk, D hidden size, V vocabulary, K prototypes, k active, r vectors per token, c
entries of a gradient with respect to the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prism_lightning.attribution.curvature.dictionary import Dictionary

# One chunk of the head's probabilities; the whole [N, V] matrix is never held.
CHUNK_BYTES = 32 * 2**20
CACHED_BYTES = 4 * 2**20  # on a CPU: losses at V 4,096 took 31 microseconds a token in chunks of 32 MB, 18 in these
FEWEST = 32  # tokens of a chunk: below this the product with the head slows down


class Records(NamedTuple):
    """Gradients of N tokens' losses: token t has g_ti = activations[t, i] * vectors[t, 0] on the value path.

    With the activation path there is one vector per active prototype, and it is g_ti itself.
    """

    prototypes_Nk: Tensor
    activations_Nk: Tensor
    vectors_NrD: Tensor
    activation_path: bool

    def gradients_NkD(self) -> Tensor:
        """g_ti of every active prototype."""
        if self.activation_path:
            return self.vectors_NrD
        return self.activations_Nk[..., None] * self.vectors_NrD

    def arrays(self, which: slice) -> list[np.ndarray]:
        """What `HiddenIndex.query` takes, of some tokens."""
        tensors = (self.prototypes_Nk, self.activations_Nk.float(), self.vectors_NrD.float())
        return [tensor[which].cpu().numpy() for tensor in tensors]


class LogitRecords(NamedTuple):
    """The same in the space of logits: g_ti has -activations[t, i] * residuals[t, c] at entry targets[t, c]."""

    prototypes_Nk: Tensor
    activations_Nk: Tensor
    targets_Nc: Tensor
    residuals_Nc: Tensor

    def arrays(self, which: slice) -> list[np.ndarray]:
        """What `LogitIndex.query` takes, of some tokens."""
        tensors = (self.prototypes_Nk, self.activations_Nk.float(), self.targets_Nc, self.residuals_Nc.float())
        return [tensor[which].cpu().numpy() for tensor in tensors]


class HeadChunk(NamedTuple):
    """The head's predictions for some rows of z."""

    rows: slice
    probabilities_CV: Tensor
    mean_CD: Tensor  # sum_v pi_v W_v


def chunk_size(head_VD: Tensor) -> int:
    """Tokens whose probabilities are held at once."""
    token = head_VD.element_size() * head_VD.shape[0]
    if head_VD.device.type == "cpu":
        return max(1, min(CHUNK_BYTES // token, max(FEWEST, CACHED_BYTES // token)))
    return max(1, CHUNK_BYTES // token)


def head_chunks(head_VD: Tensor, z_ND: Tensor) -> Iterator[HeadChunk]:
    """Predicted probabilities and the head rows' mean under them, a bounded number of tokens at a time."""
    size = chunk_size(head_VD)
    for start in range(0, z_ND.shape[0], size):
        rows = slice(start, start + size)
        probabilities_CV = (z_ND[rows] @ head_VD.T).softmax(-1)
        yield HeadChunk(rows, probabilities_CV, probabilities_CV @ head_VD)


def token_losses(head_VD: Tensor, z_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy [N] of every target, in nats."""
    size = chunk_size(head_VD)
    parts = zip(z_ND.split(size), targets_N.split(size), strict=True)
    return torch.cat([F.cross_entropy(z_CD @ head_VD.T, targets_C, reduction="none") for z_CD, targets_C in parts])


def surprise(head_VD: Tensor, z_ND: Tensor, targets_N: Tensor) -> Tensor:
    """1 - pi [N] of every target: minus the gradient of its loss with respect to its own logit."""
    return -torch.expm1(-token_losses(head_VD, z_ND, targets_N))


def residuals(head_VD: Tensor, z_ND: Tensor, targets_N: Tensor, competitors: int = 0) -> tuple[Tensor, Tensor]:
    """Entries of e_y - pi: the target's, and those of the likeliest other tokens; tokens and values [N, 1 + c].

    Args:
        head_VD, z_ND, targets_N: W, hidden states and targets.
        competitors: c.
    """
    tokens_N1, values_N1 = targets_N[:, None], surprise(head_VD, z_ND, targets_N)[:, None]
    if not competitors:
        return tokens_N1, values_N1
    parts = []
    for z_CD, own_C1 in zip(z_ND.split(chunk_size(head_VD)), tokens_N1.split(chunk_size(head_VD)), strict=True):
        parts.append(likeliest_others((z_CD @ head_VD.T).softmax(-1), own_C1, competitors))
    others_Nc, pi_Nc = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return torch.cat([tokens_N1, others_Nc], 1), torch.cat([values_N1, -pi_Nc], 1)


def likeliest_others(probabilities_CV: Tensor, own_C1: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens and probabilities [C, c] of those that were likeliest, the targets left out."""
    values_Cc, tokens_Cc = probabilities_CV.scatter(1, own_C1, -1.0).topk(count, dim=1)
    return tokens_Cc, values_Cc


def loss_gradient(head_VD: Tensor, mean_ND: Tensor, targets_N: Tensor) -> Tensor:
    """delta_t = dCE/dz = W^T (pi_t - e_y), from the mean of W's rows under pi_t."""
    return mean_ND - head_VD[targets_N]


def contrast_gradient(head_VD: Tensor, chosen_N: Tensor, other_N: Tensor) -> Tensor:
    """d(logit_other - logit_chosen)/dz: what lowers it makes the chosen token likelier than the other."""
    return head_VD[other_N] - head_VD[chosen_N]


def records_of(
    dictionary: Dictionary,
    z_ND: Tensor,
    delta_ND: Tensor,
    activation_path: bool,
    reconstruction_scale: float = 0.0,
    assigned: tuple[Tensor, Tensor] | None = None,
) -> Records:
    """Records of tokens with hidden states z whose loss has the gradient delta with respect to them.

    Args:
        dictionary: the prototypes.
        z_ND, delta_ND: hidden states, and the gradient of the loss (or of a contrast) there.
        activation_path: add (delta . p_i) da_ti/dp_i, the gradient through the activation.
        reconstruction_scale: 2 w_rec / mean ||z||^2 where the objective's L_rec counts, else 0.
        assigned: prototypes and activations [N, k], where they are known already.
    """
    indices_Nk, activations_Nk = assigned or dictionary.assign(z_ND)
    if reconstruction_scale:
        residual_ND = z_ND - dictionary.mixture(indices_Nk, activations_Nk)
        delta_ND = delta_ND - reconstruction_scale * residual_ND
    if not activation_path:
        return Records(indices_Nk, activations_Nk, delta_ND[:, None], False)
    unit_z_ND, vectors = F.normalize(z_ND, dim=-1), []
    for i_N, a_N in zip(indices_Nk.unbind(-1), activations_Nk.unbind(-1), strict=True):
        # d cos(z, p)/dp = (z/|z| - cos p/|p|) / |p|, and delta . p times that; zero where ReLU cut the cosine off.
        slope_N = (delta_ND * dictionary.unit_KD[i_N]).sum(-1) * (a_N > 0)
        turned_ND = unit_z_ND - a_N[:, None] * dictionary.unit_KD[i_N]
        vectors.append(a_N[:, None] * delta_ND + slope_N[:, None] * turned_ND)
    return Records(indices_Nk, activations_Nk, torch.stack(vectors, dim=1), True)
