"""Tests of labels against SciPy, feature by feature, and on labels with and without an effect."""

import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from minsae_jax.evaluation.label_tests import (
    MAX_PERMUTED,
    compare_labels,
    kruskal_wallis,
    mann_whitney,
    regression_slope,
    spearman,
    usable_label,
)
from minsae_jax.evaluation.labels import PatientLabel
from minsae_jax.evaluation.permutations import MAX_EXACT
from minsae_jax.evaluation.pooling import PatientValues


def patients_named(n):
    return tuple(f"p{i}" for i in range(n))


def category_label(indices, names=("no", "yes")):
    indices = np.asarray(indices, np.float64)
    return PatientLabel("label", patients_named(len(indices)), indices, names)


def number_label(values):
    return PatientLabel("age", patients_named(len(values)), np.asarray(values, np.float64), ())


def values_with_ties(n, n_features=40):
    """Pooled features, half of them with ties, but less than half of the patients equal."""
    rng = np.random.default_rng(n)
    values = rng.normal(size=(n, n_features))
    values[:, ::2] = np.maximum(values[:, ::2], -0.5).round(1)
    return values[:, stats.mode(values).count < n / 2]


@pytest.mark.parametrize("n", [9, 14, 40])
def test_mann_whitney_is_that_of_scipy(n):
    values = values_with_ties(n)
    is_second = np.arange(n) % 3 == 0
    auc, p = mann_whitney(values, is_second)
    for i, column in enumerate(values.T):
        expected = stats.mannwhitneyu(column[is_second], column[~is_second])
        n_pairs = is_second.sum() * (~is_second).sum()
        assert auc[i] == pytest.approx(expected.statistic / n_pairs, abs=1e-12)
        assert p[i] == pytest.approx(expected.pvalue, abs=1e-9)


@pytest.mark.parametrize("n", [9, 40])
def test_kruskal_wallis_is_that_of_scipy(n):
    values = values_with_ties(n)
    category = np.arange(n) % 3
    eta2, p = kruskal_wallis(values, category)
    for i, column in enumerate(values.T):
        expected = stats.kruskal(*(column[category == c] for c in range(3)))
        assert p[i] == pytest.approx(expected.pvalue, abs=1e-9)
        ranks = stats.rankdata(column)
        means = np.array([ranks[category == c].mean() for c in category])
        assert eta2[i] == pytest.approx(means.var() / ranks.var(), abs=1e-9)


@pytest.mark.parametrize("n", [14, 60])
def test_spearman_and_slope_are_those_of_scipy(n):
    """p is SciPy's with many patients only, since its approximation is too small with few."""
    values = values_with_ties(n)
    values[:, 1] = np.arange(n)
    label = np.arange(n).astype(float) ** 2
    label[:3] = label[3]  # ties
    rho, p = spearman(values, label)
    slope = regression_slope(values, label)
    for i, column in enumerate(values.T):
        expected = stats.spearmanr(column, label)
        assert rho[i] == pytest.approx(expected.statistic, abs=1e-9)
        if n > MAX_PERMUTED:
            assert p[i] == pytest.approx(expected.pvalue, abs=1e-9)
        assert slope[i] == pytest.approx(stats.linregress(label, column).slope, abs=1e-9)


def rare_features(n, n_active, n_features, rng):
    """Features that are active in few patients, more of them among the first than by chance."""
    order = rng.random((n, n_features))
    order[:4] *= rng.random(n_features)
    is_active = order.argsort(axis=0).argsort(axis=0) < n_active
    return np.where(is_active, rng.exponential(size=order.shape).round(1) + 0.1, 0)


def exact_p(values, is_inside):
    """For each column, the share of all groups of this size whose rank sum is as far off."""
    ranks = stats.rankdata(values, axis=0)
    groups = np.array(list(combinations(range(len(values)), is_inside.sum())))
    sums = sum(ranks[patient] for patient in groups.T)
    mean = is_inside.mean() * ranks.sum(axis=0)
    observed = np.abs(ranks[is_inside].sum(axis=0) - mean)
    return (np.abs(sums - mean) >= observed - 1e-9).mean(axis=0)


@pytest.mark.parametrize(("n_second", "n"), [(3, 8), (3, 20), (3, 40), (4, 26), (6, 16)])
@pytest.mark.parametrize("n_active", [1, 3, 8])
def test_features_of_few_patients_have_the_p_of_all_groups(n_second, n, n_active):
    """The normal approximation is up to 160,000 times too small here."""
    n_active = min(n_active, n // 2)
    values = rare_features(n, n_active, 40, np.random.default_rng(n))
    is_second = np.arange(n) < n_second
    _, p = mann_whitney(values, is_second)
    exact = exact_p(values, is_second)
    tolerance = 0.35 if n > MAX_EXACT else 1e-12
    np.testing.assert_allclose(p, exact, rtol=tolerance)
    # The same for the other group, whose rank sum is the rest.
    np.testing.assert_array_equal(mann_whitney(values, ~is_second)[1], p)


def exact_h_p(column, category):
    """The share of all groups of these sizes whose H is as large, by scipy.stats.kruskal's formula.

    Three categories, of which the first two are drawn one after the other.
    """
    patients = set(range(len(column)))
    counts = np.bincount(category)
    ranks = stats.rankdata(column)
    squares = []
    for first in combinations(sorted(patients), counts[0]):
        rest = np.array(sorted(patients - set(first)))
        second = np.array(list(combinations(range(len(rest)), counts[1])))
        sums = ranks[rest][second].sum(axis=1)
        of_first = ranks[list(first)].sum()
        of_third = ranks.sum() - of_first - sums
        squares.append(of_first**2 / counts[0] + sums**2 / counts[1] + of_third**2 / counts[2])
    observed = sum(ranks[category == c].sum() ** 2 / counts[c] for c in range(3))
    return (np.concatenate(squares) >= observed - 1e-9).mean()


@pytest.mark.parametrize("sizes", [(3, 3, 3), (3, 4, 9)])
def test_features_of_few_patients_against_several_categories_have_the_p_of_all_groups(sizes):
    n = sum(sizes)
    values = rare_features(n, 3, 10, np.random.default_rng(0))
    category = np.repeat([0, 1, 2], sizes)
    _, p = kruskal_wallis(values, category)
    exact = np.array([exact_h_p(column, category) for column in values.T])
    tolerance = 0.35 if n > MAX_EXACT else 1e-12
    np.testing.assert_allclose(p, exact, rtol=tolerance)


@pytest.mark.parametrize("sizes", [(10, 50), (5, 10, 45)])
def test_feature_of_one_category_is_found_among_16384(sizes):
    """The smallest p, of a million random orders, is small enough for this."""
    rng = np.random.default_rng(0)
    values = np.where(rng.random((60, 16384)) < 0.1, rng.random((60, 16384)), 0)
    category = np.repeat(np.arange(len(sizes)), sizes)
    values[:, 7] = np.where(category == 1, rng.random(60), 0)
    if len(sizes) == 2:
        values[:, 7] = np.where(category == 0, rng.random(60), 0)
    pooled = PatientValues(patients_named(60), values)
    (result,) = compare_labels(pooled, [category_label(category, ("a", "b", "c")[: len(sizes)])])
    assert result.test.significant().tolist() == [7]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(3, 57), (10, 50), (3, 3, 54), (5, 15, 40)])
def test_random_labels_of_few_patients_are_not_found(sizes):
    """Small categories and features of few patients, as SAEs have many."""
    rng = np.random.default_rng(2)
    n_active = np.exp(rng.uniform(0, np.log(60), 300)).astype(int)
    order = rng.random((60, 300)).argsort(axis=0).argsort(axis=0)
    pooled = PatientValues(patients_named(60), np.where(order < n_active, 1 + order, 0.0))
    category = np.repeat(np.arange(len(sizes)), sizes)
    names = ("a", "b", "c")[: len(sizes)]
    labels = [category_label(rng.permutation(category), names) for _ in range(40)]
    results = compare_labels(pooled, labels)
    n_labels = sum(len(result.test.significant()) > 0 for result in results)
    assert n_labels <= 6  # 2 are expected; 7 or more have a probability of 0.3 %


@pytest.mark.parametrize(("n", "expected"), [(12, 1 / 1_000_001), (60, 0)])
def test_perfect_correlation_has_the_smallest_p(n, expected):
    rho, p = spearman(np.arange(n)[:, None] * [1.0, -1.0], np.arange(float(n)))
    assert rho.tolist() == [1, -1]
    assert p.tolist() == [expected, expected]


def exact_tail(n):
    """The probability of a sum of squared rank differences of up to 0, 1, 2 and so on.

    Ranks are given to one patient after the other: the orders of each set of ranks are counted.
    """
    size = (n**3 - n) // 3 + 1
    counts = np.zeros((1 << n, size))
    counts[0, 0] = 1
    for ranks in range(1, 1 << n):
        patient = ranks.bit_count() - 1
        for rank in range(n):
            if ranks >> rank & 1:
                square = (rank - patient) ** 2
                counts[ranks, square:] += counts[ranks ^ (1 << rank), : size - square]
    return counts[-1].cumsum() / counts[-1].sum()


def test_spearman_is_right_in_the_tail_where_the_t_approximation_is_not():
    n = 12
    rng = np.random.default_rng(0)
    order = np.arange(float(n))
    values = order[:, None] + rng.normal(size=(n, 200)) * np.linspace(0.8, 4, 200)
    _, p = spearman(values, order)
    ranks = stats.rankdata(values, axis=0) - 1
    squares = np.square(ranks - order[:, None]).sum(axis=0).astype(int)
    expected = 2 * exact_tail(n)[squares]
    by_t = stats.spearmanr(order, values).pvalue[0, 1:]
    for low, high, tolerance in ((1e-2, 1e-1, 0.3), (1e-3, 1e-2, 0.3), (5e-5, 2e-4, 0.35)):
        is_in = (expected > low) & (expected < high)
        assert is_in.sum() >= 10
        np.testing.assert_allclose(p[is_in], expected[is_in], rtol=tolerance)
    assert (by_t[is_in] < 0.6 * expected[is_in]).all()


@pytest.mark.parametrize("n", [3, 5, 6])
@pytest.mark.parametrize("has_ties", [False, True])
def test_spearman_of_few_patients_is_a_permutation_test(n, has_ties):
    values = values_with_ties(n, 5)
    values = values[:, np.ptp(values, axis=0) > 0]
    values[:, 0] = np.arange(n)
    label = np.arange(n).astype(float)
    if has_ties:
        label[0] = label[1]
    _, p = spearman(values, label)
    for i, column in enumerate(values.T):
        test = stats.permutation_test(
            (column,),
            lambda x: stats.spearmanr(x, label).statistic,
            permutation_type="pairings",
            n_resamples=np.inf,
        )
        # SciPy doubles the smaller tail; of ranks with ties both tails can differ.
        null = np.abs(test.null_distribution)
        expected = (null >= abs(test.statistic) - 1e-9).mean()
        assert p[i] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n_active", [2, 3, 6, 12])
def test_spearman_of_many_patients_is_a_permutation_test_where_most_are_equal(n_active):
    """A number that is 1 for 3 of 60 patients is a group, whose rank sums can be enumerated."""
    values = rare_features(60, n_active, 40, np.random.default_rng(n_active))
    number = np.zeros(60)
    number[:3] = 1
    rho, p = spearman(values, number)
    exact = exact_p(values, number == 1)
    np.testing.assert_allclose(p, exact, rtol=0.35)
    by_t = stats.spearmanr(number, values).pvalue[0, 1:]
    assert (by_t < 0.2 * exact).any()
    np.testing.assert_allclose(rho, stats.spearmanr(number, values).statistic[0, 1:])


@pytest.mark.slow
def test_random_numbers_that_are_equal_for_most_patients_are_not_found():
    """Seizures in a month, for example, against features that are active in few patients."""
    rng = np.random.default_rng(0)
    n_active = np.exp(rng.uniform(np.log(2), np.log(60), 300)).astype(int)
    order = rng.random((60, 300)).argsort(axis=0).argsort(axis=0)
    pooled = PatientValues(patients_named(60), np.where(order < n_active, 1 + order, 0.0))
    n_labels = 0
    for _ in range(60):
        number = rng.permutation(np.r_[np.zeros(54), rng.poisson(5, 6) + 1.0])
        (result,) = compare_labels(pooled, [number_label(number)])
        n_labels += len(result.test.significant()) > 0
    assert n_labels <= 8  # 3 are expected; 9 or more have a probability of 0.4 %


@pytest.mark.parametrize("n", [4, 6, pytest.param(9, marks=pytest.mark.slow)])
def test_random_numbers_of_few_patients_are_not_found(n):
    rng = np.random.default_rng(n)
    n_labels = 0
    for _ in range(20):
        pooled = PatientValues(patients_named(n), rng.normal(size=(n, 500)))
        (result,) = compare_labels(pooled, [number_label(rng.normal(size=n))])
        n_labels += len(result.test.significant()) > 0
    assert n_labels <= 4  # 1 is expected; 5 or more have a probability of 0.3 %


def test_q_is_of_the_features_that_vary():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(20, 30))
    label = category_label(np.arange(20) % 2)
    values[label.category == 1, 3] += 10
    values[:, 5] = 7
    pooled = PatientValues(label.patients, values)
    (result,) = compare_labels(pooled, [label])
    assert (result.test.p[5], result.test.q[5], result.test.effect[5]) == (1, 1, 0.5)
    varying = np.delete(result.test.p, 5)
    # Benjamini & Hochberg by hand: p times m over its rank, made monotone from the largest down.
    order = np.argsort(varying)
    by_hand = varying[order] * 29 / np.arange(1, 30)
    by_hand = np.minimum.accumulate(by_hand[::-1])[::-1]
    np.testing.assert_allclose(np.delete(result.test.q, 5)[order], by_hand)
    assert result.test.significant().tolist() == [3]
    assert result.test.effect[3] == 1
    assert result.test.effect_name == "AUC"
    assert result.test.n_patients == (10, 10)


def test_patients_without_a_label_or_a_value_are_left_out():
    rng = np.random.default_rng(0)
    pooled = PatientValues(patients_named(12), rng.normal(size=(12, 4)))
    label = PatientLabel("age", ("p3", "p0", "p5", "elsewhere", "p7"), np.arange(5.0), ())
    (result,) = compare_labels(pooled, [label])
    assert result.test.n_patients == (4,)
    expected = stats.spearmanr(pooled.values[[3, 0, 5, 7], 0], [0, 1, 2, 4])
    assert result.test.effect[0] == pytest.approx(expected.statistic)


def test_small_categories_are_left_out_with_a_note():
    label = category_label([0, 0, 0, 1, 2, 2, 2, 3, 3], ("a", "b", "c", "d"))
    usable, note = usable_label(label, label.patients, 3)
    assert usable.categories == ("a", "c")
    assert usable.category.tolist() == [0, 0, 0, 1, 1, 1]
    assert note == "categories with fewer than 3 patients left out: b (1), d (2)"


@pytest.mark.parametrize(
    ("label", "note"),
    [
        (category_label([0, 0, 0, 1, 1]), "with 3 patients: no (3), yes (2)"),
        (category_label([0, 0, 0, 0], ("no",)), "with 3 patients: no (4)"),
        (number_label([30, 40]), "patients with a value: 2, at least 3 needed"),
        (number_label([30, 30, 30, 30]), "patients with a value: 4, which is the same for all"),
        (number_label([]), "patients with a value: 0, at least 3 needed"),
    ],
)
def test_too_few_patients_are_a_note(label, note):
    pooled = PatientValues(patients_named(9), np.ones((9, 3)))
    (result,) = compare_labels(pooled, [label])
    assert result.test is None
    assert note in result.note


@pytest.mark.parametrize(
    ("label", "note"),
    [
        (number_label([1, 2, 3]), "too few patients for q < 0.05: without ties no p is below 0.33"),
        (number_label([1, 2, 3, 4, 5]), ""),
        (
            category_label([0, 0, 0, 1, 1, 1, 1]),
            "too few patients for q < 0.05: without ties no p is below 0.057",
        ),
        (category_label([0, 0, 0, 0, 1, 1, 1, 1]), ""),
    ],
)
def test_patients_too_few_for_any_association_are_a_note(label, note):
    """The p of a feature that follows the label perfectly, which is the smallest."""
    n = len(label.patients)
    pooled = PatientValues(patients_named(n), np.arange(float(n))[:, None])
    (result,) = compare_labels(pooled, [label])
    assert result.note == note
    assert (result.test.p[0] >= 0.05) == bool(note)
    if note:
        assert note.endswith(f"{result.test.p[0]:.2g}")


@pytest.mark.slow
def test_random_labels_are_found_at_the_nominal_rate():
    """The share of labels with any feature at q < 0.05, over labels of all three types."""
    rng = np.random.default_rng(1)
    n = 40
    pooled = PatientValues(patients_named(n), np.maximum(rng.normal(size=(n, 100)), 0))
    for draw in (
        lambda: category_label(rng.permutation(np.arange(n) % 2)),
        lambda: category_label(rng.permutation(np.arange(n) % 3), ("a", "b", "c")),
        lambda: number_label(rng.normal(size=n)),
    ):
        results = compare_labels(pooled, [draw() for _ in range(200)])
        n_labels = sum(len(result.test.significant()) > 0 for result in results)
        assert n_labels <= 20  # 10 are expected; 21 or more have a probability below 0.1 %
        p = np.concatenate([result.test.p for result in results])
        # Uniform p: the share below 5 % itself, over labels and features.
        assert 0.03 < (p < 0.05).mean() < 0.06


@pytest.mark.parametrize("n_categories", [0, 2, 3])
def test_tests_of_many_features_fit_in_memory(n_categories):
    """Ranks of all features at once would take eight times the memory of the values, or more."""
    n = 500
    values = np.random.default_rng(0).normal(size=(n, 4096))
    label = number_label(np.arange(n))
    if n_categories:
        label = category_label(np.arange(n) % n_categories, tuple("abc"[:n_categories]))
    pooled = PatientValues(patients_named(n), values)
    tracemalloc.start()
    (result,) = compare_labels(pooled, [label])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.test is not None
    # Two copies, the deviations of the regression on a number, and a block of ranks
    assert peak < 4.5 * values.nbytes
