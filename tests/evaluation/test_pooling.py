"""Pooled features and shares of variance against brute force in float64, and planted effects."""

from dataclasses import replace

import numpy as np
import pytest

from minsae_jax import TokenGrid
from minsae_jax.evaluation import pooling
from minsae_jax.evaluation.pooling import by_patient, pool
from minsae_jax.evaluation.variance import variance_shares
from tests.evaluation.planted import (
    TOKENS,
    draw_codes,
    draw_dictionary,
    make_places,
    true_autoencoder,
    write_planted,
)


@pytest.fixture(scope="module")
def places():
    return make_places(6, 7)


@pytest.fixture(scope="module")
def activations(places):
    rng = np.random.default_rng(0)
    return draw_codes(rng, places, 40) @ draw_dictionary(rng, 40, 12)


@pytest.fixture(scope="module")
def dataset(places, activations, tmp_path_factory):
    return write_planted(tmp_path_factory.mktemp("planted"), activations, places)


@pytest.fixture
def sae():
    sae = true_autoencoder(draw_dictionary(np.random.default_rng(1), 30, 12))
    # Features of large mean and small variance, where sums of squares would cancel.
    bias = np.where(np.arange(30) < 3, 100, -0.1)
    sae.params["b_enc"] += bias.astype(np.float32)
    return sae


@pytest.mark.parametrize("batch_values", [1, 3 * TOKENS * 30, 1 << 23])
def test_pooled_features_are_those_of_all_tokens(dataset, sae, batch_values, monkeypatch):
    """Whatever the size of batches: of one sequence, of three, of whole recordings."""
    monkeypatch.setattr(pooling, "CPU_BATCH_VALUES", batch_values)
    pooled = pool(dataset, sae)
    assert pooled.recordings == dataset.recordings
    everything = np.asarray(sae.encode(dataset.read(0, len(dataset.recording))), np.float64)
    for i in range(len(dataset.recordings)):
        features = everything[dataset.recording == i].reshape(-1, 30)
        assert pooled.n_tokens[i] == len(features)
        np.testing.assert_allclose(pooled.mean[i], features.mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(pooled.maximum[i], features.max(0), rtol=1e-6)
        np.testing.assert_allclose(pooled.active[i], (features > 0).mean(0), rtol=1e-6)


def test_raw_dimensions_are_pooled_without_an_autoencoder(
    activations, places, tmp_path, monkeypatch
):
    """Some are negative on all tokens, and the last batch of a recording is not full."""
    values = activations - np.where(np.arange(12) < 6, 20, 0)
    dataset = write_planted(tmp_path, values, places)
    monkeypatch.setattr(pooling, "CPU_BATCH_VALUES", 5 * TOKENS * 12)
    pooled = pool(dataset, None)
    assert (pooled.maximum[:, :6] < 0).all()
    for i in range(len(dataset.recordings)):
        of_recording = values[dataset.recording == i].reshape(-1, 12)
        np.testing.assert_allclose(pooled.mean[i], of_recording.mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(pooled.maximum[i], of_recording.max(0), rtol=1e-6)
        np.testing.assert_allclose(pooled.active[i], (of_recording > 0).mean(0), rtol=1e-6)


def eta2(features, groups):
    """The share by brute force: what group means explain of [tokens, features]."""
    explained = np.empty_like(features)
    for group in np.unique(groups):
        explained[groups == group] = features[groups == group].mean(0)
    return explained.var(0) / features.var(0)


@pytest.mark.parametrize("batch_values", [1, 1 << 23])
def test_shares_of_variance(dataset, places, sae, batch_values, monkeypatch):
    monkeypatch.setattr(pooling, "CPU_BATCH_VALUES", batch_values)
    shares = variance_shares(pool(dataset, sae))
    everything = np.asarray(sae.encode(dataset.read(0, len(dataset.recording))), np.float64)
    features = everything.reshape(-1, 30)
    position = np.tile(np.arange(TOKENS), len(everything))
    for of_groups, groups in (
        (shares.position, position),
        (shares.channel, np.repeat(places.channel, TOKENS)),
        (shares.recording, np.repeat(places.recording, TOKENS)),
        (shares.patient, np.repeat(places.patient, TOKENS)),
    ):
        # The first features are 100 ± 1 in float32, which leaves fewer digits.
        np.testing.assert_allclose(of_groups[:3], eta2(features, groups)[:3], rtol=1e-3)
        np.testing.assert_allclose(of_groups[3:], eta2(features, groups)[3:], rtol=1e-5, atol=1e-9)
    assert (shares.patient <= shares.recording * (1 + 1e-6)).all()


def test_tokens_with_channels_of_their_own(dataset, sae):
    """The same store read as windows whose tokens are channels, with a CLS token first."""
    tokens = TokenGrid.patches(1, 40, n_channels=TOKENS - 1, n_cls=1)
    windows = np.full(len(dataset.recording), -1)
    pooled = pool(replace(dataset, tokens=tokens, channel=windows), sae)
    features = np.asarray(sae.encode(dataset.read(0, len(dataset.recording))), np.float64)
    of_channel = features[:, [1, 2, 3, 0]].mean(0)
    np.testing.assert_allclose(pooled.by_channel.mean, of_channel, rtol=1e-5, atol=1e-7)
    of_position = [features[:, 0].mean(0), features[:, 1:].mean((0, 1))]
    np.testing.assert_allclose(pooled.by_position.mean, of_position, rtol=1e-5, atol=1e-7)


def test_planted_effects_are_flagged(tmp_path):
    """Features 0 to 3 depend on patient 3, channel, position and recording; 4 on none."""
    rng = np.random.default_rng(2)
    places = make_places(6, 40)
    codes = 0.2 * draw_codes(rng, places, 8)
    codes[places.patient == 3, :, 0] += 1
    codes[places.channel == 1, :, 1] += 1
    codes[:, 2, 2] += 1
    codes[places.recording == 2, :, 3] += 1
    sae = true_autoencoder(np.eye(8))
    shares = variance_shares(pool(write_planted(tmp_path, codes, places), sae))
    assert np.flatnonzero(shares.patient > 0.9).tolist() == [0]
    assert np.flatnonzero(shares.channel > 0.9).tolist() == [1]
    assert np.flatnonzero(shares.position > 0.9).tolist() == [2]
    assert np.flatnonzero(shares.recording > 0.9).tolist() == [0, 3]
    # Recording 2 is one of the two of patient 1: half of the effect is common to both.
    assert np.flatnonzero(shares.patient > 0.3).tolist() == [0, 3]
    assert shares.top_patient[0] == "p003"
    assert shares.top_patient_share[0] > 0.9
    for share in (shares.patient, shares.channel, shares.position, shares.recording):
        assert (share[4:] < 0.02).all()


def test_feature_that_never_varies_has_no_shares(tmp_path):
    places = make_places(3, 2)
    shape = (len(places.recording), TOKENS, 2)
    shares = variance_shares(pool(write_planted(tmp_path, np.zeros(shape), places), None))
    assert shares.patient.tolist() == shares.position.tolist() == [0, 0]
    assert np.isnan(shares.top_patient_share).all()


def test_recordings_of_a_patient_count_equally():
    recordings = ("b_s001_t000.npy", "a_s001_t000.npy", "a_s001_t001.npy")
    of_patients = by_patient(recordings, np.array([[1.0], [2.0], [5.0]], np.float32))
    assert of_patients.patients == ("b", "a")
    assert of_patients.values.tolist() == [[1.0], [3.5]]


def test_patients_with_equal_shares_of_active_tokens_are_equal(tmp_path):
    """Of 40 tokens in each of two recordings, 4 and 8 are active, or 6 and 6, or 12 and 0."""
    places = make_places(6, 5)
    n_active = {1: (4, 8), 3: (6, 6), 5: (12, 0)}
    activations = np.zeros((len(places.recording), TOKENS, 1))
    for patient, counts in n_active.items():
        recordings = np.unique(places.recording[places.patient == patient])
        for recording, count in zip(recordings, counts, strict=True):
            of_recording = np.zeros((places.recording == recording).sum() * TOKENS)
            of_recording[:count] = 1
            activations[places.recording == recording, :, 0] = of_recording.reshape(-1, TOKENS)
    pooled = pool(write_planted(tmp_path, activations, places), true_autoencoder(np.eye(1)))
    of_patients = by_patient(pooled.recordings, pooled.values("active"))
    shares = of_patients.of(["p001", "p003", "p005"])[:, 0]
    assert shares[0] == shares[1] == shares[2] == pytest.approx(0.15)
