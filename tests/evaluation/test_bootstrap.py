"""Bootstrap intervals of a mean, and where there is none."""

import numpy as np
import pytest
from scipy.stats import norm

from minsae_jax.evaluation.bootstrap import draw_patients, draw_weights, interval


def test_interval_of_a_mean_has_the_normal_width():
    rng = np.random.default_rng(2)
    values = rng.normal(size=400)
    means = draw_weights(400, seed=3, resamples=4000) @ values / 400
    low, high = interval(means)
    half_width = norm.ppf(0.975) * values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - half_width, abs=0.1 * half_width)
    assert high == pytest.approx(values.mean() + half_width, abs=0.1 * half_width)


def test_a_single_recording_has_no_interval():
    assert interval(draw_weights(1, seed=0) @ np.array([0.7])) is None
    assert interval(np.full(10, np.nan)) is None


def test_patients_are_drawn_with_all_of_their_recordings():
    names = [f"{patient}_s001_t{i:03d}_preprocessed.npy" for patient in "abc" for i in range(2)]
    weights = draw_patients(names, seed=0)
    np.testing.assert_array_equal(weights[:, ::2], weights[:, 1::2])
    np.testing.assert_array_equal(weights[:, ::2], draw_weights(3, seed=0))
    np.testing.assert_array_equal(draw_patients(names[:2], seed=0), draw_weights(2, seed=0))


def test_interval_of_many_recordings_of_few_patients_covers_the_truth():
    """Values of a patient are alike: of 15 patients with 8 recordings each, the mean is 0."""
    rng = np.random.default_rng(0)
    names = [f"p{i:03d}_s001_t{j:03d}_preprocessed.npy" for i in range(15) for j in range(8)]
    n_covered = 0
    for seed in range(200):
        values = np.repeat(rng.normal(size=15), 8) + rng.normal(size=120)
        weights = draw_patients(names, seed)
        low, high = interval(weights @ values / weights.sum(axis=1))
        n_covered += low < 0 < high
    assert n_covered >= 168  # 88 % are covered; resampled recordings cover it in 59 %
