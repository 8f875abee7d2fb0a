"""Polishing fits the prototypes better and changes no prediction."""

import torch

from prism_lightning.models.polishing import polish


def test_polishing_lowers_unexplained_variance_and_leaves_logits_alone(make_model):
    model = make_model(num_prototypes=64, active_prototypes=4).eval()
    ids = torch.randint(300, (16, 40), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits
    z = model.hidden_states(ids).flatten(0, 1).detach()
    weights = {name: value.clone() for name, value in model.state_dict().items() if "prototypes" not in name}
    history = list(polish(model.prototypes, z, steps=150, learning_rate=1e-2, seed=0))
    assert history[-1] < 0.5 * history[0]
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_polishing_is_a_function_of_its_seed(make_model):
    tables = []
    for _ in range(2):
        model = make_model(num_prototypes=16, active_prototypes=2)
        z = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
        list(polish(model.prototypes, z, steps=120, learning_rate=1e-2, seed=7))
        tables.append(model.prototypes.weight.detach())
    assert torch.equal(*tables)


def test_prototypes_in_bf16_are_revived(make_model):
    """As `fit --trainer.precision bf16-true` leaves them."""
    layer = make_model(num_prototypes=256, active_prototypes=2).prototypes.bfloat16()
    z = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        layer.weight[7] = -z.float().mean(0) * 100  # away from all
    before = layer.weight.detach().clone()
    history = list(polish(layer, z, steps=150, learning_rate=1e-2, seed=0))
    assert history[-1] < history[0] and layer.weight.dtype == torch.bfloat16
    assert not torch.equal(layer.weight[7], before[7])
