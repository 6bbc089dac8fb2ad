"""Spectra, dominant bands and artefact hints of known signals."""

import numpy as np

from minsae_jax.report.context import DEFAULT_BANDS
from minsae_jax.report.spectra import (
    SampleSpectra,
    Spectrum,
    artefact_hints,
    dominant_band,
    relative_power,
)

HZ = np.fft.rfftfreq(500, 0.01)
SHOWN = (HZ >= 0.9) & (HZ <= 45)


def rhythm(hz: float) -> np.ndarray:
    """20 segments of 5 s with a sine of random phase, in noise."""
    rng = np.random.default_rng(0)
    t = np.arange(500) / 100
    phase = rng.uniform(0, 6, size=(20, 1))
    return np.sin(2 * np.pi * hz * t + phase) + 0.1 * rng.normal(size=(20, 500))


def make_spectra(ratio: np.ndarray, resampled: np.ndarray | None = None) -> SampleSpectra:
    """Return a sample of one example, which is resampled without a change by default."""
    if resampled is None:
        resampled = ratio[None]
    return SampleSpectra(Spectrum(HZ[SHOWN], ratio, ratio, ratio), ratio[None], resampled, {})


def test_relative_power_matches_its_definition():
    segments = rhythm(10)
    centred = segments - segments.mean(1, keepdims=True)
    power = np.abs(np.fft.rfft(centred * np.hanning(500), axis=1))[:, SHOWN] ** 2
    expected = power / power.sum(1, keepdims=True)
    np.testing.assert_allclose(
        relative_power(segments, 100.0, 45.0), expected, rtol=1e-10, atol=1e-15
    )


def test_spectrum_of_a_rhythm_peaks_at_its_frequency():
    power = relative_power(rhythm(10), 100.0, 45.0)
    np.testing.assert_allclose(power.sum(1), 1)
    assert abs(HZ[SHOWN][power.mean(0).argmax()] - 10) < 0.3


def test_dominant_band():
    power = relative_power(rhythm(10), 100.0, 45.0).mean(0)
    assert dominant_band(DEFAULT_BANDS, make_spectra(power * SHOWN.sum())) == "alpha"
    assert dominant_band(DEFAULT_BANDS, make_spectra(np.ones(SHOWN.sum()))) == "broadband"
    assert dominant_band(DEFAULT_BANDS, None) == ""
    # The largest mean ratio, but by few examples only.
    ratio = np.where(HZ[SHOWN] > 25, 2.0, np.where(HZ[SHOWN] < 4, 1.5, 1.0))
    without = np.where(HZ[SHOWN] > 25, 0.8, ratio)
    uncertain = np.array([without] * 10 + [ratio] * 190)
    assert dominant_band(DEFAULT_BANDS, make_spectra(ratio)) == "gamma"
    assert dominant_band(DEFAULT_BANDS, make_spectra(ratio, uncertain)) == "delta"


def test_dominant_band_is_that_of_the_mean_over_frequencies():
    """Each frequency alone is uncertain where examples have peaks at different ones."""
    n_samples = 200
    is_alpha = (HZ[SHOWN] >= 8) & (HZ[SHOWN] < 13)
    resampled = np.full((n_samples, SHOWN.sum()), 0.9)
    place = np.flatnonzero(is_alpha)
    resampled[:, place] = 0.5
    for i in range(n_samples):
        resampled[i, place[i % 5 :: 5]] = 6.0
    assert (np.quantile(resampled, 0.025, axis=0)[is_alpha] < 1).all()
    assert dominant_band(DEFAULT_BANDS, make_spectra(resampled.mean(axis=0), resampled)) == "alpha"


def test_artefact_hints():
    rng = np.random.default_rng(0)
    slow = np.sin(2 * np.pi * 3 * np.arange(200) / 100)
    assert not any(artefact_hints(slow, 100.0).values())
    assert artefact_hints(slow + 6 * (np.arange(200) == 100), 100.0)["beyond 5 SD"]
    assert artefact_hints(np.zeros(200), 100.0)["flat"]
    assert artefact_hints(np.diff(rng.normal(size=201)), 100.0)["over 25 Hz"]
