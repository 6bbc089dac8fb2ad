"""Bootstrap intervals over patients.

Spans of one patient are not independent, so whole patients are resampled (a cluster bootstrap;
Field & Welsh 2007). A resample is a weight for each recording: how often its patient was drawn. All
measures of a resample use the same weights, so that differences and means of measures have
intervals too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from minsae_jax.evaluation.pooling import group_by_patient

RESAMPLES = 1000
COVERAGE = 95  # % of the resamples inside an interval
# How often each recording, or other unit, is drawn
Weights = Float[np.ndarray, "resamples recordings"]


class Interval(NamedTuple):
    """A 95 % percentile interval."""

    low: float
    high: float


def draw_weights(n_units: int, seed: int, resamples: int = RESAMPLES) -> Weights:
    """Return for each resample how often each recording, or other unit, is drawn."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n_units, np.full(n_units, 1 / n_units), size=resamples)
    return counts.astype(np.float64)


def draw_patients(recordings: Sequence[str], seed: int) -> Weights:
    """Return for each resample how often each recording is drawn, as part of its patient.

    Patients are drawn with all of their recordings; of a single patient, recordings are drawn.
    """
    patients, patient = group_by_patient(recordings)
    if len(patients) == 1:
        return draw_weights(len(recordings), seed)
    return draw_weights(len(patients), seed)[:, patient]


def interval(replicates: Float[np.ndarray, " resamples"]) -> Interval | None:
    """Return the percentile interval of a measure's values in all resamples.

    Resamples in which the measure is undefined (NaN) are left out. None if nothing varies, as with
    a single recording: then there is no interval to speak of.
    """
    defined = replicates[np.isfinite(replicates)]
    if len(defined) == 0 or np.ptp(defined) == 0:
        return None
    outside = (100 - COVERAGE) / 2
    low, high = np.percentile(defined, [outside, 100 - outside])
    return Interval(float(low), float(high))
