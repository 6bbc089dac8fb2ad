"""Traces, spectra and changes of reconstructions by brute force."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.signal import welch

from minsae_jax import TokenGrid
from minsae_jax.evaluation.config import Band
from minsae_jax.evaluation.steering.edit import Place, SteeredEncoder
from minsae_jax.evaluation.steering.output import assemble, measure_windows

BANDS = [Band("low", 1, 8), Band("high", 8, 30), Band("none", 60, 70)]
FEATURE = 17


def test_overlapping_patches_are_averaged(trained):
    """Patches of 30 samples every 20, of 19 channels in one sequence, the last beyond the end."""
    grid = TokenGrid.patches(50, 30, stride=20, first_sample=5, n_channels=19)
    dataset = replace(trained.dataset("test"), tokens=grid)
    patches = np.random.default_rng(0).normal(size=(2, 1, 50 * 19, 30)).astype(np.float32)
    traces = assemble(dataset, patches)
    assert traces.shape == (2, 19, 1000)
    for sample in (0, 4, 5, 24, 25, 34, 35, 500, 999):
        covering = [p for p in range(50) if 5 + 20 * p <= sample < 35 + 20 * p]
        for channel in (0, 7, 18):
            values = [patches[:, 0, 50 * channel + p, sample - 5 - 20 * p] for p in covering]
            expected = np.mean(values, axis=0) if values else np.zeros(2)
            np.testing.assert_allclose(traces[:, channel, sample], expected, atol=1e-6)


def test_changes_match_their_definitions(trained):
    dataset = trained.dataset("test")
    sae = trained.sae("lambda=0.1")
    steered = SteeredEncoder(trained.encoder, dataset, 1, sae)
    places = [Place(dataset.recordings[0], 0), Place(dataset.recordings[-1], 1)]
    scales = np.array([[0.0], [4.0], [1.0]])
    changes = measure_windows(steered, places, [FEATURE], scales, BANDS)
    (windows,) = steered.run(places, [FEATURE], scales)
    is_active = np.asarray(sae.encode(windows.hidden))[..., FEATURE] > 0
    assert changes.n_affected == is_active.sum() > 0
    assert changes.n_tokens == is_active.size
    difference = windows.last - windows.last[:, :1]
    patches = windows.patches
    # No CLS token here has a patch.
    has_patch = is_active[:, :, dataset.tokens.located]
    traces = patches.reshape(2, 4, 19, -1)
    for variant in range(4):
        for mask, value in ((is_active, changes.last), (~is_active, changes.last_elsewhere)):
            ratio = np.square(difference[:, variant][mask]).sum()
            ratio /= np.square(windows.last[:, 0][mask]).sum()
            assert value[variant] == pytest.approx(ratio**0.5, rel=1e-4)
        got = changes.reconstructions[variant]
        change = (patches[:, variant] - patches[:, 0])[has_patch]
        np.testing.assert_allclose(got.waveform, change.mean(0), atol=1e-6)
        squares = np.square(traces[:, variant] - traces[:, 0]).mean((0, 2))
        np.testing.assert_allclose(got.rms, np.sqrt(squares), rtol=1e-4)
        power = []
        for window, channel in np.argwhere(has_patch.any(-1)):
            hz, of_channel = welch(traces[window, variant, channel], 100, nperseg=200)
            power.append(of_channel)
        np.testing.assert_allclose(got.power, np.mean(power, axis=0), rtol=1e-3, atol=1e-9)
        np.testing.assert_array_equal(changes.hz, hz)
        untouched = changes.reconstructions[0].power
        for name, low, high in BANDS[:2]:
            inside = (hz >= low) & (hz < high)
            ratio = got.power[inside].sum() / untouched[inside].sum()
            assert got.band_ratio[name] == pytest.approx(ratio)
        assert list(got.band_ratio) == ["low", "high"]
    same = changes.reconstructions[3]
    assert not same.rms.any()
    assert not same.waveform.any()
    assert set(same.band_ratio.values()) == {1.0}
    correlations = []
    for window, channel in np.argwhere(has_patch.any(-1)):
        eeg = steered.read_window(places[window])[:, channel]
        correlations.append(np.corrcoef(eeg, traces[window, 0, channel])[0, 1])
    assert changes.r == pytest.approx(np.mean(correlations), abs=1e-4)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_windows_where_the_feature_is_inactive_count_in_the_rms_only(trained, order):
    dataset = trained.dataset("test")
    places = [Place(dataset.recordings[0], 0), Place(dataset.recordings[-1], 1)]
    sae = trained.sae("lambda=0.1")
    scales = np.array([[0.0]])
    steered = SteeredEncoder(trained.encoder, dataset, 1, sae)
    (windows,) = steered.run(places, [FEATURE], scales)
    largest = sae.encode_features(windows.hidden, [FEATURE]).max(axis=(1, 2, 3))
    places = [places[i] for i in np.argsort(-largest)]
    bias = np.array(sae.params["b_enc"])
    bias[FEATURE] -= largest.mean()
    sae.params |= {"b_enc": bias}
    steered = SteeredEncoder(trained.encoder, dataset, 1, sae)
    expected = measure_windows(steered, places[:1], [FEATURE], scales, BANDS)
    changes = measure_windows(steered, [places[i] for i in order], [FEATURE], scales, BANDS)
    assert changes.n_affected == expected.n_affected > 0
    np.testing.assert_array_equal(changes.hz, expected.hz)
    assert changes.r == pytest.approx(expected.r)
    for got, one in zip(changes.reconstructions, expected.reconstructions, strict=True):
        np.testing.assert_allclose(got.waveform, one.waveform)
        np.testing.assert_allclose(got.power, one.power)
        assert got.band_ratio == pytest.approx(one.band_ratio)
        np.testing.assert_allclose(got.rms, one.rms / np.sqrt(2))


def test_examples_are_around_the_strongest_tokens(trained):
    dataset = trained.dataset("test")
    sae = trained.sae("lambda=0.1")
    steered = SteeredEncoder(trained.encoder, dataset, 2, sae)
    places = [Place(dataset.recordings[-1], 0), Place(dataset.recordings[-1], 1)]
    changes = measure_windows(steered, places, [FEATURE], np.array([[2.0]]), BANDS)
    (windows,) = steered.run(places, [FEATURE], np.array([[2.0]]))
    strength = np.asarray(sae.encode(windows.hidden))[..., dataset.tokens.located, FEATURE]
    strongest = [np.unravel_index(s.argmax(), s.shape) for s in strength]
    order = np.argsort([-s.max() for s in strength])
    for example, window in zip(changes.examples, order, strict=True):
        channel, patch = strongest[window]
        assert example.place == places[window]
        assert example.channel == channel
        assert example.first <= dataset.tokens.first[dataset.tokens.located[patch]]
        samples = slice(example.first, example.first + 200)
        eeg = steered.read_window(places[window])[samples, channel]
        np.testing.assert_array_equal(example.eeg, eeg)
        traces = windows.patches[window].reshape(2, 19, -1)[:, channel, samples]
        np.testing.assert_allclose(example.traces, traces)
