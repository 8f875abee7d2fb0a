"""MFU comes from our own table, or not at all."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config

from prism_lightning.lightning_modules.callbacks.throughput import mfu
from prism_lightning.models.flops import flops_per_token, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ],
)
def test_known_devices(name, peak):
    assert peak_flops(name) == peak


def test_unknown_devices_have_no_peak():
    assert peak_flops("AMD EPYC") is None


def test_mfu_is_none_on_a_cpu_and_off_the_table(monkeypatch):
    module = SimpleNamespace(device=torch.device("cpu"))
    assert mfu(1e6, module, 1024, 1) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert mfu(1e6, SimpleNamespace(device=torch.device("cuda")), 1024, 1) is None


def test_mfu_is_the_share_of_all_devices_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    config = SimpleNamespace(backbone_config=GPT2Config(n_layer=12, n_embd=768))
    model = SimpleNamespace(matrix_parameters=100_000_000, frozen_parameters=0, config=config)
    module = SimpleNamespace(device=torch.device("cuda"), model=model)
    assert mfu(1e6, module, 1024, 2) == pytest.approx(1e6 * (6e8 + 12 * 12 * 768 * 1024) / (2 * 989e12))


def test_flops_count_matrices_and_attention():
    config = GPT2Config(n_layer=12, n_embd=768)
    assert flops_per_token(100, config, 1024) == 600 + 12 * 12 * 768 * 1024


def test_frozen_matrices_have_no_gradient_of_their_own():
    config = GPT2Config(n_layer=12, n_embd=768)
    assert flops_per_token(110, config, 1024) - flops_per_token(110, config, 1024, frozen_parameters=100) == 200
