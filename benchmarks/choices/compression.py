"""Effect of narrow types and fewer coordinates on the ranking of the most influential training tokens.

python -m benchmarks.choices.compression --ckpt_path runs/quickstart

Influences of 262,144 training tokens on 50 held-out ones, brute force in float32 against stored coordinates: Spearman
over the 1 % of largest brute-force influence, of those that share a prototype with the query.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.common import Spread, finish
from prism_lightning.attribution.curvature.dictionary import fitted_dictionary
from prism_lightning.attribution.curvature.hessian import HessianSums, eigenbasis
from prism_lightning.attribution.curvature.records import Records, head_chunks, loss_gradient
from prism_lightning.attribution.index.quantisation import quantised
from prism_lightning.data.store import TokenStore
from prism_lightning.lightning_modules.text_data import TextData
from prism_lightning.models import PrismForCausalLM
from prism_lightning.run.model_folder import load_exported

TOKENS, PROTOTYPES, ACTIVE, QUERIES = 262_144, 8192, 3, 50
SETTINGS = [("fp32", None), ("fp16", None), ("int8", None), ("int8", 96), ("int8", 64), ("int8", 32)]


@torch.no_grad()
def states(model: PrismForCausalLM, store: TokenStore, tokens: int) -> tuple[torch.Tensor, torch.Tensor, HessianSums]:
    """Return hidden states and loss gradients of blocks spread over a split, and the sums of their curvature."""
    head_VD, parts = model.lm_head.weight.detach(), []
    sums = HessianSums(head_VD, 1)
    for block in np.linspace(0, len(store) - 1, tokens // store.block_size).astype(int).tolist():
        item = store[block]
        z_ND = model.hidden_states(item["input_ids"][None])[0]
        chunks = list(head_chunks(head_VD, z_ND))
        for chunk in chunks:
            sums.add(chunk, torch.zeros(len(chunk.mean_CD), 1).long(), torch.zeros(len(chunk.mean_CD), 1))
        mean_ND = torch.cat([chunk.mean_CD for chunk in chunks])
        parts.append((z_ND, loss_gradient(head_VD, mean_ND, item["targets"])))
    z_ND, delta_ND = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return z_ND, delta_ND, sums


def correlations(stored: Records, query_records: Records, exact_Nm: np.ndarray, stored_Nm: np.ndarray) -> list[float]:
    """Return Spearman correlations over the top 1 % for every query, of exact and stored whitened coordinates."""
    values = []
    squared_K = torch.zeros(PROTOTYPES).index_add_(
        0, stored.prototypes_Nk.flatten(), stored.activations_Nk.square().flatten()
    )
    for prototypes_k, activations_k, query_m in zip(
        query_records.prototypes_Nk, query_records.activations_Nk, query_records.delta_ND.numpy(), strict=True
    ):
        weight_N = ((stored.prototypes_Nk[:, :, None] == prototypes_k) * activations_k / squared_K[prototypes_k]).sum(
            -1
        )
        weight_N = (weight_N * stored.activations_Nk).sum(-1).numpy()
        rows = np.flatnonzero(weight_N)
        exact, quantised_rows = (weight_N[rows] * (c[rows] @ query_m[: c.shape[1]]) for c in (exact_Nm, stored_Nm))
        top = np.argsort(-np.abs(exact))[: math.ceil(0.01 * len(exact_Nm))]
        values.append(float(spearmanr(exact[top], quantised_rows[top]).statistic))
    return values


def main() -> None:
    """Compare types and ranks; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ckpt_path", type=Path, default=Path("runs/quickstart"), help="Run directory of the quickstart recipe."
    )
    parser.add_argument("--cache_dir", default="data_cache", help="Folder of its prepared data.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="Folder of the JSON file.")
    options = parser.parse_args()
    model, _ = load_exported(options.ckpt_path)
    data = TextData(cache_dir=options.cache_dir)
    data.setup()
    z_ND, delta_ND, sums = states(model, data.train, TOKENS)
    dictionary = fitted_dictionary(z_ND, PROTOTYPES, ACTIVE, 100, 0)
    values_D, basis_DD = eigenbasis(sums.gauss_newton_DD() / sums.tokens, z_ND.shape[1])
    whitening_DD = (basis_DD / values_D.sqrt()).float()
    held_z, held_delta, _ = states(model, data.validation, 12_800)
    chosen = torch.linspace(0, len(held_z) - 1, QUERIES).long()
    stored = Records(*dictionary.assign(z_ND), delta_ND)
    query_records = Records(*dictionary.assign(held_z[chosen]), held_delta[chosen] @ whitening_DD)
    exact_Nm = (delta_ND @ whitening_DD).numpy()
    results: list[dict[str, Any]] = []
    for precision, rank in SETTINGS:
        quantised_rows, scales = quantised(exact_Nm[:, :rank], precision)
        stored_Nm = quantised_rows.astype(np.float32) * (1 if scales is None else scales.astype(np.float32)[:, None])
        values = correlations(stored, query_records, exact_Nm, stored_Nm)
        spread = Spread.of(values)
        results.append({"precision": precision, "rank": rank or z_ND.shape[1], **vars(spread)})
    rows = [[r["precision"], str(r["rank"]), f"{r['median']:.4f}", f"{r['low']:.4f}"] for r in results]
    finish(
        "compression", "Spearman over the top 1 %", ["type", "rank", "median", "minimum"], rows, results, options.out
    )


if __name__ == "__main__":
    main()
