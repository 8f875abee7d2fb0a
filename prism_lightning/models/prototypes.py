"""The prototype layer: a sparse, non-negative mixture of learned prototypes for every hidden state.

Shape suffixes: N tokens, C tokens of a chunk, D hidden size, K prototypes, k active prototypes per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prism_lightning.models.encoders import CosineEncoder, Encoder, EncoderName, PursuitEncoder
from prism_lightning.models.pursuit import Likeliest, likeliest_tokens, weighted_errors

# Size of one [C, K] block of cosines in the search for the nearest prototypes. The whole [N, K] matrix would take 2 GiB
# in fp32 at K = 16,384 and 32k tokens per step.
SEARCH_CHUNK_BYTES = 64 * 2**20


class Mixture(NamedTuple):
    """The mixtures of prototypes for N hidden states (method, section 2)."""

    indices_Nk: Tensor  # S_t, the active prototypes, best first
    activations_Nk: Tensor  # a_ti >= 0: max(cos, 0), or coefficients of the pursuit
    mixture_ND: Tensor  # zhat_t = sum_i a_ti p_i


class PrototypeTerms(NamedTuple):
    """The objective's prototype terms, each differentiable (method, section 3)."""

    reconstruction: Tensor  # L_rec, the fraction of variance unexplained; of a pursuit in its metric
    prototype_to_token: Tensor  # L_p2t
    token_to_prototype: Tensor  # L_t2p
    value_mixture_ND: Tensor | None  # zhat with constant activations; only if the cross-entropy trains P


def nearest_prototypes(z_ND: Tensor, prototypes_KD: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k prototypes with the largest cosine for every row of z, and the nearest row of z for every prototype.

    Args:
        z_ND: hidden states with unit rows.
        prototypes_KD: prototypes with unit rows.
        k: number of prototypes per token.

    Returns:
        Cosines [N, k] in descending order, prototype indices [N, k], and row indices of z [K].
    """
    num_prototypes = prototypes_KD.shape[0]
    rows = max(1, SEARCH_CHUNK_BYTES // (4 * num_prototypes))
    best_K = torch.full((num_prototypes,), -torch.inf, device=z_ND.device)
    token_of_K = torch.zeros(num_prototypes, dtype=torch.long, device=z_ND.device)
    cosines, indices = [], []
    for start in range(0, z_ND.shape[0], rows):
        cosine_CK = z_ND[start : start + rows] @ prototypes_KD.T
        cosine_Ck, index_Ck = cosine_CK.topk(k, dim=-1)
        cosines.append(cosine_Ck)
        indices.append(index_Ck)
        chunk_best_K, chunk_token_K = column_max(cosine_CK)
        closer_K = chunk_best_K > best_K
        best_K = torch.where(closer_K, chunk_best_K.float(), best_K)
        token_of_K = torch.where(closer_K, chunk_token_K + start, token_of_K)
    return torch.cat(cosines), torch.cat(indices), token_of_K


# Type of `nearest_prototypes`, for replacements of it.
Search = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


def column_max(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maximum of every column and its row; if several rows have it, one of them."""
    if x_NK.is_cuda:
        best_K, row_K = x_NK.max(dim=0)
        return best_K, row_K
    # torch.max takes 12 ms for 2,048 x 2,048 on 2 CPU cores, two fifths of the whole layer; this takes 4 ms.
    best_K = x_NK.amax(dim=0)
    rows, columns = (x_NK == best_K).nonzero(as_tuple=True)
    row_K = torch.zeros_like(best_K, dtype=torch.long)
    row_K[columns] = rows
    return best_K, row_K


def selected_dots(x_ND: Tensor, rows_KD: Tensor, indices_Nk: Tensor) -> Tensor:
    """Return dot products [N, k] of every row of x with its k selected rows, without a [N, k, D] tensor."""
    return torch.stack([(x_ND * rows_KD[column_N]).sum(-1) for column_N in indices_Nk.unbind(-1)], dim=-1)


class _SelectedCosines(torch.autograd.Function):
    """The cosines that the search returned, with their gradient; the [N, K] matrix is neither kept nor rebuilt."""

    @staticmethod
    def forward(ctx, z_ND, prototypes_KD, cosines_Nk, indices_Nk):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(z_ND, prototypes_KD, indices_Nk)
        return cosines_Nk.clone()

    @staticmethod
    def backward(ctx, grad_Nk):  # type: ignore[no-untyped-def]
        # cos_nk = <z_n, p_index(n,k)>. So dz is the mixture of P with weights grad, and dP is the gradient of that
        # mixture towards P for an incoming z: embedding_bag computes both without a [N, k, D] tensor.
        z_ND, prototypes_KD, indices_Nk = ctx.saved_tensors
        with torch.enable_grad():
            table_KD = prototypes_KD.detach().requires_grad_()
            grad_z_ND = mix(indices_Nk, grad_Nk.to(table_KD.dtype), table_KD)
            (grad_prototypes_KD,) = torch.autograd.grad(grad_z_ND, table_KD, z_ND.to(grad_z_ND.dtype))
        return grad_z_ND.detach().to(z_ND.dtype), grad_prototypes_KD, None, None


def mix(indices_Nk: Tensor, activations_Nk: Tensor, rows_KD: Tensor) -> Tensor:
    """Return sum_k activations[n, k] * rows[indices[n, k]], shape [N, D]."""
    return F.embedding_bag(indices_Nk, rows_KD, per_sample_weights=activations_Nk.to(rows_KD.dtype), mode="sum")


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):  # type: ignore[no-untyped-def]
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Return x with its gradient multiplied by `scale`; 0 detaches."""
    return x.detach() if scale == 0 else _ScaleGradient.apply(x, scale)


class _RouteCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_ND, mixture_ND):  # type: ignore[no-untyped-def]
        ctx.mixture_dtype = mixture_ND.dtype
        return z_ND.view_as(z_ND)

    @staticmethod
    def backward(ctx, delta_ND):  # type: ignore[no-untyped-def]
        return delta_ND, delta_ND.to(ctx.mixture_dtype)


def route_cross_entropy(z_ND: Tensor, mixture_ND: Tensor) -> Tensor:
    """Return z, with the gradient routing of method, section 2.

    In the backward pass, delta = dCE/dz goes unchanged to z and also to the mixture, which passes a_ti delta_t on to
    each active prototype.
    """
    return _RouteCrossEntropy.apply(z_ND, mixture_ND)


class PrototypeLayer(nn.Module):
    """K prototypes in the space of the final hidden state (method, section 2).

    Of strategies that shard parameters, `forward` alone gathers the weight.

    Args:
        num_prototypes: K.
        hidden_size: D.
        active: k, the largest number of prototypes that are active for one token.
        encoder: how they are chosen; the buffer `metric` of a pursuit is saved with the weights.
    """

    metric: Tensor | None  # F [D, D] of `PursuitEncoder`

    def __init__(self, num_prototypes: int, hidden_size: int, active: int, encoder: EncoderName = "cosine") -> None:
        super().__init__()
        self.active = active
        self.register_buffer("metric", torch.eye(hidden_size) if encoder == "pursuit" else None)
        self.search: Search = nearest_prototypes
        self.weight = nn.Parameter(torch.empty(num_prototypes, hidden_size))
        with torch.random.fork_rng(devices=[]):  # a dense twin then draws the same head
            nn.init.normal_(self.weight, std=0.02)

    def forward(
        self,
        z_ND: Tensor,
        commitment: float | None = None,
        value_path: bool = False,
        gradient_scale: float = 1.0,
        head_VD: Tensor | None = None,
    ) -> tuple[Mixture, PrototypeTerms | None]:
        """Return the mixture and, if `commitment` is not None, the objective's prototype terms.

        Args:
            z_ND: hidden states.
            commitment: factor on the gradient that the terms send to z; None skips the terms.
            value_path: whether to return zhat with constant activations, for `route_cross_entropy`.
            gradient_scale: factor on every gradient that reaches the prototypes.
            head_VD: W, which a pursuit needs.
        """
        weight_KD = self.weight if gradient_scale == 1 else scale_gradient(self.weight, gradient_scale)
        z_ND = z_ND if commitment is None else scale_gradient(z_ND, commitment)
        if self.metric is not None:
            mixture, encoder, likeliest = self._pursued(z_ND, weight_KD, head_VD)
            if commitment is None:
                return mixture, None
            return mixture, PrototypeTerms(
                _weighted_unexplained(z_ND, mixture.mixture_ND, encoder, likeliest),
                *self._clustering(z_ND, weight_KD),
                value_mixture_ND=mixture.mixture_ND if value_path else None,
            )
        unit_z_ND = F.normalize(z_ND.float(), dim=-1)
        unit_KD = F.normalize(weight_KD.float(), dim=-1)
        with torch.no_grad():
            cosines_Nk, indices_Nk, token_of_K = self.search(unit_z_ND, unit_KD, self.active)
        cosines_Nk = _SelectedCosines.apply(unit_z_ND, unit_KD, cosines_Nk.float(), indices_Nk)
        activations_Nk = cosines_Nk.clamp_min(0)
        mixture = Mixture(indices_Nk, activations_Nk, mix(indices_Nk, activations_Nk, weight_KD))
        if commitment is None:
            return mixture, None
        nearest_token_cosine_K = (unit_z_ND[token_of_K] * unit_KD).sum(-1)
        terms = PrototypeTerms(
            reconstruction=unexplained_variance(z_ND, mixture.mixture_ND),
            prototype_to_token=1 - nearest_token_cosine_K.mean(),
            token_to_prototype=1 - cosines_Nk[:, 0].mean(),
            value_mixture_ND=mix(indices_Nk, activations_Nk.detach(), weight_KD) if value_path else None,
        )
        return mixture, terms

    def reconstruction(
        self, z_ND: Tensor, head_VD: Tensor | None, likeliest: Likeliest | None = None
    ) -> tuple[Mixture, Tensor]:
        """Return the mixture and L_rec alone; the other terms would take a pursuit another search.

        Args:
            z_ND: hidden states, which get no gradient.
            head_VD: W, which a pursuit needs.
            likeliest: of the tokens, where they are known; a pursuit then saves a product with the head.
        """
        z_ND = z_ND.detach()
        if self.metric is None:
            mixture, _ = self(z_ND)
            return mixture, unexplained_variance(z_ND, mixture.mixture_ND)
        mixture, encoder, likeliest = self._pursued(z_ND, self.weight, head_VD, likeliest)
        return mixture, _weighted_unexplained(z_ND, mixture.mixture_ND, encoder, likeliest)

    def _pursued(
        self, z_ND: Tensor, weight_KD: Tensor, head_VD: Tensor | None, likeliest: Likeliest | None = None
    ) -> tuple[Mixture, PursuitEncoder, Likeliest]:
        """Return the mixture of a pursuit, whose activations are constants in the backward pass."""
        assert head_VD is not None
        encoder = self.encoder(head_VD.detach())
        assert isinstance(encoder, PursuitEncoder)
        with torch.no_grad():
            likeliest = likeliest or likeliest_tokens(encoder.tables.head_VD, z_ND.float())
            indices_Nk, activations_Nk = encoder(z_ND, likeliest)
        return Mixture(indices_Nk, activations_Nk, mix(indices_Nk, activations_Nk, weight_KD)), encoder, likeliest

    def _clustering(self, z_ND: Tensor, weight_KD: Tensor) -> tuple[Tensor, Tensor]:
        """Return L_p2t and L_t2p of all prototypes, whichever of them are active."""
        unit_z_ND = F.normalize(z_ND.float(), dim=-1)
        unit_KD = F.normalize(weight_KD.float(), dim=-1)
        with torch.no_grad():
            _, nearest_N1, token_of_K = self.search(unit_z_ND, unit_KD, 1)
        prototype_to_token = 1 - (unit_z_ND[token_of_K] * unit_KD).sum(-1).mean()
        return prototype_to_token, 1 - (unit_z_ND * unit_KD[nearest_N1[:, 0]]).sum(-1).mean()

    def encoder(self, head_VD: Tensor) -> Encoder:
        """Return the encoder of the present weights and the head W, which computes norms and products once."""
        weight_KD = self.weight.detach()
        if self.metric is None:
            return CosineEncoder(weight_KD, self.active)
        return PursuitEncoder(weight_KD, self.active, self.metric, head_VD)


def _weighted_unexplained(z_ND: Tensor, mixture_ND: Tensor, encoder: PursuitEncoder, likeliest: Likeliest) -> Tensor:
    """Return sum_t r_t^T M_t r_t / sum_t z_t^T M_t z_t, which a pursuit lowers in place of the unexplained variance.

    Its gradient is that of the numerator, as in `unexplained_variance`.
    """
    residual_ND = (z_ND - mixture_ND).float()
    weighted_residual_ND, total = weighted_errors(
        residual_ND.detach(), z_ND.detach().float(), encoder.tables, likeliest
    )
    half = (residual_ND * weighted_residual_ND).sum()  # its gradient is half of the quadratic form's
    return (2 * half - half.detach()) / total


def unexplained_variance(z_ND: Tensor, mixture_ND: Tensor) -> Tensor:
    """Return L_rec = mean ||z - zhat||^2 / mean ||z||^2 (method, section 3).

    The denominator has no gradient, so that the decoder cannot lower the loss by longer hidden states.
    """
    residual = (z_ND.float() - mixture_ND.float()).square().sum(-1).mean()
    return residual / z_ND.detach().float().square().sum(-1).mean()


@torch.no_grad()
def prototypes_from(z_ND: Tensor, rows: int, active: int, generator: torch.Generator) -> Tensor:
    """Return `rows` prototypes copied from distinct hidden states, at the common scale that explains the states best.

    Unscaled copies would be too long: k of them, each near z, add up to about k z. zhat is linear in the scale, so the
    best scale is <z, zhat> / <zhat, zhat>.

    Raises:
        ValueError: fewer hidden states than rows.
    """
    if z_ND.shape[0] < rows:
        raise ValueError(f"{rows} prototypes cannot start from {z_ND.shape[0]} hidden states")
    row_ids = torch.randperm(z_ND.shape[0], generator=generator)[:rows].to(z_ND.device)
    table_KD = z_ND[row_ids].float()
    sample_ND = z_ND[torch.randperm(z_ND.shape[0], generator=generator)[:1024].to(z_ND.device)].float()
    cosines, indices, _ = nearest_prototypes(
        F.normalize(sample_ND, dim=-1), F.normalize(table_KD, dim=-1), min(active, rows)
    )
    mixture_ND = mix(indices, cosines.clamp_min(0), table_KD)
    return table_KD * ((sample_ND * mixture_ND).sum() / mixture_ND.square().sum())


@torch.no_grad()
def revived_prototypes(
    table_KD: Tensor, dead_K: Tensor, z_ND: Tensor, mixture_ND: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the prototypes with dead rows set to poorly explained tokens, drawn by their squared residual.

    A revived row has the direction of its token's hidden state and the mean length of the other rows.

    Args:
        table_KD: the prototypes.
        dead_K: whether each prototype is dead.
        z_ND: hidden states; at most N prototypes are revived.
        mixture_ND: their mixtures.
        generator: of the random numbers.
    """
    table_KD = table_KD.clone()
    dead = dead_K.nonzero()[:, 0][: z_ND.shape[0]]
    residual_N = (z_ND - mixture_ND).square().sum(-1).cpu()
    tokens = torch.multinomial(residual_N, len(dead), generator=generator).to(z_ND.device)
    length = table_KD[~dead_K].norm(dim=-1).mean() if (~dead_K).any() else z_ND.norm(dim=-1).mean()
    table_KD[dead] = F.normalize(z_ND[tokens], dim=-1) * length
    return table_KD
