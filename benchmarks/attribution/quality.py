"""Quality by retraining: LDS of every method, its ceiling, overlap with EK-FAC, and the grid of dictionaries."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from benchmarks.attribution import exactness, planted, removal
from benchmarks.attribution.config import Settings
from benchmarks.attribution.lds import Interval, bootstrap, ceiling, predictions, rank_correlation, ratio
from benchmarks.attribution.retraining import DENSE, UNTRAINED, Variant, planned, retrain
from benchmarks.attribution.scoring import Case, score_all, scores_of, truth, tuned

QUERY_KINDS = ("sequence", "token")
TOP = 50  # for overlaps


class Quality:
    """The retrained losses of a run, and the scores that are compared with them."""

    def __init__(self, run: Settings) -> None:
        assert run.quality is not None
        self.plan = run.quality
        self.run, self.main = run, run.training.commitments[0]
        self.size = run.retraining.variant_size
        retrain(run, planned(run))
        self.chosen = tuned(run, run.methods)
        self._truths: dict[tuple[Variant, int], dict[str, np.ndarray]] = {}

    def truth(self, variant: Variant, size: int) -> dict[str, np.ndarray]:
        """Return retrained losses; commitment 0 uses those of the dense twin, which trains the same decoder."""
        if variant == UNTRAINED:
            variant = self.main
        variant = variant or DENSE
        if (variant, size) not in self._truths:
            self._truths[variant, size] = truth(self.run, variant, size)
        return self._truths[variant, size]

    def case(self, variant: Variant, size: int, seed: int, name: str) -> Case:
        """Return a tuned method on a decoder."""
        return Case(variant, size, seed, name, self.chosen[name][0])

    def cases(self, name: str, settings: dict[str, Any], variant: Variant, size: int) -> list[Case]:
        """Return a method on every decoder."""
        return [Case(variant, size, seed, name, settings) for seed in range(self.run.retraining.decoders)]

    def lds(self, cases: list[Case], kind: str) -> Interval:
        """Return the LDS of one method over its decoders."""
        retrained = self.truth(cases[0].variant, cases[0].size)
        pairs = []
        for case in cases:
            scores_QS = scores_of(self.run, case)[0][kind]
            pairs.append((predictions(retrained["included"], scores_QS), retrained[kind].mean(0)))
        return bootstrap(pairs)

    def row(self, name: str, settings: dict[str, Any], variant: Variant, size: int) -> dict[str, Any]:
        """Return the row of one method at one size."""
        cases = self.cases(name, settings, variant, size)
        facts = [scores_of(self.run, case)[1] for case in cases]
        row: dict[str, Any] = {"method": name, "variant": variant, "size": size, "settings": settings}
        for kind in QUERY_KINDS:
            row[kind] = self.lds(cases, kind)
        tokens = size * self.run.corpus.tokens
        row["bytes_per_token"] = float(np.mean([fact["state_bytes"] for fact in facts])) / tokens
        row["commits"] = sorted({str(fact["commit"]) for fact in facts})
        row["seeds"] = len(self.truth(variant, size)["sequence"])
        if "share_read" in facts[0]:
            row["share_read"] = {a: float(np.mean([fact["share_read"][a] for fact in facts])) for a in QUERY_KINDS}
        if "unexplained_variance" in facts[0]:
            row["unexplained_variance"] = float(np.mean([fact["unexplained_variance"] for fact in facts]))
        return row

    def rows(self, settings_by_name: dict[str, dict[str, Any]], variant: Variant, size: int) -> list[dict[str, Any]]:
        """Return rows of methods by their settings; missing scores are computed first."""
        cases = [
            case for name, settings in settings_by_name.items() for case in self.cases(name, settings, variant, size)
        ]
        score_all(self.run, cases)
        return [self.row(name, settings, variant, size) for name, settings in settings_by_name.items()]

    def methods(self, variant: Variant, size: int, names: list[str] | None = None) -> list[dict[str, Any]]:
        """Return the rows of all methods, or of some, on one kind of model."""
        settings_by_name = {name: self.chosen[name][0] for name in names or self.chosen}
        return self.rows(settings_by_name, variant, size)

    def grid(self, variant: Variant, size: int) -> list[dict[str, Any]]:
        """Return rows of own, polished and fitted dictionaries of several K and k, in both spaces."""
        settings_by_name: dict[str, dict[str, Any]] = {}
        for space, grid in self.plan.grids.items():
            base = {"kind": "prototypes", "space": space}
            settings_by_name[f"{space}, own"] = base | {"dictionary": "model"}
            settings_by_name[f"{space}, own, polished"] = base | {
                "dictionary": "model",
                "polish_steps": self.plan.polish_steps,
            }
            for share, active in product(grid["tokens_per_prototype"], grid["active"]):
                fitted = {"fit_steps": self.plan.fit_steps, "tokens_per_prototype": share, "active": active}
                settings_by_name[f"{space}, fitted, 1 per {share} tokens, k {active}"] = base | fitted
        return self.rows(settings_by_name, variant, size)

    def ceilings(self) -> dict[int, dict[str, dict[str, float]]]:
        """Return the agreement of training seeds and the ceiling that it sets, by size."""
        return {
            size: {kind: ceiling(self.truth(self.main, size)[kind]) for kind in QUERY_KINDS}
            for size in self.run.corpus.sizes
        }

    def overlaps(self, names: list[str]) -> list[dict[str, Any]]:
        """Return Spearman and top-k overlap of each method's sequence scores with the first method's, per decoder."""
        rows = []
        for name in names[1:]:
            values = []
            for seed in range(self.run.retraining.decoders):
                first, second = (
                    scores_of(self.run, self.case(self.main, self.size, seed, n))[0]["sequence"]
                    for n in (names[0], name)
                )
                values.append((rank_correlation(first, second).mean(), top_overlap(first, second, TOP)))
            spearman, overlap = np.mean(values, axis=0)
            rows.append({"method": name, "spearman": float(spearman), "top_overlap": float(overlap)})
        return rows


def top_overlap(first_QS: np.ndarray, second_QS: np.ndarray, count: int) -> float:
    """Return the share of the `count` best sequences that two methods have in common; the mean over queries."""
    best = [np.argsort(-scores, axis=1)[:, :count] for scores in (first_QS, second_QS)]
    return float(np.mean([len(set(a) & set(b)) / count for a, b in zip(*(b.tolist() for b in best), strict=True)]))


def compared(rows: list[dict[str, Any]], ours: str, other_names: list[str], kind: str) -> list[dict[str, Any]]:
    """Return ratios of our LDS to others', with paired intervals."""
    lds_by_method = {row["method"]: row[kind] for row in rows}
    return [{"method": name, "ratio": ratio(lds_by_method[ours], lds_by_method[name])} for name in other_names]


def checks(quality: Quality) -> dict[str, Any]:
    """Run the quality stage; return everything that the report shows of it."""
    run, plan, main = quality.run, quality.plan, quality.main
    tables = {
        size: quality.methods(main, size, None if size == quality.size else plan.contenders)
        for size in run.corpus.sizes
    }
    results: dict[str, Any] = {
        "chosen": {name: {"settings": s, "sweep": sweep} for name, (s, sweep) in quality.chosen.items()},
        "ceilings": quality.ceilings(),
        "tables": tables,
        "ratios": {
            size: {
                a: compared(rows, plan.ours, [r["method"] for r in rows if r["method"] != plan.ours], a)
                for a in QUERY_KINDS
            }
            for size, rows in tables.items()
        },
        "dense": quality.methods(DENSE, quality.size, plan.contenders),
        "grids": {size: quality.grid(main, size) for size in run.corpus.sizes},
        "other_commitments": {c: quality.grid(c, quality.size) for c in run.training.commitments[1:]},
        "overlaps": quality.overlaps([plan.reference, *([plan.ceiling] if plan.ceiling else []), plan.ours]),
    }
    methods = {name: settings for name, (settings, _) in quality.chosen.items()}
    results["exact"] = exactness.compared(run)
    results["untrained"] = quality.methods(UNTRAINED, quality.size, plan.contenders)
    results["planted"] = planted.measure(run, methods)
    first_cases = [quality.case(main, quality.size, 0, name) for name in methods]
    results["tail_patch"] = removal.tail_patch(run, first_cases, plan.patch_queries, plan.patches, plan.patch_rate)
    removed = [quality.case(main, plan.removal_size, 0, name) for name in plan.contenders]
    results["removal"] = removal.removal(
        run, removed, plan.removal_queries, plan.removed, plan.removal_draws, plan.removal_seeds
    )
    return results
