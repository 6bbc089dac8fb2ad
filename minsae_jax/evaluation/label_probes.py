"""Probes for patient labels on pooled features, fitted on val and scored on test.

A probe is a ridge regression on the few features that separate the val patients best. Features of
an SAE are compared with equally many raw dimensions of the activations, pooled in the same way, and
with the same probe on labels that were permuted over patients, whose scores show chance level.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from minsae_jax.estimates import Estimate, Interval
from minsae_jax.evaluation.label_tests import usable_label
from minsae_jax.evaluation.labels import PatientLabel
from minsae_jax.evaluation.permutations import ROUNDING
from minsae_jax.evaluation.pooling import PatientValues
from minsae_jax.evaluation.ranking import auc

N_FEATURES = 5
N_PERMUTATIONS = 200
PENALTY = 1.0
MIN_VAL_PATIENTS = 3  # of each category, or of all for a number
MIN_TEST_PATIENTS = 2


@dataclass(frozen=True)
class ProbeScore:
    """A probe's score on the test patients, and those of probes of permuted labels."""

    # The chosen features
    features: tuple[int, ...]
    score: float
    # Mean over permutations of the labels, over the val patients and over the test patients, with
    # the middle 95 % of them
    permuted: Estimate
    # Share of permutations that score at least as high, the true labels among them
    p: float


@dataclass(frozen=True)
class LabelProbe:
    """Probes of one label: on the features of an SAE, and on raw dimensions."""

    label: str
    # AUC, for more than two categories the mean of each against all others; Spearman's rho
    score_name: Literal["AUC", "Spearman's rho"]
    # The score of a probe that knows nothing
    chance: float
    n_val: int
    n_test: int
    features: ProbeScore
    raw: ProbeScore


@dataclass(frozen=True)
class PooledSplits:
    """Pooled values of the val patients, to fit probes on, and of the test patients."""

    val: PatientValues
    test: PatientValues


def probe_label(
    label: PatientLabel,
    features: PooledSplits,
    raw: PooledSplits,
    n_permutations: int = N_PERMUTATIONS,
    seed: int = 0,
) -> LabelProbe | str:
    """Return the probes of a label, or one sentence that says why there are none.

    Patients without a value are left out, and categories with fewer than three val patients or two
    test patients. seed: of the permutations.
    """
    val_label, note = usable_label(label, features.val.patients, MIN_VAL_PATIENTS, "val patients")
    if val_label is None:
        return note
    test_label, note = usable_label(
        label, features.test.patients, MIN_TEST_PATIENTS, "test patients"
    )
    if test_label is None:
        return note
    common = [name for name in val_label.categories if name in test_label.categories]
    if not label.is_number and len(common) < 2:
        return "fewer than two categories have enough val patients and enough test patients"
    val_label = val_label.only(common)
    test_label = test_label.only(common)
    scores = []
    for splits in (features, raw):
        score = _score(
            splits.val.of(val_label.patients),
            _targets(val_label),
            splits.test.of(test_label.patients),
            _targets(test_label),
            n_permutations,
            seed,
        )
        scores.append(score)
    return LabelProbe(
        label=label.name,
        score_name="Spearman's rho" if label.is_number else "AUC",
        chance=0.0 if label.is_number else 0.5,
        n_val=len(val_label.patients),
        n_test=len(test_label.patients),
        features=scores[0],
        raw=scores[1],
    )


def _targets(label: PatientLabel) -> Float[np.ndarray, "patients targets"]:
    """Return the numbers as a column, or a column of 0 and 1 for every category."""
    if label.is_number:
        return label.values[:, None]
    return np.eye(len(label.categories))[label.category]


def _score(
    values: Float[np.ndarray, "val features"],
    targets: Float[np.ndarray, "val targets"],
    test_values: Float[np.ndarray, "test features"],
    test_targets: Float[np.ndarray, "test targets"],
    n_permutations: int,
    seed: int,
) -> ProbeScore:
    """Fit a probe on the val patients, and score it and those of permuted labels on test."""
    mean = values.mean(axis=0)
    sd = values.std(axis=0)
    # A feature that never varies on val has weight 0, whatever it is divided by.
    sd = np.where(sd > 0, sd, 1)
    z = (values - mean) / sd
    z_test = (test_values - mean) / sd
    ranks = _standardised_ranks(z)
    rng = np.random.default_rng(seed)

    def probe(y: np.ndarray, y_test: np.ndarray) -> tuple[Int[np.ndarray, " chosen"], float]:
        chosen = choose(ranks, y)
        predicted = ridge(z[:, chosen], y, z_test[:, chosen])
        return chosen, rank_score(predicted, y_test)

    chosen, score = probe(targets, test_targets)
    permuted = np.empty(n_permutations)
    for i in range(n_permutations):
        y = targets[rng.permutation(len(targets))]
        y_test = test_targets[rng.permutation(len(test_targets))]
        _, permuted[i] = probe(y, y_test)
    low, high = np.quantile(permuted, [0.025, 0.975]).tolist()
    n_as_high = int((permuted >= score - ROUNDING).sum())
    return ProbeScore(
        features=tuple(int(i) for i in chosen),
        score=score,
        permuted=Estimate(float(permuted.mean()), Interval(low, high)),
        p=(n_as_high + 1) / (n_permutations + 1),
    )


def choose(
    ranks: Float[np.ndarray, "patients features"],
    targets: Float[np.ndarray, "patients targets"],
) -> Int[np.ndarray, " chosen"]:
    """Return the N_FEATURES features with the largest rank correlation with any target.

    It may have either sign. For categories this orders features as |AUC - 0.5| against the other
    categories does, up to ties. ranks: standardised.
    """
    correlation = _standardised_ranks(targets).T @ ranks
    strength = np.abs(correlation).max(axis=0)
    return np.argsort(-strength, kind="stable")[:N_FEATURES]


def _standardised_ranks(x: Float[np.ndarray, "n columns"]) -> Float[np.ndarray, "n columns"]:
    """Return ranks with mean 0 and norm 1 in each column; 0 where all values are equal."""
    ranks = rankdata(x.astype(np.float64), axis=0)
    ranks -= ranks.mean(axis=0)
    norm = np.linalg.norm(ranks, axis=0)
    return ranks / np.where(norm > 0, norm, 1)


def ridge(
    z: Float[np.ndarray, "n features"],
    targets: Float[np.ndarray, "n targets"],
    z_held_out: Float[np.ndarray, "m features"],
) -> Float[np.ndarray, "m targets"]:
    """Return predictions of the ridge regression Σ (y - z w - bias)² + ‖w‖².

    z: standardised with means of 0, so that the bias, which is not penalised, is the mean of y.
    """
    bias = targets.mean(axis=0)
    gram = z.T @ z + PENALTY * np.eye(z.shape[1])
    w = np.linalg.solve(gram, z.T @ (targets - bias))
    return z_held_out @ w + bias


def rank_score(
    predicted: Float[np.ndarray, "n targets"], targets: Float[np.ndarray, "n targets"]
) -> float:
    """Return Spearman's rho for one target, the mean AUC over targets for several."""
    if targets.shape[1] == 1:
        return float((_standardised_ranks(predicted) * _standardised_ranks(targets)).sum())
    aucs = []
    for column, target in zip(predicted.T, targets.T, strict=True):
        aucs += auc(column[:, None], target == 1).tolist()
    return float(np.mean(aucs))
