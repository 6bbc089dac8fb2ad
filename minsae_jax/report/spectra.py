"""Spectra of the EEG around a feature's tokens, compared with any EEG, and artefact hints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.signal import periodogram

from minsae_jax.evaluation.config import Band
from minsae_jax.evaluation.dataset import SAMPLING_RATE, Dataset
from minsae_jax.report.examples import Tokens

MIN_HZ = 0.9
MAX_HZ = 45.0
BASE_SEGMENTS = 300  # per channel, for the base rate
MIN_EXAMPLES = 4  # for a spectrum
BOOTSTRAP_SAMPLES = 200
BROADBAND_RATIO = 1.15  # below it no band is dominant
# Artefact hints
LARGE_SD = 5.0  # amplitude
FLAT_SD = 0.05  # standard deviation
# Scalp EEG has little power above this frequency; muscles have much.
FAST_HZ = 25.0
FAST_SHARE = 0.3  # of the power from 1 to 45 Hz


@dataclass(frozen=True)
class Spectrum:
    """Relative power around a feature's tokens over that of the same channels anywhere."""

    hz: Float[np.ndarray, " n_hz"]
    ratio: Float[np.ndarray, " n_hz"]
    # 95 % bootstrap interval of the ratio over examples
    low: Float[np.ndarray, " n_hz"]
    high: Float[np.ndarray, " n_hz"]


@dataclass(frozen=True)
class BaseSpectra:
    """Relative power of each channel, mean over random segments of `span` samples."""

    span: int
    hz: Float[np.ndarray, " n_hz"]
    power: Float[np.ndarray, "n_vars n_hz"]


def measure_base_spectra(dataset: Dataset, w: int, seed: int) -> BaseSpectra:
    """Return each channel's base rate. A segment is a patch with `w` patches to either side."""
    a = dataset.architecture
    rng = np.random.default_rng(seed)
    span = min(a.seq_len, 2 * w * a.stride + a.patch_len)
    all_hz = np.fft.rfftfreq(span, 1 / SAMPLING_RATE)
    hz = all_hz[_is_shown(all_hz)]
    base = np.zeros((a.n_vars, len(hz)))
    for channel in range(a.n_vars):
        candidates = np.flatnonzero(dataset.channel == channel)
        count = min(BASE_SEGMENTS, len(candidates))
        sequences = np.sort(rng.choice(candidates, count, replace=False))
        tokens = rng.integers(int(a.use_cls_token), a.n_tokens, len(sequences))
        segments = cut_segments(dataset, sequences, tokens, span)
        base[channel] = relative_power(segments).mean(axis=0)
    return BaseSpectra(span, hz, base.astype(np.float32))


def _is_shown(hz: Float[np.ndarray, " all_hz"]) -> Bool[np.ndarray, " all_hz"]:
    return (hz >= MIN_HZ) & (hz <= MAX_HZ)


def cut_segments(
    dataset: Dataset,
    sequences: Int[np.ndarray, " n"],
    tokens: Int[np.ndarray, " n"],
    span: int,
) -> Float[np.ndarray, "n span"]:
    """Return `span` samples of EEG centred on each token's patch, on the token's channel.

    Segments stay inside the token's window. A CLS token counts as the first patch.
    """
    a = dataset.architecture
    segments = []
    for sequence, token in zip(sequences.tolist(), tokens.tolist(), strict=True):
        patch = max(0, token - int(a.use_cls_token))
        centre = a.first_sample + patch * a.stride + a.patch_len // 2
        begin = min(max(0, centre - span // 2), a.seq_len - span)
        eeg = window_eeg(dataset, sequence)
        channel = int(dataset.channel[sequence])
        segments.append(eeg[begin : begin + span, channel])
    return np.stack(segments).astype(np.float32)


def window_eeg(dataset: Dataset, sequence: int) -> Float[np.ndarray, "seq_len n_vars"]:
    """Return all channels of a sequence's window, in SD."""
    return dataset.window_of(int(dataset.recording[sequence]), int(dataset.window[sequence]))


def relative_power(segments: Float[np.ndarray, "n span"]) -> Float[np.ndarray, "n n_hz"]:
    """Return Hann-windowed periodograms, each divided by its sum over the frequencies shown."""
    n_samples = segments.shape[1]
    centred = segments - segments.mean(axis=1, keepdims=True)
    # In float64, and with a symmetric window where scipy's own is periodic.
    window = np.hanning(n_samples)
    centred = centred.astype(np.float64)
    hz, power = periodogram(centred, SAMPLING_RATE, window, detrend=False)
    power = power[:, _is_shown(hz)]
    return power / np.maximum(power.sum(axis=1, keepdims=True), 1e-20)


def measure_spectrum(
    dataset: Dataset, base: BaseSpectra, examples: Tokens, feature: int, seed: int
) -> tuple[Spectrum | None, dict[str, float]]:
    """Return the spectrum of a feature, and the share of its examples with each artefact hint.

    examples: a random sample of each feature's tokens. Power and base rate are means over the
    feature's examples, weighted by their activations. With under MIN_EXAMPLES examples there is no
    spectrum and there are no shares.
    """
    is_example = examples.token[feature] >= 0
    n_examples = int(is_example.sum())
    if n_examples < MIN_EXAMPLES:
        return None, {}
    sequences = examples.sequence[feature, is_example]
    tokens = examples.token[feature, is_example]
    weights = examples.activation[feature, is_example]
    segments = cut_segments(dataset, sequences, tokens, base.span)
    power = relative_power(segments)
    base_power = base.power[dataset.channel[sequences]]
    ratio = (weights @ power) / np.maximum(weights @ base_power, 1e-12)
    # A bootstrap sample draws examples with replacement: only how often each is drawn matters.
    rng = np.random.default_rng([seed, feature])
    uniform = np.full(n_examples, 1 / n_examples)
    drawn = rng.multinomial(n_examples, uniform, BOOTSTRAP_SAMPLES) * weights
    ratios = (drawn @ power) / np.maximum(drawn @ base_power, 1e-12)
    low, high = np.quantile(ratios, [0.025, 0.975], axis=0)
    return Spectrum(base.hz, ratio, low, high), _share_hints(segments)


def _share_hints(segments: Float[np.ndarray, "n span"]) -> dict[str, float]:
    hints = [artefact_hints(segment) for segment in segments]
    shares = {}
    for name in hints[0]:
        shares[name] = float(np.mean([hint[name] for hint in hints]))
    return shares


def artefact_hints(eeg: Float[np.ndarray, " time"]) -> Mapping[str, bool]:
    """Return which simple signs of an artefact a stretch of one channel shows; eeg in SD."""
    power = np.abs(np.fft.rfft(eeg - eeg.mean())) ** 2
    hz = np.fft.rfftfreq(len(eeg), 1 / SAMPLING_RATE)
    slow = power[(hz >= 1) & (hz < FAST_HZ)].sum()
    fast = power[(hz >= FAST_HZ) & (hz <= MAX_HZ)].sum()
    return {
        f"beyond {LARGE_SD:g} SD": bool(np.abs(eeg).max() > LARGE_SD),
        "flat": bool(eeg.std() < FLAT_SD),
        f"over {FAST_HZ:g} Hz": bool(fast > FAST_SHARE * (slow + fast)),
    }


def dominant_band(bands: Sequence[Band], spectrum: Spectrum | None) -> str:
    """Return the band with the largest mean ratio, `broadband` if it is small, "" if unknown."""
    if spectrum is None:
        return ""
    means = {}
    for band in bands:
        is_inside = (spectrum.hz >= band.low) & (spectrum.hz < band.high)
        if is_inside.any():
            means[band.name] = float(spectrum.ratio[is_inside].mean())
    if not means:
        return "broadband"
    best = max(means, key=means.__getitem__)
    return best if means[best] > BROADBAND_RATIO else "broadband"
