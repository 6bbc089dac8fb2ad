"""Features that could be the best one for a kind of events, as far as the val patients can tell.

The feature with the largest AUC on some patients need not be the best one for all patients. The
ties are a set of features that contains the best one for all patients with a probability of 95 %,
from paired differences of AUC in the same resamples of the patients.

The difference of a single feature to the one that is largest of many is too large by chance. So
each feature is compared with the largest of all (multiple comparisons with the best: Gupta 1965,
"On Some Multiple Decision (Selection and Ranking) Rules"; Hsu 1996, "Multiple Comparisons"). It
stays if its distance from the largest AUC is below the 95 % quantile of

    max over features j of (AUC_j* - AUC_j) - (AUC* - AUC),

where * is a resample: how far behind it would be by chance if it were the best. Features that do
not stay cannot be the largest by chance either, so that this is repeated without them until all
stay, as in the model confidence set of Hansen, Lunde & Nason 2011 (Econometrica 79:453).

AUC* - AUC is linear in the numbers of times that patients are drawn (see `auc_influence`), which
takes one matrix product for all features.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from minsae_jax.evaluation.bootstrap import Resamples, reached

# With two, all features are ties, since Student's distribution with one degree of freedom is wide.
MIN_PATIENTS = 3
FEATURE_BLOCK = 1024  # whose resamples are in memory
ROUNDING = 1e-12  # of an AUC


def tied_features(
    aucs: Float[np.ndarray, " d_sae"],
    influence: Float[np.ndarray, "units d_sae"],
    recording: Int[np.ndarray, " spans"],
    resamples: Resamples,
) -> Int[np.ndarray, " ties"] | None:
    """Return the features that could be the best one, by decreasing AUC.

    influence: of the units of `resamples` on the AUCs. recording: of each span. None if fewer than
    three patients have such spans, who say too little about others.
    """
    n_patients = resamples.n_units(recording)
    if not resamples.of_patients or n_patients < MIN_PATIENTS:
        return None
    features = np.argsort(-aucs, kind="stable")
    while True:
        distance = aucs[features[0]] - aucs[features]
        stays = _is_by_chance(distance, influence[:, features], resamples, n_patients)
        if stays.all():
            return features
        features = features[stays]


def _is_by_chance(
    distance: Float[np.ndarray, " n"],
    influence: Float[np.ndarray, "units n"],
    resamples: Resamples,
    n_patients: int,
) -> Bool[np.ndarray, " n"]:
    """Return which features, if they were the best, could be so far from the largest AUC."""
    blocks = [slice(i, i + FEATURE_BLOCK) for i in range(0, len(distance), FEATURE_BLOCK)]
    weights = (resamples.weights - 1).T
    # [n, resamples] is not in memory: the changes of a block are computed twice.
    largest = np.full(len(resamples.weights), -np.inf)
    for block in blocks:
        np.maximum(largest, (influence[:, block].T @ weights).max(axis=0), out=largest)
    is_by_chance = []
    for block in blocks:
        by_chance = largest - influence[:, block].T @ weights
        is_by_chance.append(reached(by_chance, distance[block] - ROUNDING, n_patients))
    return np.concatenate(is_by_chance)
