"""Ties in simulations where the best feature for all patients is known."""

import numpy as np
import pytest

from minsae_jax.evaluation.bootstrap import Resamples, draw_weights
from minsae_jax.evaluation.ties import tied_features


def ties_of(values, of_patients=True):
    """Return the ties by means over patients; values: [patients, features], one span of each."""
    n = len(values)
    means = values.mean(axis=0)
    influence = (values - means) / n
    resamples = Resamples(draw_weights(n, seed=0), np.arange(n), of_patients)
    return tied_features(means, influence, np.arange(n), resamples)


@pytest.mark.parametrize("n", [4, 8, 20])
def test_ties_contain_the_best_feature(n):
    """Of 50 features, 20 are equally good for all patients: the first is called the best one."""
    rng = np.random.default_rng(0)
    truth = np.repeat([0.0, -1.0], [20, 30])
    n_covered = 0
    n_by_pairs = 0
    for _ in range(300):
        values = truth + rng.normal(size=(n, 50)) + rng.normal(size=(n, 1))
        ties = ties_of(values)
        n_covered += 0 in ties
        # The difference to the feature that happens to be best, as if it were any feature
        n_by_pairs += 0 in ties_of(values[:, [0, values.mean(axis=0).argmax()]])
    # 95 % or more; 271 or fewer have a probability below 0.1 %
    assert n_covered >= 272
    assert n_by_pairs < 260


def test_features_that_are_far_behind_do_not_make_others_ties():
    """They vary more, and are no more the largest in a resample once they are excluded."""
    rng = np.random.default_rng(0)
    good = rng.normal([1, 0.6], 0.2, size=(12, 2))
    bad = rng.normal(-1, 3, size=(12, 200))
    assert ties_of(good).tolist() == [0]
    assert ties_of(bad[:, :100]).size > 30
    assert ties_of(np.hstack([good, bad - 5])).tolist() == [0]


def test_ties_are_the_same_in_blocks(monkeypatch):
    values = np.random.default_rng(0).normal(size=(6, 50))
    ties = ties_of(values)
    assert 2 < len(ties) < 50
    np.testing.assert_array_equal(np.argsort(-values.mean(axis=0))[0], ties[0])
    monkeypatch.setattr("minsae_jax.evaluation.ties.FEATURE_BLOCK", 7)
    np.testing.assert_array_equal(ties_of(values), ties)


def test_a_copy_of_the_best_feature_is_a_tie():
    values = np.random.default_rng(0).normal(size=(10, 4)) + np.array([0, 9, 0, 0])
    values[:, 3] = values[:, 1]
    assert ties_of(values).tolist() == [1, 3]


def test_ties_require_three_patients():
    values = np.random.default_rng(0).normal(size=(3, 4))
    assert ties_of(values) is not None
    assert ties_of(values, of_patients=False) is None
    assert ties_of(values[:2]) is None
    resamples = Resamples(draw_weights(3, seed=0), np.arange(3))
    # Only two of three patients have such events.
    assert tied_features(values[0], values, np.array([1, 1, 2]), resamples) is None
