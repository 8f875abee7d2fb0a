"""The curvature report: how local the Gauss-Newton matrices of runs are, as a table, JSON and a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from prism_lightning.attribution.attributor import default_index
from prism_lightning.attribution.curvature.dictionary import Dictionary, fitted_dictionary, own_dictionary
from prism_lightning.common.devices import check_float64
from prism_lightning.common.errors import UserError
from prism_lightning.common.files import integrity_error, map_file, read_json
from prism_lightning.common.json_text import as_json
from prism_lightning.common.manifests import problem_in, whole
from prism_lightning.common.plot_style import (
    DENSE,
    LABEL_FONT_SIZE,
    LEGEND_FONT_SIZE,
    PROTOTYPES,
    RANDOM_CONTROL,
    new_figure,
)
from prism_lightning.data.store import TokenStore
from prism_lightning.inspection.localisation import Localisation, measure_all
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.blocks import block_states
from prism_lightning.models.faithfulness import FIGURES
from prism_lightning.run.directory import RunPaths
from prism_lightning.run.fingerprints import model_fingerprint

FIT_STEPS = 150
BATCH_BLOCKS = 32
LARGEST_SAMPLE_BYTES = 4 * 2**30


@torch.no_grad()
def hidden_sample(model: PrismForCausalLM, store: TokenStore, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states [N, D] of training blocks that are spread evenly over the corpus, and their targets [N]."""
    count = min(len(store), -(-tokens // store.block_size))
    chosen = torch.linspace(0, len(store) - 1, count).long().tolist()
    starts = range(0, count, BATCH_BLOCKS)
    parts = [block_states(model, store.__getitems__(chosen[start : start + BATCH_BLOCKS])) for start in starts]
    return torch.cat([part.z_nD for part in parts]), torch.cat([part.targets_n for part in parts])


def measure_run(
    model: PrismForCausalLM,
    store: TokenStore,
    run: Path,
    fitted: list[tuple[int, int]],
    tokens: int,
    sample: int,
    seed: int,
    report: Callable[[str], None],
) -> Iterator[Localisation]:
    """Measure a run's dense head, its own prototypes, those of its index and fitted ones, and random controls.

    Args:
        model, store: of the run.
        run: its directory; an index in it is measured too.
        fitted: K and k of dictionaries to fit to the frozen model.
        tokens: number of training tokens whose activations are counted.
        sample: number of these tokens whose curvatures are compared in pairs.
        seed: of fits, sample and controls.
        report: called with the name of each step.

    Raises:
        UserError: more prototypes than tokens, or a device without float64.
    """
    check_float64(model.device, "the curvature")
    size = model.config.hidden_size
    if sample * size**2 * 4 > LARGEST_SAMPLE_BYTES:
        max_sample = LARGEST_SAMPLE_BYTES // (4 * size**2)
        raise UserError(
            f"--sample {sample} curvatures of {size} x {size} do not fit into memory: give at most {max_sample}"
        )
    report("hidden states")
    z_ND, targets_N = hidden_sample(model, store, tokens)
    dictionaries: dict[str, Dictionary] = {}
    if model.prototypes is not None:
        layer = model.prototypes
        own = own_dictionary(layer.weight.detach(), layer.active, layer.metric, model.lm_head.weight)
        dictionaries[f"own, K {len(own.unit_KD):,} k {own.active}"] = own
    path = default_index(run) / "dictionary.safetensors"
    facts, manifest = read_json(path.with_suffix(".json")), read_json(path.with_name("manifest.json"))
    facts_are_whole = facts is not None and problem_in(facts, {"active": whole(1)}) is None
    indexed_model = manifest.get("model") if manifest else None
    if facts and facts_are_whole and indexed_model == model_fingerprint(model) and not integrity_error(path):
        prototypes_KD = torch.from_numpy(map_file(path)["prototypes"].astype("float32")).to(model.device)
        dictionaries[f"index, K {len(prototypes_KD):,} k {facts['active']}"] = Dictionary(
            prototypes_KD, facts["active"]
        )
    for size, active in fitted:
        if not active <= size <= len(z_ND):
            raise UserError(f"{size},{active}: give K,k with k <= K <= {len(z_ND)} sampled tokens")
        report(f"fitting {size:,} prototypes")
        dictionaries[f"fitted, K {size:,} k {active}"] = fitted_dictionary(z_ND, size, active, FIT_STEPS, seed)
    for row in measure_all(model.lm_head.weight.detach(), z_ND, targets_N, dictionaries, sample, seed):
        report(f"measured {row.name}")
        yield row


def report_tables(rows: list[tuple[str, Localisation]]) -> Iterator[Table]:
    """Yield two tables for each run, with a line for each set of prototypes: locality and faithfulness."""
    for run in dict.fromkeys(name for name, _ in rows):
        run_rows = [row for name, row in rows if name == run]
        condition = f"{run_rows[0].curvature_condition:,.0f}"
        yield _table(
            f"{run}: how local is the curvature? (condition number of S: {condition})",
            ("GN diag.", "Gram diag.", "co-active", "read", "cond. Gram", "cond. diag."),
            [(row.name, *_locality(row)) for row in run_rows],
        )
        faithful = [row for row in run_rows if row.faithfulness]
        figures = [
            (row.name, *(f"{row.faithfulness[name]:.3f}" if name in row.faithfulness else "" for name in FIGURES))
            for row in faithful
        ]
        if figures:
            yield _table(
                f"{run}: how much do the prototypes carry?", ("recovered", "KL", "top-1", "UV", "UVc"), figures
            )


def _locality(row: Localisation) -> tuple[str, ...]:
    return (
        f"{row.gauss_newton_share:.3f}",
        f"{row.activation_share:.3f}",
        f"{row.coactive_blocks:.1f}",
        "all" if row.read_share >= 1 else f"{row.read_share:.2%}",
        "" if row.gram_condition is None else f"{row.gram_condition:,.0f}",
        f"{row.diagonal_condition:,.0f}",
    )


def _table(title: str, headers: tuple[str, ...], lines: list[tuple[str, ...]]) -> Table:
    """Return a table of which each line begins with the name of a set of prototypes."""
    table = Table(title=Text(title), title_justify="left", show_edge=False)
    table.add_column("prototypes", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right")
    for line in lines:
        table.add_row(*line)
    return table


def write_report(rows: list[tuple[str, Localisation]], folder: Path, facts: dict[str, Any]) -> list[Path]:
    """Write curvature.json and curvature.png; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [RunPaths(folder).curvature, RunPaths(folder).curvature_plot]
    content = facts | {"rows": [{"run": run} | row.as_dict() for run, row in rows]}
    paths[0].write_text(as_json(content, indent=1))
    _plot(rows, paths[1])
    return paths


def _plot(rows: list[tuple[str, Localisation]], path: Path) -> None:
    figure = new_figure(9, 1.4 + 0.34 * len(rows))
    axes = figure.subplots()
    colours = {"dense": DENSE, "random": RANDOM_CONTROL}
    for number, (_, row) in enumerate(rows):
        colour = colours.get(row.name.split()[0].rstrip(","), PROTOTYPES)
        axes.barh(number - 0.19, row.gauss_newton_share, 0.36, color=colour)
        axes.barh(number + 0.19, row.activation_share, 0.36, color=colour, alpha=0.4)
        axes.text(
            row.gauss_newton_share + 0.01,
            number - 0.19,
            f"{row.gauss_newton_share:.2f}",
            va="center",
            size=LABEL_FONT_SIZE,
        )
    runs = {run for run, _ in rows}
    labels = [f"{run}: {row.name}" if len(runs) > 1 else row.name for run, row in rows]
    axes.set_yticks(range(len(rows)), labels, size=LEGEND_FONT_SIZE)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.05)
    axes.set_xlabel("share of squared norm on the diagonal blocks\nsolid: Gauss-Newton matrix, light: activation Gram")
    legend = {"prototypes": PROTOTYPES, "random prototypes": RANDOM_CONTROL, "dense head": DENSE}
    for label, colour in legend.items():
        axes.barh(0, 0, color=colour, label=label)
    figure.legend(loc="outside upper right", fontsize=LEGEND_FONT_SIZE, ncols=3)
    figure.savefig(path, dpi=150)
