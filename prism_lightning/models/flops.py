"""Floating-point operations of training, and what devices can do."""

from __future__ import annotations

from transformers import PreTrainedConfig

# Dense bf16 peak in FLOP/s by a part of the device's name; from the vendors' data sheets, without sparsity. The
# framework's own table lacks the H200.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(device_name: str) -> float | None:
    """The device's dense bf16 peak, or None where the table does not have it: no number beats a wrong one."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name.lower() in device_name.lower()), None)


def flops_per_token(matrix_parameters: int, config: PreTrainedConfig, block_size: int) -> float:
    """Training FLOPs of the decoder and head per token: 6 per parameter that multiplies, 12 L D T for attention."""
    return 6 * matrix_parameters + 12 * config.num_hidden_layers * config.hidden_size * block_size
