"""How well scores rank spans with an event above others: AUC, and recall at a precision.

The weighted forms measure one score in many resamples at once; see `draw_patients`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from scipy.stats import rankdata

from minsae_jax.evaluation.bootstrap import Weights

MIN_PRECISION = 0.9  # of recall_at_precision
# Up to so many pairs of units per span, pairs of spans are counted by units.
MAX_UNIT_PAIRS = 8
WEIGHTS_AT_ONCE = 1 << 17  # of all scores in some of the resamples, which fit the cache


def auc(
    scores: Float[np.ndarray, "n features"],
    is_event: Bool[np.ndarray, " n"],
) -> Float[np.ndarray, " features"]:
    """Return each column's area under the ROC curve.

    It is the probability that an event scores higher than a span without one, where ties count
    half; computed from ranks as the Mann-Whitney U.

    >>> auc(np.array([[1.0], [2.0], [2.0], [3.0]]), np.array([False, False, True, True])).tolist()
    [0.875]
    """
    # U is the number of pairs (event, other) in which the event scores higher. An event of rank r
    # is above r - 1 scores; summed over events, n (n - 1) / 2 of these are other events.
    # In float64, since newer versions of SciPy return the type of the scores.
    ranks = rankdata(scores, axis=0).astype(np.float64)
    n_events = int(is_event.sum())
    n_others = len(is_event) - n_events
    u = ranks[is_event].sum(axis=0) - n_events * (n_events + 1) / 2
    return u / (n_events * n_others)


class Influence(NamedTuple):
    """The area under the ROC curve of every column, and how it depends on each unit."""

    auc: Float[np.ndarray, " features"]
    influence: Float[np.ndarray, "units features"]


def auc_influence(
    scores: Float[np.ndarray, "n features"],
    is_event: Bool[np.ndarray, " n"],
    unit: Int[np.ndarray, " n"],
    n_units: int,
) -> Influence:
    """Return each column's AUC, and its derivative by the weight of each unit at weights of 1.

    Units are patients, for example. The derivative is the infinitesimal jackknife of
    `weighted_auc`. It follows from how many others are below each event, and how many events above
    each other (the placements of DeLong et al. 1988, summed over clusters as by Obuchowski 1997),
    where equal scores count half; both are differences of ranks. The influences of all units add up
    to 0.
    """
    # With weights w of units, AUC = Σ w_a w_b H_ab / (E O): H_ab is the number of pairs of an event
    # of unit a above another span of unit b, and E = Σ w_a E_a and O = Σ w_b O_b count events and
    # others. At weights of 1, its derivative by w_a is
    # (Σ_b H_ab + Σ_b H_ba) / (E O) - AUC (E_a / E + O_a / O).
    ranks = rankdata(scores, axis=0).astype(np.float64)
    n_events = int(is_event.sum())
    n_others = len(is_event) - n_events
    # A rank among all minus that among the events is the number of others below.
    others_below = ranks[is_event] - rankdata(scores[is_event], axis=0)
    events_below = ranks[~is_event] - rankdata(scores[~is_event], axis=0)
    n_pairs = n_events * n_others
    aucs = others_below.sum(axis=0) / n_pairs
    # Pairs in which the event scores higher, by the unit of the event and by that of the other
    higher = _sum_by_unit(others_below, unit[is_event], n_units)
    higher += _sum_by_unit(n_events - events_below, unit[~is_event], n_units)
    share = np.bincount(unit[is_event], minlength=n_units) / n_events
    share += np.bincount(unit[~is_event], minlength=n_units) / n_others
    return Influence(aucs, higher / n_pairs - share[:, None] * aucs)


def _sum_by_unit(
    values: Float[np.ndarray, "n features"], unit: Int[np.ndarray, " n"], n_units: int
) -> Float[np.ndarray, "units features"]:
    """Return the sums of the rows of each unit."""
    cells = (unit, np.arange(len(unit)))
    return csr_array((np.ones(len(unit)), cells), shape=(n_units, len(unit))) @ values


def weighted_auc(
    scores: Float[np.ndarray, " n"],
    is_event: Bool[np.ndarray, " n"],
    unit: Int[np.ndarray, " n"],
    weights: Weights,
) -> Float[np.ndarray, " resamples"]:
    """Return the area under the ROC curve of each resample; NaN without events or others.

    It is the weight of the pairs (event, other) in which the event scores higher, where equal
    scores count half, over that of all pairs. The weight of a pair is the product of those of its
    units.
    """
    present, unit = np.unique(unit, return_inverse=True)
    weights = weights[:, present]
    if len(present) ** 2 <= MAX_UNIT_PAIRS * len(scores):
        above = _sum_by_pairs(scores, is_event, unit, weights)
    else:
        above = _sum_by_score(scores, is_event, unit, weights)
    n_events = weights @ np.bincount(unit[is_event], minlength=len(present))
    n_others = weights @ np.bincount(unit[~is_event], minlength=len(present))
    pairs = n_events * n_others
    return above / np.where(pairs > 0, pairs, np.nan)


def _sum_by_pairs(
    scores: Float[np.ndarray, " n"],
    is_event: Bool[np.ndarray, " n"],
    unit: Int[np.ndarray, " n"],
    weights: Weights,
) -> Float[np.ndarray, " resamples"]:
    """Return the weight of the pairs in which the event scores higher, for few units.

    Pairs are counted once by units, for all resamples.
    """
    n_units = weights.shape[1]
    order = np.argsort(scores)  # sorted scores are found faster
    of_events = order[is_event[order]]
    of_others = order[~is_event[order]]
    higher = np.zeros((n_units, n_units))  # [units of events, units of others]
    for i in range(n_units):
        others = scores[of_others[unit[of_others] == i]]
        n_below = np.searchsorted(others, scores[of_events], side="left")
        n_up_to = np.searchsorted(others, scores[of_events], side="right")
        wins = (n_below + n_up_to) / 2  # equal scores count half
        higher[:, i] = np.bincount(unit[of_events], wins, n_units)
    # Σ_ab w_a H_ab w_b of each resample
    return ((weights @ higher) * weights).sum(axis=1)


def _sum_by_score(
    scores: Float[np.ndarray, " n"],
    is_event: Bool[np.ndarray, " n"],
    unit: Int[np.ndarray, " n"],
    weights: Weights,
) -> Float[np.ndarray, " resamples"]:
    """Return the weight of the pairs in which the event scores higher, for many units.

    The weight of the others below each event is a cumulative sum for each resample.
    """
    sums = []
    for events, others in _weights_by_score(scores, is_event, unit, weights):
        below = np.cumsum(others, axis=0) - others / 2
        sums.append(np.einsum("sr,sr->r", events, below))
    return np.concatenate(sums)


def _weights_by_score(
    scores: Float[np.ndarray, " n"],
    is_event: Bool[np.ndarray, " n"],
    unit: Int[np.ndarray, " n"],
    weights: Weights,
) -> Iterator[tuple[Float[np.ndarray, "steps some"], Float[np.ndarray, "steps some"]]]:
    """Yield the weights of events and of others by increasing score, for some resamples at a time.

    A step is one score, or several neighbouring ones that events alone have, or others alone: AUC
    and largest recall do not depend on the order within such a step.
    """
    order = np.argsort(scores)
    ordered = scores[order]
    score = np.cumsum(np.append(False, ordered[1:] > ordered[:-1]))
    n_events = np.bincount(score, is_event[order])
    n_others = np.bincount(score, ~is_event[order])
    # 1 for events alone, -1 for others alone
    side = np.sign(n_events) - np.sign(n_others)
    is_new = (side[1:] != side[:-1]) | (side[1:] == 0)
    step = np.cumsum(np.append(False, is_new))[score]
    shape = (int(step[-1]) + 1, weights.shape[1])
    counts = []  # of events and of others, in each step, of each unit
    for chosen in (is_event[order], ~is_event[order]):
        cells = (step[chosen], unit[order[chosen]])
        counts.append(csr_array((np.ones(len(cells[0])), cells), shape=shape))
    n_resamples = max(1, WEIGHTS_AT_ONCE // shape[0])
    for first in range(0, len(weights), n_resamples):
        of_units = weights[first : first + n_resamples].T
        yield counts[0] @ of_units, counts[1] @ of_units


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


def weighted_recall(
    scores: Float[np.ndarray, " n"],
    is_event: Bool[np.ndarray, " n"],
    unit: Int[np.ndarray, " n"],
    weights: Weights,
) -> Float[np.ndarray, " resamples"]:
    """Return the largest recall at a precision of at least 90 % of each resample.

    It is 0 if no threshold is that precise, and NaN without events.
    """
    present, unit = np.unique(unit, return_inverse=True)
    weights = weights[:, present]
    recalls = []
    for events, others in _weights_by_score(scores, is_event, unit, weights):
        # Everything from a score on is detected.
        detected = np.cumsum(events[::-1], axis=0)
        n_above = detected + np.cumsum(others[::-1], axis=0)
        is_precise = detected >= MIN_PRECISION * n_above
        most = (detected * is_precise).max(axis=0)
        n_events = detected[-1]
        undefined = np.full(len(most), np.nan)
        recalls.append(np.divide(most, n_events, out=undefined, where=n_events > 0))
    return np.concatenate(recalls)
