"""Settings of a retrofit."""

from __future__ import annotations

from dataclasses import dataclass

from prism_lightning.common.devices import device_named, dtype_named
from prism_lightning.common.errors import UserError
from prism_lightning.models.encoders import EncoderName


@dataclass
class RetrofitSettings:
    """A pretrained decoder, and the prototypes that are fitted to its hidden states.

    docs/own-model.md has the measurements behind the defaults.

    Args:
        model: Hub id or folder of a causal language model, or a folder with a peft adapter, which is merged.
        out: Run directory to write; the same command resumes an interrupted retrofit there.
        gguf_file: Name of a GGUF file in the model's folder or repository; its weights are dequantised.
        prototypes: Number of prototypes, K.
        active: Largest number of prototypes that are active for one token, k.
        encoder: How they are chosen: "pursuit" (for the prediction) or "cosine" (the paper's).
        fit_tokens: Number of training tokens that the decoder reads, at most all; the prototypes are fitted to a sample
            of their hidden states.
        fit_steps: Number of Adam steps of the fit, on 4,096 hidden states each.
        learning_rate: Peak learning rate of the fit (default 0.05 as a share of the prototypes' root mean square; 0.01
            with cosine, where it is no share).
        batch_tokens: Number of tokens in one forward pass of the decoder.
        validation_tokens: Largest number of validation tokens that the result is measured on.
        seed: Seed of the sample of tokens and of the fit.
        device: Device to compute on: auto, cpu, cuda, cuda:N or mps.
        dtype: Number type of the decoder while hidden states are computed: fp32, or bf16 for half the memory.
    """

    model: str
    out: str
    gguf_file: str | None = None
    prototypes: int = 8192
    active: int = 16
    encoder: EncoderName = "pursuit"
    fit_tokens: int = 131_072
    fit_steps: int = 64
    learning_rate: float | None = None
    batch_tokens: int = 1024
    validation_tokens: int = 16_384
    seed: int = 0
    device: str = "auto"
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        positive = ("prototypes", "active", "fit_tokens", "batch_tokens", "validation_tokens")
        problems = [f"--{n} is {getattr(self, n)}: give a positive number" for n in positive if getattr(self, n) < 1]
        if self.active > self.prototypes:
            problems.append(f"--active {self.active} is more than --prototypes {self.prototypes}: lower it")
        if self.fit_steps < 0:
            problems.append(f"--fit_steps is {self.fit_steps}: give 0 or a positive number")
        if self.learning_rate is not None and not self.learning_rate > 0:
            problems.append(f"--learning_rate is {self.learning_rate}: give a positive number")
        for check, name in ((device_named, self.device), (dtype_named, self.dtype)):
            try:
                check(name)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)
