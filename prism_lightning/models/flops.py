"""Floating-point operations of training, and the peak rates of devices."""

from __future__ import annotations

from transformers import PreTrainedConfig

# Dense bf16 peak in FLOP/s by a part of the device's name, from the vendors' data sheets, without sparsity. Lightning's
# own table lacks the H200. The first match counts, so longer names come first.
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
    """Return the device's dense bf16 peak in FLOP/s; None if the table does not have it."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name.lower() in device_name.lower()), None)


def flops_per_token(
    matrix_parameters: int, config: PreTrainedConfig, block_size: int, frozen_parameters: int = 0
) -> float:
    """Return the training FLOPs of decoder and head per token.

    These are 6 per parameter that multiplies each token, and 12 L D T for attention over blocks of T tokens. A frozen
    one takes 4: its own gradient is not computed.
    """
    return (
        6 * matrix_parameters - 2 * frozen_parameters + 12 * config.num_hidden_layers * config.hidden_size * block_size
    )
