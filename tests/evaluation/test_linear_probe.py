"""The logistic regression of probes."""

import numpy as np
import pytest
from scipy.optimize import minimize

from minsae_jax.evaluation.linear_probe import fit_probe
from minsae_jax.evaluation.ranking import auc


def test_probe_finds_a_direction_that_no_column_shows_alone():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(400, 5)) * [1, 3, 1, 1, 1] + 7
    is_event = x[:, 0] - x[:, 1] / 3 + 0.1 * rng.normal(size=400) > 7 - 7 / 3
    assert auc(x, is_event).max() < 0.9
    probe = fit_probe(x[:200], is_event[:200])
    assert auc(probe(x[200:])[:, None], is_event[200:])[0] > 0.98


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_probe_is_the_minimum_of_its_loss(noise):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(300, 4)) @ rng.normal(size=(4, 4)) + 5
    is_event = x[:, 0] + noise * rng.normal(size=300) > 5
    probe = fit_probe(x, is_event)
    sd = x.std(axis=0)
    z = (x - x.mean(axis=0)) / sd

    def loss(parameters: np.ndarray) -> float:
        margins = np.where(is_event, 1, -1) * (z @ parameters[1:] + parameters[0])
        return np.log1p(np.exp(-margins)).mean() + 5e-4 * np.square(parameters[1:]).sum()

    expected = minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-7}).x
    np.testing.assert_allclose(probe.weights * sd, expected[1:], rtol=1e-4)
    logits = z @ expected[1:] + expected[0]
    np.testing.assert_allclose(probe(x), logits, rtol=1e-4, atol=1e-4)
