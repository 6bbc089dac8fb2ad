"""Bootstrap intervals of a mean, and where there is none."""

import numpy as np
import pytest
from scipy.stats import norm

from minsae_jax.evaluation.bootstrap import draw_weights, interval


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
