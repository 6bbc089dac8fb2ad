"""Bootstrap intervals over recordings, and ranking measures of weighted scores.

Spans of one recording are not independent, so whole recordings are resampled (a cluster bootstrap;
Field & Welsh 2007). A resample is a weight for each recording: how often it was drawn. All measures
of a resample use the same weights, so that differences and means of measures have intervals too.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

RESAMPLES = 1000
COVERAGE = 95  # % of the resamples inside an interval
MIN_PRECISION = 0.9  # of recall_at_precision
RESAMPLES_AT_ONCE = 8  # of which numbers for all spans fit the cache


class Interval(NamedTuple):
    """A 95 % percentile interval."""

    low: float
    high: float


def draw_weights(
    n_units: int, seed: int, resamples: int = RESAMPLES
) -> Float[np.ndarray, "resamples n_units"]:
    """Return for each resample how often each recording, or other unit, is drawn."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n_units, np.full(n_units, 1 / n_units), size=resamples)
    return counts.astype(np.float64)


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


def weighted_auc(
    scores: Float[np.ndarray, " n"],
    is_event: Bool[np.ndarray, " n"],
    recording: Int[np.ndarray, " n"],
    weights: Float[np.ndarray, "resamples recordings"],
) -> Float[np.ndarray, " resamples"]:
    """Return the area under the ROC curve of each resample; NaN without events or others.

    It is the weight of the pairs (event, other) in which the event scores higher, where equal
    scores count half, over that of all pairs. The weight of a pair is the product of those of its
    recordings, so that pairs are counted once by recordings, for all resamples.
    """
    _, place = np.unique(scores, return_inverse=True)
    counts = np.zeros((2, len(scores), weights.shape[1]))  # by side, place and recording
    np.add.at(counts, (is_event.astype(int), place, recording), 1)
    others, events = counts
    below = np.cumsum(others, axis=0) - others / 2
    higher = events.T @ below  # [recordings of events, recordings of others]
    above = (weights @ higher * weights).sum(axis=1)
    pairs = (weights @ events.sum(axis=0)) * (weights @ others.sum(axis=0))
    return np.divide(above, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def weighted_recall(
    scores: Float[np.ndarray, " n"],
    is_event: Bool[np.ndarray, " n"],
    recording: Int[np.ndarray, " n"],
    weights: Float[np.ndarray, "resamples recordings"],
) -> Float[np.ndarray, " resamples"]:
    """Return the largest recall at a precision of at least 90 % of each resample.

    It is 0 if no threshold is that precise, and NaN without events.
    """
    # By decreasing score: everything from a score on is detected.
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    # A threshold cannot lie between equal scores.
    thresholds = np.flatnonzero(np.append(ordered[1:] < ordered[:-1], True))
    recalls = []
    for first in range(0, len(weights), RESAMPLES_AT_ONCE):
        of_spans = weights[first : first + RESAMPLES_AT_ONCE, recording[order]]
        n_above = np.cumsum(of_spans, axis=1)[:, thresholds]
        detected = np.cumsum(of_spans * is_event[order], axis=1)[:, thresholds]
        is_precise = detected >= MIN_PRECISION * n_above
        most = (detected * is_precise).max(axis=1)
        n_events = detected[:, -1]
        undefined = np.full(len(most), np.nan)
        recalls.append(np.divide(most, n_events, out=undefined, where=n_events > 0))
    return np.concatenate(recalls)


def recall_at_precision(
    scores: Float[np.ndarray, "n features"], is_event: Bool[np.ndarray, " n"]
) -> Float[np.ndarray, " features"]:
    """Return for each column the largest recall at a precision of at least 90 %, 0 if none is.

    >>> scores = np.array([[4.0], [3.0], [2.0], [1.0]])
    >>> recall_at_precision(scores, np.array([True, False, True, True])).tolist()
    [0.3333333333333333]
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    ordered = np.take_along_axis(scores, order, axis=0)
    detected = np.cumsum(is_event[order], axis=0)
    n_above = np.arange(1, len(scores) + 1)[:, None]
    # A threshold cannot lie between equal scores.
    is_threshold = np.ones(scores.shape, bool)
    is_threshold[:-1] = ordered[:-1] > ordered[1:]
    is_precise = is_threshold & (detected >= MIN_PRECISION * n_above)
    return (detected * is_precise).max(axis=0) / is_event.sum()
