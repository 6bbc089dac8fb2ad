"""Bootstrap intervals of a mean, and where there is none."""

import numpy as np
import pytest
from scipy.stats import norm, ttest_1samp

from minsae_jax.evaluation.bootstrap import draw_patients, draw_weights, interval, reached


def test_interval_of_a_mean_has_the_normal_width():
    rng = np.random.default_rng(2)
    values = rng.normal(size=400)
    means = draw_weights(400, seed=3, resamples=4000) @ values / 400
    low, high = interval(means, 400)
    half_width = norm.ppf(0.975) * values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - half_width, abs=0.1 * half_width)
    assert high == pytest.approx(values.mean() + half_width, abs=0.1 * half_width)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_interval_of_a_mean_over_few_patients_is_that_of_student(n):
    values = np.random.default_rng(n).normal(size=n)
    means = draw_weights(n, seed=0, resamples=100_000) @ values / n
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    half_width = (expected.high - expected.low) / 2
    assert interval(means, n) == pytest.approx(tuple(expected), abs=0.02 * half_width)


@pytest.mark.parametrize(("n", "outside"), [(5, 0.0010), (10, 0.0086), (20, 0.0159), (1000, 0.025)])
def test_percentiles_are_those_of_hesterberg(n, outside):
    """Below the lower end of an interval; replicates are the percentiles themselves."""
    replicates = np.linspace(0, 1, 100_001)
    assert interval(replicates, n) == pytest.approx((outside, 1 - outside), abs=2e-4)


def test_interval_is_inside_its_limits():
    replicates = np.array([0.7, 0.9, 0.9, 1.0])
    assert interval(replicates, 2, (0.0, 1.0)) == (0, 1)
    low, high = interval(replicates, 2)
    assert low < 0
    assert high > 1


def test_a_single_recording_has_no_interval():
    assert interval(draw_weights(1, seed=0) @ np.array([0.7]), 1) is None
    assert interval(np.full(10, np.nan), 3) is None
    assert interval(np.full(10, 0.7), 3) is None
    # A single patient's AUC is that of its spans in each resample, up to rounding.
    assert interval(np.array([0.7, 0.7 + 1e-16 * 5]), 1) is None


def test_patients_are_drawn_with_all_of_their_recordings():
    names = [f"{patient}_s001_t{i:03d}_preprocessed.npy" for patient in "abc" for i in range(2)]
    drawn = draw_patients(names, seed=0)
    assert drawn.unit.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(drawn.weights, draw_weights(3, seed=0))
    assert drawn.of_patients
    assert drawn.n_units(np.arange(6)) == 3
    assert drawn.n_units(np.array([2, 3, 3, 5])) == 2
    of_one = draw_patients(names[:2], seed=0)
    assert of_one.unit.tolist() == [0, 1]
    np.testing.assert_array_equal(of_one.weights, draw_weights(2, seed=0))
    assert of_one.n_units(np.array([0, 1])) == 2
    assert not of_one.of_patients


@pytest.mark.parametrize(("n", "by_percentiles"), [(3, 0.75), (5, 0.84), (15, 0.9)])
def test_interval_of_many_recordings_of_few_patients_covers_the_truth(n, by_percentiles):
    """Values of a patient are alike: of n patients with 8 recordings each, the mean is 0."""
    rng = np.random.default_rng(0)
    names = [f"p{i:03d}_s001_t{j:03d}_preprocessed.npy" for i in range(n) for j in range(8)]
    n_covered = 0
    n_by_percentiles = 0
    for seed in range(400):
        values = np.repeat(rng.normal(size=n), 8) + rng.normal(size=8 * n)
        drawn = draw_patients(names, seed)
        weights = drawn.weights[:, drawn.unit]
        means = weights @ values / weights.sum(axis=1)
        low, high = interval(means, n)
        n_covered += low < 0 < high
        low, high = np.percentile(means, [2.5, 97.5])
        n_by_percentiles += low < 0 < high
    # 90 % or more; 356 or fewer have a probability below 1 %
    assert n_covered >= 345
    assert n_by_percentiles / 400 == pytest.approx(by_percentiles, abs=0.05)


@pytest.mark.parametrize("n", [4, 8])
def test_a_one_sided_interval_ends_where_a_two_sided_one_of_90_percent_does(n, monkeypatch):
    rng = np.random.default_rng(0)
    means = (draw_weights(n, seed=0) @ rng.normal(size=(n, 3)) / n).T
    monkeypatch.setattr("minsae_jax.evaluation.bootstrap.COVERAGE", 0.9)
    highs = np.array([interval(row, n).high for row in means])
    monkeypatch.undo()
    assert reached(means, highs - 0.03, n).all()
    assert not reached(means, highs + 0.03, n).any()
