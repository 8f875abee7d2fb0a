"""Controllers: factors 1 + theta_i on prototypes, fitted to multiple-choice items (method, section 5).

To first order, the log-likelihood of an answer is linear in theta, with the slope -sum_t a_ti delta_t . p_i. A
conditional logit over answers, whose temperature is fitted before, is therefore convex in theta. The fitted controllers
are judged exactly, on other items.

Shapes: n answer tokens, C of them in a chunk, A answers, F features, K prototypes, D hidden size, k active.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from prism_lightning.attribution.curvature.records import chunk_size, loss_gradient
from prism_lightning.common.statistics import normal_interval
from prism_lightning.interventions.controllers.answers import Answers
from prism_lightning.interventions.controllers.choice_model import Choices, cross_validated, fit, items_of, temperature
from prism_lightning.interventions.intervention import temporary_scaling
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.prototypes import selected_dots
from prism_lightning.models.steering import Scaling

MAX_THETA = 1.0  # from removing a prototype's term to doubling it, since the first order holds near 0 alone
STEPS = (1.0, 0.5, 0.25, 0.1, 0.0)  # shares of the fitted theta that are tried
MIN_CHANGE = 1e-3  # of a factor that is kept
BIASED_PLACES = 8  # answers of an item with a bias of their own
PLAIN_NAME = "unchanged"  # of the plain model's accuracy


@dataclass
class Gain:
    """Accuracy of one method on judged items, and its gain over the unchanged model.

    Attributes:
        name: Name of the method.
        accuracy: Share of items that are right.
        gain: Mean paired difference to the unchanged model.
        error: Standard error of the gain.
        items: Number of items.
    """

    name: str
    accuracy: float
    gain: float
    error: float
    items: int

    @property
    def interval(self) -> tuple[float, float]:
        """Normal 95 % interval of the gain."""
        return normal_interval(self.gain, self.error)


def paired_gain(name: str, right: np.ndarray, plain_right: np.ndarray) -> Gain:
    """Return the gain of one method over the unchanged model, paired item by item."""
    difference = right.astype(float) - plain_right.astype(float)
    error = float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else float("nan")
    return Gain(name, float(right.mean()), float(difference.mean()), error, len(difference))


def target_of(answers: Answers) -> np.ndarray:
    """Return 1 [A] for the right answer of every item; several right answers share it."""
    return answers.right_A / np.maximum(1, np.bincount(answers.item_A, answers.right_A))[answers.item_A]


@torch.no_grad()
def slopes(model: PrismForCausalLM, answers: Answers) -> csr_matrix:
    """Return derivatives [A, K] of every answer's score with respect to every theta, at 0, interventions applied."""
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
        theta: Changes between -1 and 1 by prototype; prototypes without a change are left out.
        penalty: Kind and strength of the penalty that cross-validation chose.
        weight: b, the weight of the model's own log-likelihoods.
        step: Share of the fitted theta that was kept.
    """

    theta: dict[int, float]
    penalty: tuple[str, float]
    weight: float
    step: float

    @property
    def factors(self) -> dict[int, float]:
        """1 + theta by prototype."""
        return {prototype: 1 + value for prototype, value in self.theta.items()}


class Calibrator:
    """Fits controllers and rivals to the same items, with any labels.

    Args:
        model: A PRISM model.
        answers: Answers of the items to fit to.
        seed: Seed of the folds.
    """

    def __init__(self, model: PrismForCausalLM, answers: Answers, seed: int) -> None:
        self.model, self.answers, self.seed = model, answers, seed
        self.scores_A, self.slopes_AK = answers.log_likelihoods(model), slopes(model, answers)

    def controllers(self, target_A: np.ndarray) -> Controllers:
        """Fit theta, and keep the share of it with the smallest exact loss.

        The first order may overestimate a large theta, where a part of it still reduces the loss.
        """
        weight = temperature(self.scores_A, self.answers.item_A, target_A)
        choices = Choices(weight * self.scores_A, weight * self.slopes_AK, self.answers.item_A, target_A)
        penalty = cross_validated(choices, self.seed, MAX_THETA)
        theta_K = fit(choices, *penalty, bound=MAX_THETA)
        losses = [choices.losses(weight * self._exact_scores(step * theta_K))[0].mean() for step in STEPS]
        step = STEPS[int(np.argmin(losses))]
        theta = {prototype: factor - 1 for prototype, factor in _factors(step * theta_K).items()}
        return Controllers(theta, penalty, weight, step)

    def _exact_scores(self, theta_K: np.ndarray) -> np.ndarray:
        if not theta_K.any():
            return self.scores_A
        with temporary_scaling(self.model, Scaling(_factors(theta_K))):
            return self.answers.log_likelihoods(self.model)

    def rivals(self, judged_items: Answers) -> dict[str, np.ndarray]:
        """Return, by rival, which judged items are right after a cheaper calibration with the same items.

        Temperature and bias: p(c) ~ exp(b s_c + the bias of place c). Logistic regression on z: p(c) ~ exp(b s_c + w .
        the mean hidden state of the answer's tokens).
        """
        scores_A, target_A = judged_items.log_likelihoods(self.model), target_of(self.answers)
        weight = temperature(self.scores_A, self.answers.item_A, target_A)
        right = {}
        for name, features in (("temperature and bias", _places), ("logistic regression on z", _mean_states)):
            fit_AF, judged_AF = _standardised(features(self.answers), features(judged_items))
            choices = Choices(weight * self.scores_A, fit_AF, self.answers.item_A, target_A)
            eta_F = fit(choices, *cross_validated(choices, self.seed))
            right[name] = judged_items.correct(weight * scores_A + judged_AF @ eta_F)
        return right


def _factors(theta_K: np.ndarray) -> dict[int, float]:
    return {int(i): 1 + float(theta_K[i]) for i in np.flatnonzero(np.abs(theta_K) > MIN_CHANGE)}


def correct_with(model: PrismForCausalLM, answers: Answers, factors: dict[int, float]) -> np.ndarray:
    """Return which items are right with these factors on top of the model's own."""
    with temporary_scaling(model, Scaling(factors)):
        return answers.correct(answers.log_likelihoods(model))


def _places(answers: Answers) -> np.ndarray:
    """Return the place of each answer in its item, one-hot [A, 8]; later places count as the eighth."""
    starts = np.searchsorted(answers.item_A, answers.item_A)
    return np.eye(BIASED_PLACES)[np.minimum(BIASED_PLACES - 1, np.arange(len(answers.item_A)) - starts)]


def _mean_states(answers: Answers) -> np.ndarray:
    """Return the mean hidden state [A, D] of every answer's tokens."""
    z_nD = answers.z_nD.double().numpy()
    sums_AD = np.zeros((len(answers.item_A), z_nD.shape[1]))
    np.add.at(sums_AD, answers.answer_n, z_nD)
    return sums_AD / np.maximum(1, np.bincount(answers.answer_n, minlength=len(sums_AD)))[:, None]


def _standardised(fit_AF: np.ndarray, judged_AF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both with the mean and the standard deviation of the first taken out."""
    mean_F, deviation_F = fit_AF.mean(0), np.maximum(fit_AF.std(0), 1e-9)
    return (fit_AF - mean_F) / deviation_F, (judged_AF - mean_F) / deviation_F


@dataclass
class Calibration:
    """The result of `calibrate`; gains and outcomes are those of the judged items.

    Attributes:
        fit_items: Items that controllers and rivals were fitted to.
        judged_items: Other items, to judge them on.
        controllers: The fitted controllers.
        gains: By task and for "all": the unchanged model, controllers, rivals.
        permuted: Gains of controllers that were fitted to permuted labels.
        fixed: Judged items that are right only with the controllers.
        broken: Judged items that are right only without them.
    """

    fit_items: Answers
    judged_items: Answers
    controllers: Controllers
    gains: dict[str, list[Gain]]
    permuted: list[float]
    fixed: list[int]
    broken: list[int]


def calibrate(
    model: PrismForCausalLM,
    fit_items: Answers,
    judged_items: Answers,
    seed: int,
    permutations: int,
    progress: Callable[[str, int, int], Any] = lambda *_: None,
) -> Calibration:
    """Fit controllers and rivals to some items, and judge them on others.

    Args:
        model: A PRISM model.
        fit_items: Items to fit to.
        judged_items: Items to judge on; none of them is among the others.
        seed: Seed of folds and permutations.
        permutations: Number of fits to permuted labels.
        progress: Receives the number of fits done.
    """
    plain_right = correct_with(model, judged_items, {})
    fits = 2 + permutations
    progress("fitting", 0, fits)
    calibrator = Calibrator(model, fit_items, seed)
    target_A = target_of(fit_items)
    controllers = calibrator.controllers(target_A)
    controlled_right = correct_with(model, judged_items, controllers.factors)
    progress("fitting", 1, fits)
    right = {PLAIN_NAME: plain_right, "controllers": controlled_right} | calibrator.rivals(judged_items)
    progress("fitting", 2, fits)
    generator, permuted_gains = np.random.default_rng(seed), []
    for number in range(permutations):
        labels_A = permuted(target_A, calibrator.scores_A, fit_items.item_A, generator)
        permuted_right = correct_with(model, judged_items, calibrator.controllers(labels_A).factors)
        permuted_gains.append(float((permuted_right.astype(float) - plain_right).mean()))
        progress("fitting", 3 + number, fits)
    changed = controlled_right.astype(int) - plain_right.astype(int)
    return Calibration(
        fit_items=fit_items,
        judged_items=judged_items,
        controllers=controllers,
        gains=_gains_by_task(judged_items, right),
        permuted=permuted_gains,
        fixed=np.flatnonzero(changed > 0).tolist(),
        broken=np.flatnonzero(changed < 0).tolist(),
    )


def _gains_by_task(judged_items: Answers, right: dict[str, np.ndarray]) -> dict[str, list[Gain]]:
    """Return the gains of all methods for every task and, where there are several tasks, for all items together."""
    tasks = np.array([name.rsplit(" ", 1)[0] for name in judged_items.names])
    groups = {str(task): tasks == task for task in dict.fromkeys(tasks.tolist())}
    groups |= {"all": np.ones(len(tasks), dtype=bool)} if len(groups) > 1 else {}
    return {
        task: [paired_gain(name, outcome[group], right[PLAIN_NAME][group]) for name, outcome in right.items()]
        for task, group in groups.items()
    }


def permuted(
    target_A: np.ndarray, scores_A: np.ndarray, item_A: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Return targets [A] exchanged among items at random, place by place in the order of the model's scores.

    The model is then right as often as before, and only what prototypes could add is random. If any answer were as
    likely to be the target, fits would unlearn what the model knows (-11.7 points on continuation) or, with a
    temperature of 0, learn nothing.
    """
    permuted_A = np.empty_like(target_A)
    starts, sizes = items_of(item_A)
    for size in np.unique(sizes):
        places_IC = starts[sizes == size][:, None] + np.arange(size)
        order_IC = np.take_along_axis(places_IC, np.argsort(-scores_A[places_IC], axis=1, kind="stable"), 1)
        permuted_A[order_IC] = target_A[order_IC][generator.permutation(len(order_IC))]
    return permuted_A


def responsible_items(
    model: PrismForCausalLM, answers: Answers, items: list[int], factors: dict[int, float], prototypes: list[int]
) -> dict[int, list[int]]:
    """Return, for each prototype, those of some items whose outcome changes without its factor.

    The factors of all other prototypes are kept.
    """
    responsible: dict[int, list[int]] = {prototype: [] for prototype in prototypes}
    if not items:
        return responsible
    subset = answers.of(items)
    outcome = correct_with(model, subset, factors)
    for prototype in prototypes:
        other_factors = {i: factor for i, factor in factors.items() if i != prototype}
        changed = correct_with(model, subset, other_factors) != outcome
        responsible[prototype] = [item for item, differs in zip(items, changed, strict=True) if differs]
    return responsible
