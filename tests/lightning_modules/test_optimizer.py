"""Parameter groups and schedules."""

import pytest
import torch
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

from prism_lightning.lightning_modules.optimizer import parameter_groups
from prism_lightning.lightning_modules.schedules import schedule_factor


def test_every_parameter_is_in_one_group_and_only_matrices_decay(make_model, backbone):
    model = make_model(backbone, num_prototypes=8, active_prototypes=2)
    groups = {g["name"]: g for g in parameter_groups(model, 1e-3, 1e-2, 0.1)}
    listed = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(listed) == sorted({id(p) for p in model.parameters()})
    assert groups["prototypes"]["params"][0] is model.prototypes.weight
    assert (groups["prototypes"]["lr"], groups["prototypes"]["weight_decay"]) == (1e-2, 0.0)
    assert groups["decayed"]["weight_decay"] == 0.1 and all(p.ndim == 2 for p in groups["decayed"]["params"])
    assert groups["plain"]["weight_decay"] == 0.0 and all(p.ndim == 1 for p in groups["plain"]["params"])


def test_grouping_survives_parameters_that_were_flattened(make_model):
    model = make_model(num_prototypes=8, active_prototypes=2)
    before = [len(g["params"]) for g in parameter_groups(model, 1e-3, 1e-2, 0.1)]
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    assert [len(g["params"]) for g in parameter_groups(model, 1e-3, 1e-2, 0.1)] == before


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedules_warm_up_and_end_at_the_final_share(schedule):
    factors = [schedule_factor(step, schedule, 10, 100, 0.1) for step in range(101)]
    assert factors[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert max(factors) == pytest.approx(1.0) and factors[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert (factors[79] == 1.0) == (schedule == "wsd")


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedules_agree_with_transformers_after_the_warm_up(schedule):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    if schedule == "cosine":
        reference = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 100, 600, min_lr_rate=0.1)
    else:
        reference = get_wsd_schedule(optimizer, 100, 120, 600, decay_type="linear", min_lr_ratio=0.1)
    expected = [reference.lr_lambdas[0](step) for step in range(601)]
    factors = [schedule_factor(step, schedule, 100, 600, 0.1) for step in range(601)]
    assert factors[100:] == pytest.approx(expected[100:], abs=1e-15)
    assert factors[0] == 0.01 and abs(factors[0] - expected[0]) >= 0.01  # why ours are kept
