"""Polishing fits the prototypes better and changes no prediction."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from prism_lightning.models.polishing import Polishing, polish
from prism_lightning.models.prototypes import PrototypeLayer


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


STEPS = 230


def polishing_of(encoder, seed=3):
    """Polishing of 300 prototypes, so many that some are revived, on 900 hidden states of a few directions."""
    generator = torch.Generator().manual_seed(seed)
    z_ND = torch.randn(900, 6, generator=generator) @ torch.randn(6, 16, generator=generator)
    layer = PrototypeLayer(300, 16, 2, encoder)
    layer.weight.data.copy_(torch.randn(300, 16, generator=torch.Generator().manual_seed(4)))
    head_VD = torch.randn(50, 16, generator=generator) if encoder == "pursuit" else None
    return Polishing(layer, head_VD, lambda rows: (z_ND[rows], None), len(z_ND), STEPS, 1e-2, seed)


@pytest.mark.parametrize("encoder", ["cosine", "pursuit"])
def test_a_stopped_polishing_goes_on_bit_for_bit(encoder, tmp_path, monkeypatch):
    """Stopped before the first step, between revivals and after the last; each time in a new layer, from a file."""
    monkeypatch.setattr("prism_lightning.models.polishing.BATCH_TOKENS", 64)
    whole = polishing_of(encoder)
    start = whole.layer.weight.detach().clone()
    expected = [whole.step() for _ in range(STEPS)]
    history = []
    stopped = polishing_of(encoder)
    for stop in (0, 1, 70, 130, 200, STEPS):
        while stopped.steps_done < stop:
            history.append(stopped.step())
        save_file({name: t.detach().cpu().contiguous() for name, t in stopped.state_tensors().items()}, tmp_path / "s")
        stopped = polishing_of(encoder)
        with torch.no_grad():
            stopped.layer.weight.normal_()
        stopped.restore(load_file(tmp_path / "s"))
        assert stopped.steps_done == stop
    assert history == expected and expected[-1] < expected[0]
    assert torch.equal(stopped.layer.weight, whole.layer.weight) and not torch.equal(start, whole.layer.weight)


def test_revivals_happen_while_a_stopped_polishing_goes_on(monkeypatch):
    """What the test above stops between."""
    monkeypatch.setattr("prism_lightning.models.polishing.BATCH_TOKENS", 64)
    revived = []
    monkeypatch.setattr(Polishing, "_revive", lambda self, *_: revived.append(self.steps_done))
    polishing = polishing_of("cosine")
    for _ in range(STEPS):
        polishing.step()
    assert revived == [100]


def test_a_layer_of_pursuit_is_polished(monkeypatch):
    monkeypatch.setattr("prism_lightning.models.polishing.BATCH_TOKENS", 64)
    polishing = polishing_of("pursuit")
    metric = polishing.layer.metric.clone()
    history = [polishing.step() for _ in range(STEPS)]
    assert sum(history[-10:]) < 0.6 * sum(history[:10])
    assert torch.equal(polishing.layer.metric, metric)
