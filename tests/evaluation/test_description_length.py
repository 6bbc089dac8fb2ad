"""Description length against closed forms and the entropy of rounded values."""

import numpy as np
import pytest
from scipy.stats import entropy

from minsae_jax.evaluation.description_length import ROUNDING_FVU, description_length

# Bits of a variable that is rounded to one value: the bound is not 0 there.
ONE_VALUE = np.log2(2 * np.pi * np.e / 12) / 2


def test_features_of_one_value():
    """Two features active half of the time, one always, one never: 1 + 1 + 0 + 0 bits."""
    active = np.array([50, 50, 100, 0])
    mean = np.array([3.0, 1.0, 2.0, 0.0])
    bits = description_length(active, mean, mean**2, 100, variance=1.0)
    assert bits == pytest.approx(2 + ONE_VALUE * (0.5 + 0.5 + 1))


@pytest.mark.parametrize("sd", [1.0, 5.0])
def test_gaussian_values_have_the_entropy_of_rounded_ones(sd):
    rng = np.random.default_rng(0)
    n_tokens = 400_000
    values = rng.normal(30 * sd, sd, size=n_tokens // 4)
    variance = 4.0
    step = np.sqrt(12 * ROUNDING_FVU * variance / 0.25)
    _, counts = np.unique(np.round(values / step), return_counts=True)
    expected = entropy([0.25, 0.75], base=2) + entropy(counts, base=2) / 4
    bits = description_length(
        np.array([len(values)]),
        np.array([values.mean()]),
        np.array([np.square(values).mean()]),
        n_tokens,
        variance,
    )
    assert bits == pytest.approx(expected, rel=0.01)


def test_is_an_upper_bound_for_other_values():
    rng = np.random.default_rng(1)
    values = rng.exponential(3, size=100_000)
    step = np.sqrt(12 * ROUNDING_FVU)
    _, counts = np.unique(np.round(values / step), return_counts=True)
    bits = description_length(
        np.array([len(values)]),
        np.array([values.mean()]),
        np.array([np.square(values).mean()]),
        len(values),
        variance=1.0,
    )
    rounded = entropy(counts, base=2)
    assert rounded < bits < rounded + 1


def test_rounding_adds_its_share_of_the_variance():
    """Three of ten orthogonal features per token, rounded by the step that the code assumes."""
    rng = np.random.default_rng(2)
    features = rng.exponential(1, (20_000, 10)) * (rng.random((20_000, 10)) < 0.3)
    variance = features.var(axis=0).sum()
    l0 = (features > 0).sum(1).mean()
    step = np.sqrt(12 * ROUNDING_FVU * variance / l0)
    error = np.square(np.round(features / step) * step - features).sum(1).mean()
    assert error / variance == pytest.approx(ROUNDING_FVU, rel=0.1)


def test_a_larger_dictionary_is_longer_and_a_dense_code_too():
    def bits(d_sae, l0):
        active = np.full(d_sae, 1000 * l0 / d_sae)
        return description_length(active, np.ones(d_sae), np.full(d_sae, 2.0), 1000, 1.0)

    assert bits(64, 4) < bits(1024, 4) < bits(1024, 16) < bits(1024, 100)
