"""Permutation tests of ranks: p is the share of the orders of a label with as large a statistic.

They are for columns and labels with many ties and for few patients, where normal, t and chi-squared
approximations fail in the tail that is left after correction for the number of features. Most
features of an SAE are active in few patients, so most columns have many ties.
"""

from collections.abc import Callable, Iterator
from itertools import permutations

import numpy as np
from jaxtyping import Float, Int, Shaped

# Patients up to which p is of all orders of the label, and of random ones with more.
MAX_EXACT = 9
N_ORDERS = 1_000_000
ORDERS_BLOCK = 1000  # at a time
STATISTICS_BLOCK = 1 << 18  # of orders with ties at a time, which fit the cache
# Random orders with as large a statistic after which p is known well enough, to a tenth.
ENOUGH = 100
# Equal statistics of different orders may differ by rounding.
ROUNDING = 1e-9

Statistic = Callable[
    [Float[np.ndarray, "rows n"], Float[np.ndarray, "orders n"]],
    Float[np.ndarray, "rows orders"],
]


def product_size(
    deviation: Float[np.ndarray, "rows n"], orders: Float[np.ndarray, "orders n"]
) -> Float[np.ndarray, "rows orders"]:
    """Return the absolute product of each row of centred ranks with each order of a label.

    With the centred ranks of a number it is proportional to the absolute Spearman correlation, and
    with a label of 0 and 1 it is the distance of the rank sum of the patients with 1 from its mean.
    Ranks are multiples of a half, so that products are exact.
    """
    return np.abs(_products(deviation, orders))


def share_between(
    deviation: Float[np.ndarray, "rows n"], orders: Float[np.ndarray, "orders n"]
) -> Float[np.ndarray, "rows orders"]:
    """Return eta²: the share of the variance of each row of centred ranks between categories.

    orders: orders of a label, with categories 0, 1, 2 and so on. The statistic of the
    Kruskal-Wallis test is H = (n - 1) eta².
    """
    counts = np.bincount(orders[0].astype(int))
    between = np.zeros((len(deviation), len(orders)))
    for category, count in enumerate(counts):
        sums = _products(deviation, orders == category)
        between += np.square(sums) / count
    return between / np.square(deviation).sum(axis=1, keepdims=True)


def _products(
    deviation: Float[np.ndarray, "rows n"], orders: Shaped[np.ndarray, "orders n"]
) -> Float[np.ndarray, "rows orders"]:
    """Return deviation @ orders.T; quick for sorted rows that begin with many equal numbers.

    Most columns of an SAE do: they are 0 for most patients. Only distances from the first number of
    a row are multiplied, which are 0 there: Σ d_i l_i = Σ (d_i - d_0) l_i + d_0 Σ l_i. Without
    rounding, since ranks are multiples of a half.
    """
    first = deviation[:, :1]
    distance = deviation - first
    n_equal = int(np.argmax(distance.any(axis=0)))
    products = distance[:, n_equal:] @ orders[:, n_equal:].T.astype(np.float64, copy=False)
    return products + first * orders.sum(axis=1)


def permutation_p(
    deviation: Float[np.ndarray, "n features"], label: Float[np.ndarray, " n"], statistic: Statistic
) -> Float[np.ndarray, " features"]:
    """Return the share of the orders of the label whose statistic with a column is as large.

    Of all orders for up to nine patients. With more, random orders are drawn, always the same,
    until 100 have as large a statistic or there are a million: p is at least 1e-6, and right to
    about a tenth down to 1e-4.

    deviation: ranks minus their mean. statistic: never negative; it must not depend on the order of
    the patients.
    """
    observed = statistic(deviation.T, label[None])[:, 0] * (1 - ROUNDING)
    # Columns with the same ties have the same statistics in all orders.
    ties, ties_of_column = np.unique(np.sort(deviation.T), axis=0, return_inverse=True)
    n_orders = np.zeros(len(observed), np.int64)
    n_as_large = np.zeros(len(observed), np.int64)
    # By their ties
    columns = np.argsort(ties_of_column, kind="stable")
    for orders in _orders(label):
        if len(columns) == 0:
            break
        # Statistics are of patterns of ties that still have a column; `row` is that of each column.
        open_ties, row = np.unique(ties_of_column[columns], return_inverse=True)
        block = max(1, STATISTICS_BLOCK // len(orders))
        for start in range(0, len(open_ties), block):
            first, end = np.searchsorted(row, [start, start + block])
            some = columns[first:end]
            statistics = statistic(ties[open_ties[start : start + block]], orders)
            n_as_large[some] += _count_as_large(statistics, row[first:end] - start, observed[some])
        n_orders[columns] += len(orders)
        # Large p need few random orders (Besag & Clifford 1991).
        columns = columns[n_as_large[columns] < ENOUGH]
    if len(label) > MAX_EXACT:
        # The label's own order is one more, so that p is never 0 (Phipson & Smyth 2010).
        return (n_as_large + 1) / (n_orders + 1)
    return n_as_large / n_orders


def _count_as_large(
    statistics: Float[np.ndarray, "rows orders"],
    row: Int[np.ndarray, " columns"],
    observed: Float[np.ndarray, " columns"],
) -> Int[np.ndarray, " columns"]:
    """Return for each column the number of statistics in its row that are as large as observed."""
    by_order = np.sort(statistics, axis=1)
    # Rows one after the other on one line, so that one search finds all columns, each in its row.
    width = 1 + max(by_order.max(), observed.max())
    line = by_order + width * np.arange(len(by_order))[:, None]
    place = np.searchsorted(line.ravel(), observed + width * row)
    return (row + 1) * by_order.shape[1] - place


def _orders(label: Float[np.ndarray, " n"]) -> Iterator[Float[np.ndarray, "orders n"]]:
    """Yield all orders of a label, or random ones, always the same."""
    if len(label) <= MAX_EXACT:
        yield np.array(list(permutations(label)))
        return
    rng = np.random.default_rng(0)
    for _ in range(N_ORDERS // ORDERS_BLOCK):
        yield rng.permuted(np.tile(label, (ORDERS_BLOCK, 1)), axis=1)
