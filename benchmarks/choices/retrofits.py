"""How much of a pretrained model's predictions prototypes carry, over encoder, k, K and fitting tokens.

python -m benchmarks.choices.retrofits --ckpt_path runs/retrofit --work runs/retrofit_grid

Fits dictionaries to the hidden states of a finished retrofit's model on the text of that run, and measures each on the
same tokens of its validation text. Every cell is kept in the folder --work, from which the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import finish
from prism_lightning.common.files import write_json
from prism_lightning.common.progress import PhaseProgress
from prism_lightning.data.store import TokenStore
from prism_lightning.inspection.curvature_report import hidden_sample
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.encoders import EncoderName
from prism_lightning.models.faithfulness import FIGURES, mixture_faithfulness
from prism_lightning.models.prototypes import PrototypeLayer
from prism_lightning.retrofit.fitting import fit_prototypes, states_needed
from prism_lightning.retrofit.hidden_states import StateFile
from prism_lightning.retrofit.settings import RetrofitSettings
from prism_lightning.run.model_folder import load_exported
from prism_lightning.run.training_data import data_of

Dictionary = tuple[EncoderName, int, int]  # and its K and k
COSINE: list[Dictionary] = [("cosine", 8192, k) for k in (4, 8, 16, 32, 64)]
PURSUIT: list[Dictionary] = [("pursuit", 8192, k) for k in (4, 8, 16, 32, 64)]
SIZES: list[Dictionary] = [("pursuit", size, 16) for size in (2048, 32_768)]
MORE_TOKENS: list[Dictionary] = [*PURSUIT[2:4], SIZES[1], COSINE[2]]
BATCH_BLOCKS = 4


def cells(few: int, many: int) -> Iterator[RetrofitSettings]:
    """Yield the settings of every cell, for two numbers of fitting tokens."""
    for tokens, dictionaries in ((few, [*PURSUIT, *COSINE, *SIZES]), (many, MORE_TOKENS)):
        for encoder, size, active in dictionaries:
            yield RetrofitSettings("", "", None, size, active, encoder, tokens)


@torch.no_grad()
def measured(model: PrismForCausalLM, layer: PrototypeLayer, z_ND: Tensor, targets_N: Tensor) -> dict[str, float]:
    """Return the faithfulness of a layer of prototypes on all given tokens."""
    mixture, _ = layer(z_ND, head_VD=model.lm_head.weight)
    return mixture_faithfulness(model.lm_head, z_ND, mixture.mixture_ND, targets_N)


def cell(
    model: PrismForCausalLM,
    store: TokenStore,
    validation: tuple[Tensor, Tensor],
    settings: RetrofitSettings,
    work: Path,
) -> dict[str, Any]:
    """Return the figures of one cell; a finished one is read."""
    name = f"{settings.encoder}-{settings.prototypes}-{settings.active}-{settings.fit_tokens}"
    path, folder = work / f"{name}.json", work / f"states-{settings.fit_tokens}"
    if path.is_file():
        return dict(json.loads(path.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    largest = max(states_needed(settings), 4 * max(size for _, size, _ in SIZES))
    states = StateFile(folder, store, settings.fit_tokens, largest, model.config.hidden_size, settings.seed)
    with PhaseProgress() as progress:
        states.fill(model, BATCH_BLOCKS, lambda done, total: progress("computing hidden states", done, total))
        started = time.monotonic()
        layer = fit_prototypes(
            states,
            model.lm_head.weight.detach(),
            settings,
            path.with_suffix(".safetensors"),
            lambda done, total: progress(f"fitting {name}", done, total),
        )
        seconds = time.monotonic() - started
    chosen = {key: getattr(settings, key) for key in ("encoder", "prototypes", "active", "fit_steps")}
    result = chosen | {"fit_tokens": len(states.targets_n)} | measured(model, layer, *validation)
    write_json(path, result | {"fit_seconds": round(seconds, 1)})
    path.with_suffix(".safetensors").unlink()
    return dict(json.loads(path.read_text()))


def main() -> None:
    """Fit and measure every cell; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", type=Path, required=True, help="Run directory of a finished retrofit.")
    parser.add_argument("--work", type=Path, required=True, help="Folder of hidden states and finished cells.")
    parser.add_argument("--tokens", type=int, nargs=2, default=[131_072, 1_000_000], help="Numbers of fitting tokens.")
    parser.add_argument("--validation_tokens", type=int, default=16_384, help="Number of validation tokens.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="Folder of the JSON file.")
    options = parser.parse_args()
    model, _ = load_exported(options.ckpt_path)
    data = data_of(options.ckpt_path)
    validation = hidden_sample(model, data.validation, options.validation_tokens)
    rows = [cell(model, data.train, validation, settings, options.work) for settings in cells(*options.tokens)]
    names = ["encoder", "prototypes", "active", "fit_tokens", *FIGURES, "fit_seconds"]
    columns = [name.replace("_", " ") for name in names]
    table = [[f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in names] for row in rows]
    finish("retrofits", "Prototypes of a pretrained model", columns, table, rows, options.out)


if __name__ == "__main__":
    main()
