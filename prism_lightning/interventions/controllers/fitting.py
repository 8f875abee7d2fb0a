"""Controllers: factors 1 + theta_i on prototypes, fitted to multiple-choice items (method, section 5).

The log-likelihood of an answer is linear in theta to first order, with the slope -sum_t a_ti delta_t . p_i, so that a
conditional logit over answers, its temperature fitted before, is convex in theta. What the fit finds is judged exactly,
on other items.

Shapes: n answer tokens, A answers, K prototypes, D hidden size, k active.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from prism_lightning.attribution.curvature.records import chunk_size, loss_gradient
from prism_lightning.evaluation.results import normal_interval
from prism_lightning.interventions.controllers.answers import Answers
from prism_lightning.interventions.controllers.choice_model import Choices, cross_validated, fit, items_of, temperature
from prism_lightning.interventions.intervention import temporary_scaling
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.prototypes import selected_dots
from prism_lightning.models.steering import Scaling

LARGEST = 1.0  # theta: from removing a prototype's term to doubling it, since the first order holds near 0 alone
STEPS = (1.0, 0.5, 0.25, 0.1, 0.0)  # of the fitted theta
LEAST_CHANGE = 1e-3  # of a factor that is kept


@dataclass
class Gain:
    """Accuracy on held-out items, and paired with that of the model as it is.

    Attributes:
        name: of what was done.
        accuracy: share of items.
        gain, error: mean difference item by item, and its standard error.
        items: how many.
    """

    name: str
    accuracy: float
    gain: float
    error: float
    items: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, normal."""
        return normal_interval(self.gain, self.error)


def gain(name: str, correct: np.ndarray, plain: np.ndarray) -> Gain:
    """Of one set of answers over another, item by item."""
    difference = correct.astype(float) - plain.astype(float)
    error = float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else float("nan")
    return Gain(name, float(correct.mean()), float(difference.mean()), error, len(difference))


def target_of(answers: Answers) -> np.ndarray:
    """1 [A] for the right answer of every item; several right ones share it."""
    return answers.right_A / np.maximum(1, np.bincount(answers.item_A, answers.right_A))[answers.item_A]


@torch.no_grad()
def slopes(model: PrismForCausalLM, answers: Answers) -> csr_matrix:
    """Derivatives [A, K] of every answer's score with respect to every theta, at 0, interventions applied."""
    assert model.prototypes is not None
    head_VD, terms = model.lm_head.weight, model.scaled_terms()
    rows, columns, values = [], [], []
    size = chunk_size(head_VD)
    answer_n = torch.from_numpy(answers.answer_n)
    parts = [tensor.split(size) for tensor in (answers.z_nD, answers.targets_n, answer_n)]
    for z_CD, targets_C, answer_C in zip(*parts, strict=True):
        z_CD, targets_C = z_CD.to(model.device), targets_C.to(model.device)
        indices_Ck, activations_Ck = terms.assign(z_CD)
        delta_CD = loss_gradient(head_VD, model.logits(z_CD).softmax(-1) @ head_VD, targets_C)
        dots_Ck = selected_dots(delta_CD, model.prototypes.weight, indices_Ck)
        factors_Ck = terms.factors(indices_Ck, targets_C)
        values.append((-factors_Ck * activations_Ck * dots_Ck).cpu().double().numpy())
        columns.append(indices_Ck.cpu().numpy())
        rows.append(np.repeat(answer_C.numpy()[:, None], terms.active, 1))
    row_n, column_n, value_n = (np.concatenate(part).ravel() for part in (rows, columns, values))
    value_n /= answers.length_A[row_n]
    return csr_matrix((value_n, (row_n, column_n)), shape=(len(answers.item_A), model.config.num_prototypes))


@dataclass
class Controllers:
    """A fitted theta.

    Attributes:
        theta: of the prototypes that it changes, between -1 and 1.
        penalty: kind and strength that cross-validation chose.
        weight: b, of the model's own log-likelihoods.
        step: the share of the fitted theta that was kept.
    """

    theta: dict[int, float]
    penalty: tuple[str, float]
    weight: float
    step: float

    @property
    def factors(self) -> dict[int, float]:
        """1 + theta."""
        return {prototype: 1 + value for prototype, value in self.theta.items()}


class Calibrator:
    """What every fit to the same items needs, whatever their labels.

    Args:
        model: a PRISM model.
        answers: of the calibration items.
        seed: of the folds.
    """

    def __init__(self, model: PrismForCausalLM, answers: Answers, seed: int) -> None:
        self.model, self.answers, self.seed = model, answers, seed
        self.scores_A, self.slopes_AK = answers.log_likelihoods(model), slopes(model, answers)

    def controllers(self, target_A: np.ndarray) -> Controllers:
        """Fit theta.

        Where the first order leads astray, a part of it may still help: the exact loss decides.
        """
        weight = temperature(self.scores_A, self.answers.item_A, target_A)
        choices = Choices(weight * self.scores_A, weight * self.slopes_AK, self.answers.item_A, target_A)
        penalty = cross_validated(choices, self.seed, LARGEST)
        theta_K = fit(choices, *penalty, bound=LARGEST)
        losses = [choices.losses(weight * self._exact_scores(step * theta_K))[0].mean() for step in STEPS]
        step = STEPS[int(np.argmin(losses))]
        theta = {prototype: factor - 1 for prototype, factor in _factors(step * theta_K).items()}
        return Controllers(theta, penalty, weight, step)

    def _exact_scores(self, theta_K: np.ndarray) -> np.ndarray:
        if not theta_K.any():
            return self.scores_A
        with temporary_scaling(self.model, Scaling(_factors(theta_K))):
            return self.answers.log_likelihoods(self.model)

    def rivals(self, held_out: Answers) -> dict[str, np.ndarray]:
        """Which held-out items are right after cheaper calibrations with the same items.

        Temperature and bias: p(c) ~ exp(b s_c + the bias of place c). Logistic regression on z: p(c) ~ exp(b s_c + w .
        the mean hidden state of the answer's tokens).
        """
        found, scores_A, target_A = {}, held_out.log_likelihoods(self.model), target_of(self.answers)
        weight = temperature(self.scores_A, self.answers.item_A, target_A)
        for name, features in (("temperature and bias", _places), ("logistic regression on z", _means)):
            x_AF, held_out_AF = _standardised(features(self.answers), features(held_out))
            choices = Choices(weight * self.scores_A, x_AF, self.answers.item_A, target_A)
            eta_F = fit(choices, *cross_validated(choices, self.seed))
            found[name] = held_out.correct(weight * scores_A + held_out_AF @ eta_F)
        return found


def _factors(theta_K: np.ndarray) -> dict[int, float]:
    return {int(i): 1 + float(theta_K[i]) for i in np.flatnonzero(np.abs(theta_K) > LEAST_CHANGE)}


def correct_with(model: PrismForCausalLM, answers: Answers, factors: dict[int, float]) -> np.ndarray:
    """Which items are right with these factors on top of the model's own."""
    with temporary_scaling(model, Scaling(factors)):
        return answers.correct(answers.log_likelihoods(model))


def _places(answers: Answers) -> np.ndarray:
    """One-hot [A, 8]: the place of each answer among its item's, as far as the eighth."""
    starts = np.searchsorted(answers.item_A, answers.item_A)
    return np.eye(8)[np.minimum(7, np.arange(len(answers.item_A)) - starts)]


def _means(answers: Answers) -> np.ndarray:
    """Mean hidden state [A, D] of every answer's tokens."""
    z_nD = answers.z_nD.double().numpy()
    sums_AD = np.zeros((len(answers.item_A), z_nD.shape[1]))
    np.add.at(sums_AD, answers.answer_n, z_nD)
    return sums_AD / np.maximum(1, np.bincount(answers.answer_n, minlength=len(sums_AD)))[:, None]


def _standardised(x_AF: np.ndarray, other_AF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns of mean 0 and deviation 1 by the first."""
    mean_F, deviation_F = x_AF.mean(0), np.maximum(x_AF.std(0), 1e-9)
    return (x_AF - mean_F) / deviation_F, (other_AF - mean_F) / deviation_F


@dataclass
class Calibration:
    """What `calibrate` found; everything on held-out items.

    Attributes:
        controllers: fitted.
        gains: by task and "all": the model as it is, controllers, rivals.
        permuted: gains of controllers fitted to permuted labels.
        fixed, broken: held-out items that are right only with, and only without, the controllers.
    """

    controllers: Controllers
    gains: dict[str, list[Gain]]
    permuted: list[float]
    fixed: list[int]
    broken: list[int]


def calibrate(
    model: PrismForCausalLM,
    calibration: Answers,
    held_out: Answers,
    seed: int,
    permutations: int,
    report: Callable[[str, int, int], Any] = lambda *_: None,
) -> Calibration:
    """Fit on one set of items, judge on another.

    Args:
        model: a PRISM model.
        calibration, held_out: items that share none.
        seed: of folds and permutations.
        permutations: fits to permuted labels.
        report: hears what is done.
    """
    plain = correct_with(model, held_out, {})
    report("fitting", 0, 2 + permutations)
    calibrator = Calibrator(model, calibration, seed)
    controllers = calibrator.controllers(target_of(calibration))
    ways = {"as it is": plain, "controllers": correct_with(model, held_out, controllers.factors)}
    report("fitting", 1, 2 + permutations)
    ways |= calibrator.rivals(held_out)
    report("fitting", 2, 2 + permutations)
    generator, random_gains = np.random.default_rng(seed), []
    for number in range(permutations):
        labels_A = permuted(target_of(calibration), calibrator.scores_A, calibration.item_A, generator)
        found = calibrator.controllers(labels_A)
        random_gains.append(float((correct_with(model, held_out, found.factors).astype(float) - plain).mean()))
        report("fitting", 3 + number, 2 + permutations)
    tasks = np.array([name.rsplit(" ", 1)[0] for name in held_out.names])
    groups = {str(task): tasks == task for task in dict.fromkeys(tasks.tolist())}
    groups |= {"all": np.ones(len(tasks), dtype=bool)} if len(groups) > 1 else {}
    gains = {task: [gain(name, right[of], plain[of]) for name, right in ways.items()] for task, of in groups.items()}
    changed = ways["controllers"].astype(int) - plain.astype(int)
    return Calibration(
        controllers, gains, random_gains, np.flatnonzero(changed > 0).tolist(), np.flatnonzero(changed < 0).tolist()
    )


def permuted(
    target_A: np.ndarray, scores_A: np.ndarray, item_A: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Targets [A] dealt out among items at random, place by place in the order of the model's scores.

    So the model is right as often as before, and only what prototypes could add is random. Were any answer as likely,
    fits would unlearn what the model knows (-11.7 points on continuation), or with a temperature of 0 learn nothing.
    """
    found_A = np.empty_like(target_A)
    starts, sizes = items_of(item_A)
    for size in np.unique(sizes):
        places_IC = starts[sizes == size][:, None] + np.arange(size)
        order_IC = np.take_along_axis(places_IC, np.argsort(-scores_A[places_IC], axis=1, kind="stable"), 1)
        found_A[order_IC] = target_A[order_IC][generator.permutation(len(order_IC))]
    return found_A


def responsible(
    model: PrismForCausalLM, answers: Answers, items: list[int], factors: dict[int, float], prototypes: list[int]
) -> dict[int, list[int]]:
    """For each prototype, those of some items whose outcome is another without its factor, the others kept."""
    found: dict[int, list[int]] = {prototype: [] for prototype in prototypes}
    if not items:
        return found
    some = answers.of(items)
    outcome = correct_with(model, some, factors)
    for prototype in prototypes:
        without = correct_with(model, some, {i: factor for i, factor in factors.items() if i != prototype})
        found[prototype] = [item for item, differs in zip(items, without != outcome, strict=True) if differs]
    return found
