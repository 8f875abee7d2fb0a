"""Assign tokens to their nearest prototypes in two levels: cells first, then the prototypes of the nearest cells.

Shapes: N tokens, D hidden size, K prototypes, C cells, k active prototypes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this many prototypes the exact search is as fast.
EXACT_BELOW = 2048
PROBES = 12
LLOYD_STEPS = 6


class PrototypeSearch:
    """Finds the k prototypes of largest cosine, nearly always exactly, with a fraction of K dot products per token.

    Prototypes are grouped into cells by spherical k-means. A token looks only into the `PROBES` cells whose centres
    are nearest to it. The result is deterministic given the prototypes. With `exact`, or few prototypes, all are
    compared.
    """

    def __init__(self, unit_KD: Tensor, active: int, exact: bool = False) -> None:
        self.unit_KD, self.active = unit_KD, active
        self.exact = exact or unit_KD.shape[0] <= EXACT_BELOW
        if self.exact:
            return
        # With as many centres as prototypes in the cells of a token, there are fewest dot products.
        cells = round(math.sqrt(PROBES * unit_KD.shape[0]))
        self.centres_CD = unit_KD[torch.linspace(0, len(unit_KD) - 1, cells, device=unit_KD.device).long()]
        for _ in range(LLOYD_STEPS):
            cell_K = _nearest(unit_KD, self.centres_CD, 1)[1][:, 0]
            sums_CD = torch.zeros_like(self.centres_CD).index_add_(0, cell_K, unit_KD)
            filled_C = torch.bincount(cell_K, minlength=cells) > 0
            self.centres_CD = torch.where(filled_C[:, None], F.normalize(sums_CD, dim=-1), self.centres_CD)
        cell_K = _nearest(unit_KD, self.centres_CD, 1)[1][:, 0]
        self.order_K = torch.argsort(cell_K, stable=True)
        self.sorted_KD = unit_KD[self.order_K]
        self.bounds = [0, *torch.bincount(cell_K, minlength=cells).cumsum(0).tolist()]

    def move(self, unit_KD: Tensor) -> None:
        """Search from now on among prototypes that have moved a little; each stays in its cell."""
        self.unit_KD = unit_KD
        if not self.exact:
            self.sorted_KD = unit_KD[self.order_K]

    def __call__(self, unit_z_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines [N, k], descending, and prototype indices [N, k]."""
        if self.exact:
            return _nearest(unit_z_ND, self.unit_KD, self.active)
        probes = min(PROBES, len(self.centres_CD))
        cell_Np = _nearest(unit_z_ND, self.centres_CD, probes)[1]
        slot_order = torch.argsort(cell_Np.flatten(), stable=True)  # (token, probe) slots, cell by cell
        token_order = slot_order // probes
        sorted_z = unit_z_ND[token_order]
        counts = torch.bincount(cell_Np.flatten(), minlength=len(self.centres_CD)).tolist()
        shape = (len(slot_order), self.active)
        cosines = torch.full(shape, -2.0, dtype=unit_z_ND.dtype, device=unit_z_ND.device)
        indices = torch.zeros(shape, dtype=torch.long, device=unit_z_ND.device)
        begin = 0
        for cell, count in enumerate(counts):
            first, last = self.bounds[cell], self.bounds[cell + 1]
            if count and last > first:
                width = min(self.active, last - first)
                best, where = (sorted_z[begin : begin + count] @ self.sorted_KD[first:last].T).topk(width, dim=-1)
                cosines[begin : begin + count, :width] = best
                indices[begin : begin + count, :width] = where + first
            begin += count
        return self._merged(cosines, indices, slot_order, probes)

    def _merged(self, cosines: Tensor, indices: Tensor, slot_order: Tensor, probes: int) -> tuple[Tensor, Tensor]:
        by_slot = torch.empty_like(slot_order)
        by_slot[slot_order] = torch.arange(len(slot_order), device=slot_order.device)
        tokens = len(slot_order) // probes
        best_Nk, where_Nk = cosines[by_slot].view(tokens, -1).topk(self.active, dim=-1)
        return best_Nk, self.order_K[indices[by_slot].view(tokens, -1).gather(1, where_Nk)]


def _nearest(unit_ND: Tensor, unit_MD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return cosines [N, count], descending, and indices of the nearest of M rows; [N, M] is computed in chunks."""
    parts = [(part @ unit_MD.T).topk(count, dim=-1) for part in unit_ND.split(max(1, 2**24 // len(unit_MD)))]
    cosines, indices = zip(*parts, strict=True)
    return torch.cat(cosines), torch.cat(indices)


class MovingSearch:
    """The search of a layer while its prototypes are fitted; cells are formed again every `interval` calls."""

    def __init__(self, interval: int = 50) -> None:
        self.interval, self.calls = interval, 0

    def __call__(self, unit_z_ND: Tensor, unit_KD: Tensor, active: int) -> tuple[Tensor, Tensor, Tensor]:
        """Search as `nearest_prototypes`; the third result, which fitting does not use, is zeros."""
        if self.calls % self.interval == 0:
            self._search = PrototypeSearch(unit_KD, active)
        self._search.move(unit_KD)
        self.calls += 1
        return *self._search(unit_z_ND), torch.zeros(len(unit_KD), dtype=torch.long, device=unit_KD.device)
