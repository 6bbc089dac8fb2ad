"""Results of the evaluation for single features."""

import numpy as np

from minsae_jax.evaluation.stability import Stability
from minsae_jax.report.findings import Findings

NAN = np.nan


def test_seeds_of_a_feature_are_its_own_and_those_of_close_matches():
    """Features 0 to 3: found with both, with one and with no other seed, and dead."""
    stability = Stability(
        others=("seed=1", "seed=2"),
        is_live=np.array([True, True, True, False]),
        match=np.array([[1, 0, 2, -1], [0, 3, -1, -1]]),
        decoder_cosine=np.array([[0.9, 0.71, 0.7, NAN], [0.8, 0.2, 0, NAN]]),
        encoder_cosine=np.array([[0.5, 0.6, 0.7, NAN], [0.8, 0.9, 0, NAN]]),
        chance=np.zeros(1),
    )
    findings = Findings(stability=stability)
    first, second, third, dead = map(findings.stability_of, range(4))
    assert (first.found, second.found, third.found) == (3, 2, 1)
    assert first.seeds == 3
    assert [(m.member, m.feature, m.is_same) for m in second.matches] == [
        ("seed=1", 0, True),
        ("seed=2", 3, False),
    ]
    assert len(third.matches) == 1
    assert dead is None
