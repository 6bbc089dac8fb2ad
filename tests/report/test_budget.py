"""Which features get a page."""

from dataclasses import replace

import numpy as np
import pytest

from minsae_jax.report.budget import REPORT_BYTES, choose_features, plan_pages
from minsae_jax.report.examples import collect


@pytest.fixture(scope="module")
def dataset(trained):
    return trained.dataset("test")


def test_montages_are_reduced_before_features(dataset):
    """Recordings of 19 channels at 100 Hz, with 2.1 seconds shown."""
    small = plan_pages(dataset, 210, 16, 1024, None)
    large = plan_pages(dataset, 210, 16, 16_384, None)
    huge = plan_pages(dataset, 210, 16, 131_072, None)
    assert (small.n_features, small.montage_examples) == (1024, 8)
    assert large.n_features == 16_384
    assert 1 <= large.montage_examples < 8
    assert 16_384 < huge.n_features < 131_072
    assert huge.montage_examples == 1
    for n_samples in (210, 2100, 21_000):
        plan = plan_pages(dataset, n_samples, 16, 131_072, None)
        n_bytes = plan.n_features * (32 * n_samples + 19 * n_samples / 2)
        assert n_bytes < REPORT_BYTES


def test_a_set_number_of_features_is_kept(dataset):
    assert plan_pages(dataset, 21_000, 16, 131_072, 100_000).n_features == 100_000
    assert plan_pages(dataset, 210, 16, 500, 1000).n_features == 500


def test_relevant_features_are_chosen(trained, dataset):
    sae = trained.sae()
    activity = collect(dataset, sae)
    f = np.asarray(sae.encode(dataset.read(0, len(dataset.recording)))).reshape(-1, 64)
    contribution = (f[:, :, None] * sae.decoder_directions[None]).sum(0)
    order = np.argsort(-np.linalg.norm(contribution, axis=1))
    least = int(order[-1])
    chosen = choose_features(sae, activity, [least], 10)
    assert chosen == sorted([least, *order[:9].tolist()])
    active = activity.active.copy()
    active[[least, order[0]]] = 0
    without = choose_features(sae, replace(activity, active=active), [least], 64)
    assert without == sorted(set(range(64)) - {least, int(order[0])})
