"""How well scores rank spans with an event above others: AUC, and recall at a precision.

The weighted forms measure one score in many resamples at once; see `draw_patients`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy.sparse import csr_array

from minsae_jax.evaluation.bootstrap import Weights

MIN_PRECISION = 0.9  # of recall_at_precision
# Up to so many pairs of units per span, pairs of spans are counted by units.
MAX_UNIT_PAIRS = 8
WEIGHTS_AT_ONCE = 1 << 17  # of all scores in some of the resamples, which fit the cache


class _Ranking(NamedTuple):
    """The scores above the lowest of their column, by column and score.

    Most activations of a feature are its lowest, 0, and need no sorting.
    """

    # Of every score above the lowest
    row: Int[np.ndarray, " scores"]
    column: Int[np.ndarray, " scores"]
    is_event: Bool[np.ndarray, " scores"]
    # Events and others with a lower score in the column, where equal scores count half
    events_below: Float[np.ndarray, " scores"]
    others_below: Float[np.ndarray, " scores"]
    # Events and others with this score or a higher one
    events_from: Int[np.ndarray, " scores"]
    others_from: Int[np.ndarray, " scores"]
    # Events and others with the lowest score of every column
    lowest_events: Int[np.ndarray, " features"]
    lowest_others: Int[np.ndarray, " features"]


def _rank(scores: Float[np.ndarray, "n features"], is_event: Bool[np.ndarray, " n"]) -> _Ranking:
    n_columns = scores.shape[1]
    n_events = int(is_event.sum())
    n_others = len(is_event) - n_events
    is_above = np.ascontiguousarray((scores > scores.min(axis=0)).T)
    column, row = np.nonzero(is_above)
    # Column, score and row as the bits of one number, since NumPy sorts numbers several times as
    # fast as it finds their order.
    n_bits = len(scores).bit_length()
    tie = column.astype(np.uint64) << 32 | _ordered_bits(scores[row, column])
    numbers = np.sort(tie << n_bits | row.astype(np.uint64))
    tie = numbers >> n_bits
    row = (numbers & ((1 << n_bits) - 1)).astype(np.int64)
    of_event = is_event[row]
    first = np.flatnonzero(np.append(True, tie[1:] != tie[:-1])[: len(tie)])
    size = np.diff(first, append=len(row))
    # Entries from the first of each tie to the end of its column, and the events among them
    end = np.cumsum(np.bincount(column, minlength=n_columns))[column[first]]
    n_before = np.insert(np.cumsum(of_event), 0, 0)
    events_from = n_before[end] - n_before[first]
    others_from = end - first - events_from
    events_equal = n_before[first + size] - n_before[first]
    others_equal = size - events_equal
    return _Ranking(
        row=row,
        column=column,
        is_event=of_event,
        events_below=np.repeat(n_events - events_from + events_equal / 2, size),
        others_below=np.repeat(n_others - others_from + others_equal / 2, size),
        events_from=np.repeat(events_from, size),
        others_from=np.repeat(others_from, size),
        lowest_events=n_events - np.bincount(column[of_event], minlength=n_columns),
        lowest_others=n_others - np.bincount(column[~of_event], minlength=n_columns),
    )


def _ordered_bits(scores: Float[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
    """Return numbers of 32 bits, as uint64, in the same order as the scores."""
    if scores.dtype != np.float32:
        return np.unique(scores, return_inverse=True)[1].astype(np.uint64)
    bits = (scores + np.float32(0)).view(np.int32)  # + 0 makes -0 equal to 0
    # The bits of negative floats are in reverse order.
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.astype(np.int64) + 2**31).astype(np.uint64)


def _n_above(ranking: _Ranking) -> Float[np.ndarray, " features"]:
    """Return the pairs (event, other) of each column in which the event scores higher."""
    below = ranking.others_below[ranking.is_event]
    of_events = ranking.column[ranking.is_event]
    n_columns = len(ranking.lowest_events)
    n_equal = ranking.lowest_events * ranking.lowest_others
    return np.bincount(of_events, below, n_columns) + n_equal / 2


def auc(
    scores: Float[np.ndarray, "n features"],
    is_event: Bool[np.ndarray, " n"],
) -> Float[np.ndarray, " features"]:
    """Return each column's area under the ROC curve.

    It is the probability that an event scores higher than a span without one, where ties count
    half: the Mann-Whitney U over the number of pairs.

    >>> auc(np.array([[1.0], [2.0], [2.0], [3.0]]), np.array([False, False, True, True])).tolist()
    [0.875]
    """
    n_events = int(is_event.sum())
    n_others = len(is_event) - n_events
    return _n_above(_rank(scores, is_event)) / (n_events * n_others)


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
    n_events = int(is_event.sum())
    n_others = len(is_event) - n_events
    n_pairs = n_events * n_others
    ranking = _rank(scores, is_event)
    aucs = _n_above(ranking) / n_pairs
    events_of_unit = np.bincount(unit[is_event], minlength=n_units)
    others_of_unit = np.bincount(unit[~is_event], minlength=n_units)
    # Pairs in which the event scores higher, by the unit of the event and by that of the other:
    # first as if all scores were the lowest of their column
    of_event = ranking.lowest_others / 2
    of_other = n_events - ranking.lowest_events / 2
    higher = np.outer(events_of_unit, of_event) + np.outer(others_of_unit, of_other)
    column = ranking.column
    above_lowest = np.where(
        ranking.is_event,
        ranking.others_below - of_event[column],
        n_events - ranking.events_below - of_other[column],
    )
    cell = unit[ranking.row] * len(aucs) + column
    higher += np.bincount(cell, above_lowest, higher.size).reshape(higher.shape)
    share = events_of_unit / n_events + others_of_unit / n_others
    return Influence(aucs, higher / n_pairs - share[:, None] * aucs)


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
    ranking = _rank(scores, is_event)
    n_events = is_event.sum()
    # A threshold at the lowest score detects all.
    is_all = n_events >= MIN_PRECISION * len(is_event)
    most = np.where(is_all, n_events, np.zeros(scores.shape[1], np.int64))
    detected = ranking.events_from
    is_precise = detected >= MIN_PRECISION * (detected + ranking.others_from)
    np.maximum.at(most, ranking.column[is_precise], detected[is_precise])
    return most / n_events


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
