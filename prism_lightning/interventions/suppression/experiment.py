"""The suppression experiment behind `suppress`: rank prototypes, select them, compare them with rivals, report.

Prototypes are removed from all logits; where that misses the goal, from the logits of the behaviour's words alone.
Selection uses one half of the held-out texts and the comparison uses the other, so that nothing compared was chosen on
the same texts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from prism_lightning.common.errors import UserError
from prism_lightning.inspection.cards import PrototypeCard
from prism_lightning.interventions.intervention import Intervention
from prism_lightning.interventions.report_files import write_report
from prism_lightning.interventions.suppression.behaviours import Behaviour
from prism_lightning.interventions.suppression.conditions import ScaledPrototypes
from prism_lightning.interventions.suppression.measurements import (
    ConditionMeasurements,
    Measurement,
    logits_name,
    quantity,
)
from prism_lightning.interventions.suppression.progress import MeasurementProgress, Progress, ShareProgress
from prism_lightning.interventions.suppression.random_draws import enough_draws, usage_matched_prototypes
from prism_lightning.interventions.suppression.ranking import Effects, Ranking, RankingTexts, removal_effects
from prism_lightning.interventions.suppression.report import figure, markdown, verdict
from prism_lightning.interventions.suppression.results import Attempt, PrototypeSelection, Selections, Suppression
from prism_lightning.interventions.suppression.selection import BIASES, choose, counts_up_to, search_levels
from prism_lightning.interventions.suppression.settings import SuppressionSettings
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.continuation import check_length
from prism_lightning.models.steering import Scaling, check
from prism_lightning.run.fingerprints import model_fingerprint


class SuppressionExperiment:
    """Suppress a behaviour of a model.

    The steps are `rank`, `select`, `compare` and `report`; `run` does the first three.

    Args:
        model: A PRISM model.
        tokenizer: Its tokenizer.
        behaviour: The behaviour to be suppressed.
        texts: Texts that prototypes are ranked on.
        held_out: Other texts; one half is for the selection, the other for the comparison.
        settings: Settings of the experiment.
        prototypes: Prototypes to suppress in place of ranked ones.
        labels: Whether each of `texts` shows the behaviour, where that is known.
        progress: Receives the progress of every step.
        on_measurement: Receives every measurement as it is made.

    Raises:
        UserError: too few texts show the behaviour, there is nothing to measure on, or a prototype does not exist.
    """

    def __init__(
        self,
        model: PrismForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        behaviour: Behaviour,
        texts: list[str],
        held_out: list[str],
        settings: SuppressionSettings,
        prototypes: list[int] | None = None,
        labels: list[bool] | None = None,
        progress: Progress = lambda *_: None,
        on_measurement: Callable[[Measurement], None] = lambda _: None,
    ) -> None:
        self.model, self.behaviour, self.settings, self.prototypes = model, behaviour, settings, prototypes
        self.progress, self.on_measurement = progress, on_measurement
        requested = Scaling(dict.fromkeys(prototypes or [], settings.factor))
        check([requested], model.config.num_prototypes, model.config.vocab_size)
        sampling = settings.sampling
        check_length(model, sampling.prompt_tokens + sampling.new_tokens)
        if len(held_out) < 2:
            raise UserError(
                f"{len(held_out)} validation documents: at least two are needed, to choose on and to judge on"
            )
        self.ranking_texts = RankingTexts.of(texts, labels, behaviour, tokenizer, model.config.context_length)
        order = np.random.default_rng(settings.seed).permutation(len(held_out)).tolist()
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        self.selection_half, self.comparison_half = (
            ConditionMeasurements(
                model, tokenizer, behaviour, [held_out[i] for i in half], settings.prompts, sampling, progress
            )
            for half in halves
        )

    def run(self) -> Suppression:
        """Rank, select and compare; raises as `rank` and `select` do."""
        return self.compare(self.select(self.rank()))

    def rank(self) -> list[Ranking]:
        """Rank prototypes for a removal from all logits, and from the logits of the behaviour's words alone.

        Raises:
            UserError: a requested prototype is dead.
        """
        tokens = self.selection_half.words.first_tokens()
        from_all, from_words = removal_effects(self.model, self.ranking_texts, self.progress, tokens)
        return [
            Ranking(None, from_all, self._candidates(from_all, surely=True)),
            # From a few logits a prototype without effect costs nothing, so doubtful ones are candidates, too.
            Ranking(tokens, from_words, self._candidates(from_words, surely=False)),
        ]

    def select(self, rankings: list[Ranking]) -> Selections:
        """Select the number of prototypes, and the strength of a bias on the words, on one half of the held-out texts.

        Raises:
            UserError: no prototype surely has an effect on the behaviour.
        """
        goal = self.settings.goal
        attempts = [self._select_prototypes(rankings[0])]
        if not attempts[0].chosen.meets(goal):
            attempts.append(self._select_prototypes(rankings[1]))
        quality = [
            (a.chosen.perplexity_increase <= goal.max_perplexity_increase, a.chosen.rate_reduction) for a in attempts
        ]
        bias_path = search_levels(
            BIASES,
            lambda strength: self.selection_half.perplexity_increase(self.selection_half.bias(strength)),
            lambda strength, share: self._measure_bias(self.selection_half, strength, share),
            goal,
            self._progress_of("choosing the words' bias", self.selection_half),
        )
        strength = -choose(bias_path, goal).settings["bias"]
        return Selections(attempts, quality.index(max(quality)), bias_path, strength)

    def compare(self, selections: Selections) -> Suppression:
        """Measure selected prototypes, the bias and random prototypes on the other half of the held-out texts."""
        half = self.comparison_half
        progress = self._progress_of("comparing on other prompts", half)(len(selections.attempts) + 1)
        attempts = []
        for selection in selections.attempts:
            factor, logits = self.settings.factor, logits_name(selection.scaling.tokens)
            name = f"removed from {logits}" if factor == 0 else f"scaled by {factor:g} in {logits}"
            fresh = half.scaled(name, selection.scaling, progress.next())
            attempts.append(Attempt(selection, self._announced(fresh)))
        return Suppression(
            behaviour=self.behaviour.name,
            notes=self.behaviour.notes,
            settings=self.settings,
            attempts=attempts,
            kept=selections.kept,
            bias_path=selections.bias_path,
            plain=half.plain,
            biased=self._measure_bias(half, selections.bias, progress.next()),
            draws=self._random_draws(selections.attempts[selections.kept]),
        )

    def report(
        self,
        result: Suppression,
        path: Path,
        command: str,
        cards: list[PrototypeCard],
        score_suites: Callable[[], list[dict[str, Any]]] = list,
    ) -> list[dict[str, Any]]:
        """Write the intervention and, beside it, the report, the plot and all numbers.

        Args:
            result: The result of `compare`.
            path: File of the intervention.
            command: The command line, for the record.
            cards: Cards of the suppressed prototypes.
            score_suites: Scores suites with the intervention; it is called when the intervention is written.

        Returns:
            The scores.
        """
        origin = {"verb": "suppress", "behaviour": result.behaviour, "command": command, "result": verdict(result)}
        Intervention(model_fingerprint(self.model), result.kept_attempt.selection.scaling, origin).write(path)
        scores = score_suites()
        details = {"verb": "suppress", "cards": [card.as_dict() for card in cards], "suites": scores}
        report = markdown(result, cards, scores, command, f"{path.stem}.png")
        write_report(path, result.as_dict() | details, report, figure(result))
        return scores

    def _candidates(self, effects: Effects, surely: bool) -> list[int]:
        if self.prototypes is None:
            return effects.ranked(surely)
        candidates = list(dict.fromkeys(self.prototypes))
        dead = [prototype for prototype in candidates if not effects.usage_K[prototype]]
        if dead:
            raise UserError(f"prototype {dead[0]} is dead: no token of the ranking's texts uses it; leave it out")
        return candidates

    def _select_prototypes(self, ranking: Ranking) -> PrototypeSelection:
        candidates, half, goal = ranking.prototypes, self.selection_half, self.settings.goal
        if not candidates:
            raise UserError(f"no prototype surely works for {self.behaviour.name!r}: give more texts by --tokens")
        place = "" if ranking.tokens is None else f" in {logits_name(ranking.tokens)}"

        def scaling(count: int) -> Scaling:
            return Scaling(dict.fromkeys(candidates[:count], self.settings.factor), ranking.tokens)

        path = search_levels(
            counts_up_to(len(candidates)) if self.prototypes is None else [len(candidates)],
            lambda count: half.perplexity_increase(ScaledPrototypes(self.model, scaling(count))),
            lambda count, share: self._announced(
                half.scaled(quantity(count, "prototype") + place, scaling(count), share)
            ),
            goal,
            self._progress_of("choosing the number of prototypes", half),
        )
        chosen = choose(path, goal)
        return PrototypeSelection(ranking, path, chosen, scaling(chosen.prototypes))

    def _random_draws(self, kept: PrototypeSelection) -> list[Measurement]:
        """Measure random prototypes of equal usage until the interval of their mean rate reduction is narrow."""
        generator, draws = np.random.default_rng(self.settings.seed), []
        planned = self.settings.draws
        progress = self._progress_of("scaling random prototypes", self.comparison_half)(planned)
        for number in range(planned):
            prototypes = usage_matched_prototypes(list(kept.scaling.factors), kept.ranking.effects.usage_K, generator)
            scaling = Scaling(dict.fromkeys(prototypes, self.settings.factor), kept.scaling.tokens)
            measurement = self.comparison_half.scaled(f"random {number + 1}", scaling, progress.next())
            draws.append(self._announced(measurement))
            if enough_draws(draws, planned, self.settings.goal):
                break
        progress.finish()
        return draws

    def _measure_bias(self, half: ConditionMeasurements, strength: float, share: ShareProgress) -> Measurement:
        return self._announced(half.biased(f"words biased by {-strength:g}", strength, share))

    def _announced(self, measurement: Measurement) -> Measurement:
        self.on_measurement(measurement)
        return measurement

    def _progress_of(self, title: str, half: ConditionMeasurements) -> Callable[[int], MeasurementProgress]:
        return lambda measurements: MeasurementProgress(self.progress, title, len(half.prompts), measurements)
