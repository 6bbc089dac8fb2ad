"""Probes of labels: planted effects are read, permuted labels are not."""

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from minsae_jax.evaluation.label_probes import PooledSplits, probe_label, rank_score, ridge
from minsae_jax.evaluation.labels import PatientLabel
from minsae_jax.evaluation.pooling import PatientValues


def make_splits(rng, n_val=24, n_test=30, n_features=50):
    names = tuple(f"p{i}" for i in range(n_val + n_test))
    values = rng.normal(size=(n_val + n_test, n_features))
    val = PatientValues(names[:n_val], values[:n_val])
    test = PatientValues(names[n_val:], values[n_val:])
    return names, values, PooledSplits(val, test)


@pytest.mark.parametrize("n_categories", [2, 3])
def test_planted_category_is_read_and_its_permutations_are_not(n_categories):
    rng = np.random.default_rng(0)
    names, values, splits = make_splits(rng)
    _, _, raw = make_splits(rng)
    category = np.arange(len(names)) % n_categories
    values[:, 7] += 5 * (category == 1)
    values[:, 9] -= 5 * (category == 0)
    label = PatientLabel("group", names, category.astype(float), tuple("abc"[:n_categories]))
    probe = probe_label(label, splits, raw)
    assert {7, 9} <= set(probe.features.features)
    assert len(probe.features.features) == len(probe.raw.features) == 5
    assert probe.features.score > 0.95
    assert probe.features.p == 1 / 201
    # The raw dimensions have no effect, and permuted labels are at chance.
    assert abs(probe.raw.score - 0.5) < 0.3
    assert probe.raw.p > 0.01
    for score in (probe.features, probe.raw):
        assert score.permuted.value == pytest.approx(0.5, abs=0.03)
    assert (probe.score_name, probe.chance, probe.n_val, probe.n_test) == ("AUC", 0.5, 24, 30)


def test_planted_number_is_read_and_its_permutations_are_not():
    rng = np.random.default_rng(1)
    names, values, splits = make_splits(rng)
    age = rng.uniform(20, 80, len(names))
    values[:, 3] += age / 5
    probe = probe_label(PatientLabel("age", names, age, ()), splits, splits)
    assert (probe.score_name, probe.chance) == ("Spearman's rho", 0)
    assert 3 in probe.features.features
    assert probe.features.score > 0.8
    assert probe.features.permuted.value == pytest.approx(0, abs=0.05)
    # The same features for both: the same result.
    assert probe.raw.score == probe.features.score


def test_equal_scores_of_permuted_labels_count_although_they_are_rounded():
    """Of the 24 orders of four test patients, 19 have as large a correlation."""
    rng = np.random.default_rng(5)
    names, values, splits = make_splits(rng, n_test=4, n_features=1)
    number = np.concatenate([rng.normal(size=24), [0, 2, 1, 3]])
    values[:, 0] = np.concatenate([number[:24], [3, 0, 1, 2]])
    rho = stats.spearmanr(values[24:, 0], number[24:]).statistic
    orders = [stats.spearmanr(values[24:, 0], order).statistic for order in permutations(range(4))]
    assert sum(other > rho - 1e-9 for other in orders) == 19
    label = PatientLabel("number", names, number, ())
    p = probe_label(label, splits, splits, n_permutations=1000).features.p
    assert p == pytest.approx(19 / 24, abs=0.04)


@pytest.mark.slow
def test_random_labels_score_as_their_permutations():
    rng = np.random.default_rng(2)
    names, _, splits = make_splits(rng, n_features=20)
    p = []
    for _ in range(60):
        category = rng.permutation(np.arange(len(names)) % 2).astype(float)
        label = PatientLabel("group", names, category, ("no", "yes"))
        p.append(probe_label(label, splits, splits, n_permutations=50).features.p)
    # A valid p is below 0.1 for one label in ten.
    assert np.mean(np.array(p) <= 0.1) < 0.25
    assert np.mean(p) == pytest.approx(0.5, abs=0.12)


def test_ridge_minimises_its_loss():
    rng = np.random.default_rng(3)
    z = rng.normal(size=(12, 3))
    z -= z.mean(0)
    y = rng.normal(size=(12, 1))
    # Least squares with ‖w‖² as three more rows, and a column of ones that these rows do not touch.
    rows = np.block([[z, np.ones((12, 1))], [np.eye(3), np.zeros((3, 1))]])
    solution, *_ = np.linalg.lstsq(rows, np.concatenate([y, np.zeros((3, 1))]))
    held_out = rng.normal(size=(5, 3))
    expected = held_out @ solution[:3] + solution[3]
    np.testing.assert_allclose(ridge(z, y, held_out), expected, rtol=1e-9)


def test_scores_are_those_of_scipy():
    rng = np.random.default_rng(4)
    predicted = rng.normal(size=(20, 1)).round(1)
    number = rng.normal(size=(20, 1))
    expected = stats.spearmanr(predicted[:, 0], number[:, 0]).statistic
    assert rank_score(predicted, number) == pytest.approx(expected)
    is_in = rng.random(20) < 0.4
    u = stats.mannwhitneyu(predicted[is_in, 0], predicted[~is_in, 0]).statistic
    auc = u / (is_in.sum() * (~is_in).sum())
    both = np.concatenate([predicted, -predicted], axis=1)
    targets = np.stack([is_in, ~is_in], axis=1).astype(float)
    assert rank_score(both, targets) == pytest.approx(auc)


def test_too_few_patients_are_a_reason():
    rng = np.random.default_rng(5)
    names, _, splits = make_splits(rng, n_val=4, n_test=8)
    label = PatientLabel("group", names, np.arange(12.0) % 2, ("no", "yes"))
    assert "fewer than two categories with 3 val patients" in probe_label(label, splits, splits)
    number = PatientLabel("age", names[:5], np.arange(5.0), ())
    reason = probe_label(number, splits, splits)
    assert reason == "test patients with a value: 1, at least 2 needed"
