"""Ranking measures by brute force: pairs, thresholds, and copies of items in place of weights."""

import tracemalloc

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from minsae_jax.evaluation.bootstrap import draw_weights
from minsae_jax.evaluation.ranking import (
    MAX_UNIT_PAIRS,
    MIN_PRECISION,
    auc,
    auc_influence,
    recall_at_precision,
    weighted_auc,
    weighted_recall,
)


def test_auc_counts_pairs():
    rng = np.random.default_rng(0)
    is_event = rng.random(60) < 0.4
    scores = rng.integers(0, 8, size=(60, 5)) + is_event[:, None] * np.arange(5)
    values = auc(scores.astype(float), is_event)
    for column, value in zip(scores.T, values, strict=True):
        pairs = np.sign(column[is_event][:, None] - column[~is_event][None])
        assert value == pytest.approx((pairs.mean() + 1) / 2)
        u = mannwhitneyu(column[is_event], column[~is_event]).statistic
        assert value == pytest.approx(u / (is_event.sum() * (~is_event).sum()))


def pairs_auc(scores, is_event):
    higher = scores[is_event][:, None] - scores[~is_event]
    return (np.sign(higher) + 1).mean() / 2


def best_recall(scores, is_event):
    """Try every threshold."""
    recalls = [0.0]
    for threshold in scores:
        detected = scores >= threshold
        if is_event[detected].mean() >= MIN_PRECISION:
            recalls.append(is_event[detected].sum() / is_event.sum())
    return max(recalls)


@pytest.fixture
def spans():
    """Scores with many equal ones, and the recording of each."""
    rng = np.random.default_rng(0)
    is_event = rng.random(60) < 0.5
    scores = np.round(rng.normal(size=60) + 1.5 * is_event, 1)
    return scores, is_event, rng.integers(0, 5, 60)


def test_influence_is_the_derivative_by_the_weight_of_a_recording():
    rng = np.random.default_rng(0)
    is_event = rng.random(60) < 0.4
    scores = (rng.integers(0, 8, size=(60, 3)) + is_event[:, None]).astype(np.float32)
    recording = rng.choice([0, 1, 3], 60)  # none of recording 2
    result = auc_influence(scores, is_event, recording, n_units=4)
    np.testing.assert_array_equal(result.auc, auc(scores, is_event))
    step = 1e-5 * np.eye(4)
    for column, influence in zip(scores.T, result.influence.T, strict=True):
        above = weighted_auc(column, is_event, recording, 1 + step)
        below = weighted_auc(column, is_event, recording, 1 - step)
        np.testing.assert_allclose(influence, (above - below) / 2e-5, atol=1e-9)
        assert influence[2] == 0


@pytest.mark.parametrize("n_recordings", [5, 40])  # pairs are counted by recording, or by score
def test_a_weight_is_a_number_of_copies(spans, n_recordings):
    scores, is_event, _ = spans
    assert 5**2 <= MAX_UNIT_PAIRS * len(scores) < 40**2
    recording = np.random.default_rng(2).integers(0, n_recordings, len(scores))
    weights = draw_weights(n_recordings, seed=1, resamples=20)
    assert (weights.sum(axis=1) == n_recordings).all()
    aucs = weighted_auc(scores, is_event, recording, weights)
    recalls = weighted_recall(scores, is_event, recording, weights)
    for i, counts in enumerate(weights[:, recording].astype(int)):
        copies = np.repeat(scores, counts)
        are_events = np.repeat(is_event, counts)
        assert aucs[i] == pytest.approx(pairs_auc(copies, are_events))
        assert recalls[i] == pytest.approx(best_recall(copies, are_events))


def test_recalls_of_many_spans_are_exact_and_fit_in_memory():
    """Counts of 20,000 spans in 1,000 resamples would be 160 MB."""
    rng = np.random.default_rng(1)
    n = 20_000
    is_event = rng.random(n) < 0.4
    # A third of them equal, as those on which a feature is not active.
    scores = np.maximum(rng.normal(size=n) + 2 * is_event, 0)
    recording = rng.integers(0, 30, n)
    weights = draw_weights(30, seed=2)
    tracemalloc.start()
    recalls = weighted_recall(scores, is_event, recording, weights)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6
    for i in (0, 1, 7, 8, 500, 999):
        counts = weights[i, recording].astype(int)
        copies = np.sort(np.repeat(scores, counts))
        events = np.sort(np.repeat(scores[is_event], counts[is_event]))
        n_above = len(copies) - np.searchsorted(copies, scores)
        detected = len(events) - np.searchsorted(events, scores)
        is_precise = 10 * detected >= 9 * n_above
        assert recalls[i] == detected[is_precise].max(initial=0) / len(events)


def test_aucs_of_many_spans_and_patients_are_exact_and_fit_in_memory():
    """Counts of 20,000 spans by 500 patients would be 80 MB."""
    rng = np.random.default_rng(3)
    n = 20_000
    is_event = rng.random(n) < 0.4
    scores = np.maximum(np.round(rng.normal(size=n) + is_event, 2), 0)
    patient = 3 * rng.integers(0, 500, n)  # two of three have no spans
    weights = draw_weights(1500, seed=2)
    tracemalloc.start()
    aucs = weighted_auc(scores, is_event, patient, weights)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6
    for i in (0, 1, 500, 999):
        counts = weights[i, patient].astype(int)
        events = np.repeat(scores[is_event], counts[is_event])
        others = np.repeat(scores[~is_event], counts[~is_event])
        u = mannwhitneyu(events, others, method="asymptotic").statistic
        assert aucs[i] == pytest.approx(u / (len(events) * len(others)), rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_columns_of_few_many_and_negative_scores(dtype):
    rng = np.random.default_rng(4)
    is_event = rng.random(80) < 0.7
    x = rng.normal(size=(80, 6)) + 2 * is_event[:, None]
    x[:, 1] = np.where(rng.random(80) < 0.1, x[:, 1], 0)
    x[:, 2] = 0
    x[:, 3] = np.round(x[:, 3])
    x[:, 4] = np.where(x[:, 4] > 2, np.where(is_event, -0.0, 0.0), -x[:, 4] - 5)
    x[:, 5] = 1e-40 * x[:, 5]  # denormal numbers
    scores = x.astype(dtype)
    aucs = [pairs_auc(column.astype(np.float64), is_event) for column in scores.T]
    recalls = [best_recall(column, is_event) for column in scores.T]
    np.testing.assert_allclose(auc(scores, is_event), aucs, rtol=1e-14)
    np.testing.assert_allclose(recall_at_precision(scores, is_event), recalls, rtol=1e-14)
    result = auc_influence(scores, is_event, np.arange(80), 80)
    np.testing.assert_allclose(result.auc, aucs, rtol=1e-14)
    np.testing.assert_allclose(result.influence.sum(axis=0), 0, atol=1e-14)


def test_recall_at_precision_tries_every_threshold(spans):
    scores, is_event, _ = spans
    columns = np.stack([scores, -scores, np.round(scores)], axis=1)
    expected = [best_recall(column, is_event) for column in columns.T]
    assert expected[0] > 0.1
    np.testing.assert_allclose(recall_at_precision(columns, is_event), expected)


def test_resamples_without_events_have_no_value():
    is_event = np.array([True, False, False])
    weights = np.array([[0.0, 1, 2], [1.0, 1, 1]])
    spans = (np.array([3.0, 2, 1]), is_event, np.arange(3))
    np.testing.assert_array_equal(weighted_auc(*spans, weights), [np.nan, 1])
    np.testing.assert_array_equal(weighted_recall(*spans, weights), [np.nan, 1])
