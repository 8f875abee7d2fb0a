"""The two-level search finds what the exact one finds."""

import pytest
import torch
import torch.nn.functional as F

from prism_lightning.attribution.curvature import search
from prism_lightning.attribution.curvature.search import PrototypeSearch
from prism_lightning.models.prototypes import nearest_prototypes


def clustered(count, seed):
    """Unit vectors that lie in clusters, as hidden states do."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, 24, generator=torch.Generator().manual_seed(9))
    which = torch.randint(40, (count,), generator=generator)
    return F.normalize(centres[which] + 0.5 * torch.randn(count, 24, generator=generator), dim=-1)


def test_two_levels_find_nearly_all_nearest_prototypes():
    prototypes, tokens = clustered(5000, 1), clustered(3000, 2)
    assert not PrototypeSearch(prototypes, 4).exact
    cosines, indices = PrototypeSearch(prototypes, 4)(tokens)
    exact_cosines, exact_indices, _ = nearest_prototypes(tokens, prototypes, 4)
    assert (indices[:, 0] == exact_indices[:, 0]).float().mean() > 0.99
    assert (cosines >= exact_cosines - 1e-5).float().mean() > 0.98
    assert torch.allclose((tokens[:, None] * prototypes[indices]).sum(-1), cosines, atol=1e-5)
    assert (cosines.diff(dim=-1) <= 0).all()


def test_all_cells_probed_is_the_exact_search(monkeypatch):
    monkeypatch.setattr(search, "PROBES", 3000)  # and as many cells as prototypes
    prototypes, tokens = clustered(3000, 1).double(), clustered(500, 2).double()
    cosines, indices = PrototypeSearch(prototypes, 3)(tokens)
    exact_cosines, exact_indices, _ = nearest_prototypes(tokens, prototypes, 3)
    assert torch.equal(indices, exact_indices)
    assert torch.allclose(cosines, exact_cosines.double(), atol=1e-12)


@pytest.mark.parametrize("size", [3, 100])
def test_small_dictionaries_are_searched_exactly(size):
    prototypes = clustered(size, 1)
    cosines, indices = PrototypeSearch(prototypes, 2)(prototypes)
    assert torch.equal(indices[:, 0], torch.arange(size))
    assert torch.allclose(cosines[:, 0], torch.ones(size))
