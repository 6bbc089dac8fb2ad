"""The logistic regression of probes."""

import numpy as np

from minsae_jax.evaluation.linear_probe import fit_probe
from minsae_jax.evaluation.ranking import auc


def test_probe_finds_a_direction_that_no_column_shows_alone():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(400, 5)) * [1, 3, 1, 1, 1] + 7
    is_event = x[:, 0] - x[:, 1] / 3 + 0.1 * rng.normal(size=400) > 7 - 7 / 3
    assert auc(x, is_event).max() < 0.9
    probe = fit_probe(x[:200], is_event[:200])
    assert auc(probe(x[200:])[:, None], is_event[200:])[0] > 0.98
