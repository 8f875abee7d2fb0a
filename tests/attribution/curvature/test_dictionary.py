"""Dictionaries assign as the model's own layer does: by cosine, or by pursuit in the model's metric."""

import pytest
import torch

from prism_lightning.attribution.curvature.dictionary import own_dictionary
from prism_lightning.models.prototypes import PrototypeLayer


@pytest.mark.parametrize("encoder", ["cosine", "pursuit"])
def test_a_dictionary_of_the_models_prototypes_has_the_models_mixture(encoder):
    generator = torch.Generator().manual_seed(0)
    layer = PrototypeLayer(40, 12, 4, encoder)
    layer.weight.data.normal_(generator=generator)
    if layer.metric is not None:
        layer.metric.diagonal().copy_(torch.linspace(0.3, 3, 12))
    z_ND = torch.randn(60, 12, generator=generator) + 1
    head_VD = torch.randn(50, 12, generator=generator)
    expected = layer(z_ND, head_VD=head_VD)[0]
    dictionary = own_dictionary(layer.weight.detach(), 4, layer.metric, head_VD)
    indices_Nk, activations_Nk = dictionary.assign(z_ND)
    torch.testing.assert_close(activations_Nk, expected.activations_Nk, atol=1e-6, rtol=1e-5)
    assert torch.equal(indices_Nk[activations_Nk > 0], expected.indices_Nk[expected.activations_Nk > 0])
    torch.testing.assert_close(dictionary.mixture(indices_Nk, activations_Nk), expected.mixture_ND)


def test_the_metric_decides_which_prototypes_are_active():
    generator = torch.Generator().manual_seed(0)
    prototypes_KD, z_ND = torch.randn(40, 12, generator=generator), torch.randn(60, 12, generator=generator)
    metric_DD, head_VD = torch.diag(torch.linspace(0.05, 5, 12)), torch.randn(500, 12, generator=generator) / 10
    plain, stretched = (
        own_dictionary(prototypes_KD, 4, m, head_VD).assign(z_ND)[0] for m in (torch.eye(12), metric_DD)
    )
    assert (plain.sort().values != stretched.sort().values).any(1).float().mean() > 0.5
