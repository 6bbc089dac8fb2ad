"""The EEG around tokens."""

from dataclasses import replace

import numpy as np
import pytest

from minsae_jax.report.excerpts import montage_eeg

FAST = 40  # Hz, above half of the montage's 50 Hz
SLOW = 10


@pytest.fixture
def waves(trained, tmp_path):
    """A data set whose first recording is a fast wave on one channel and a slow one on others."""
    dataset = trained.dataset("test")
    seconds = np.arange(3000) / 100
    eeg = np.tile(np.sin(2 * np.pi * SLOW * seconds), (19, 1)).T
    eeg[:, 0] = np.sin(2 * np.pi * FAST * seconds)
    np.save(tmp_path / dataset.recordings[0], eeg.astype(np.float32))
    return replace(dataset, folder=tmp_path)


@pytest.mark.parametrize(("begin", "stop"), [(1001, 1212), (1000, 1211), (1500, 1700)])
def test_montage_has_no_activity_that_is_too_fast_for_its_rate(waves, begin, stop):
    eeg = montage_eeg(waves, 0, begin, stop)
    seconds = np.arange(begin, stop, 2) / 100
    assert eeg.shape == (len(seconds), 19)
    # Every second sample of the fast wave would be one of 10 Hz.
    assert np.abs(eeg[:, 0]).max() < 0.01
    expected = np.sin(2 * np.pi * SLOW * seconds)
    np.testing.assert_allclose(eeg[:, 5], expected, atol=0.02)


@pytest.mark.parametrize(("begin", "stop"), [(0, 211), (1, 212), (2789, 3000)])
def test_montage_at_the_ends_of_a_recording(waves, begin, stop):
    eeg = montage_eeg(waves, 0, begin, stop)
    seconds = np.arange(begin, stop, 2) / 100
    assert eeg.shape == (len(seconds), 19)
    inside = slice(10, -10)
    assert np.abs(eeg[inside, 0]).max() < 0.01
    np.testing.assert_allclose(
        eeg[inside, 5], np.sin(2 * np.pi * SLOW * seconds[inside]), atol=0.02
    )
    assert np.abs(eeg).max() < 1.5


def test_recordings_of_a_low_rate_are_shown_as_they_are(waves):
    described = replace(waves, description=replace(waves.description, sampling_rate=64.0))
    eeg = montage_eeg(described, 0, 100, 200)
    np.testing.assert_array_equal(eeg, described.eeg_between(0, 100, 200))
