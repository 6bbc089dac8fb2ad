"""Spectra of the EEG around a feature's tokens, compared with any EEG, and artefact hints."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.signal import periodogram

from minsae_jax.evaluation.config import Band
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.report.activations import count_up
from minsae_jax.report.examples import Tokens

MIN_HZ = 0.9
MAX_HZ = 45.0  # unless a band reaches higher
NYQUIST_SHARE = 0.45  # of the sampling rate: no spectrum reaches higher
# Around patches that are shorter than PATCH_SECONDS; the demo's w patches of 0.1 s to either side
SPAN_SECONDS = 2.1
PATCH_SECONDS = 1.0  # enough to tell the bands apart: a resolution of 2 Hz with the Hann window
BASE_SEGMENTS = 300  # per channel, for the base rate
MIN_EXAMPLES = 4  # for a spectrum
BOOTSTRAP_SAMPLES = 200
BOOTSTRAP_PARTS = 10
BROADBAND_RATIO = 1.15  # below it no band is dominant
# Artefact hints
LARGE_SD = 5.0  # amplitude
FLAT_SD = 0.05  # standard deviation
# Scalp EEG has little power above this frequency; muscles have much.
FAST_HZ = 25.0
FAST_SHARE = 0.3  # of the power from 1 to 45 Hz
HINTS = (f"beyond {LARGE_SD:g} SD", "flat", f"over {FAST_HZ:g} Hz")


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
    # Highest frequency shown
    max_hz: float
    hz: Float[np.ndarray, " n_hz"]
    power: Float[np.ndarray, "n_vars n_hz"]
    # Variance of each channel within random tokens; None if tokens are of single channels
    variance: Float[np.ndarray, " n_vars"] | None


def measure_base_spectra(dataset: Dataset, w: int, seed: int, bands: Sequence[Band]) -> BaseSpectra:
    """Return each channel's base rate, over segments as long as those around a feature's tokens.

    Frequencies reach to 45 Hz, or to the highest of the bands, if the sampling rate allows it.
    """
    rng = np.random.default_rng(seed)
    span = segment_samples(dataset, w)
    highest = max([MAX_HZ, *(band.high for band in bands)])
    max_hz = min(highest, NYQUIST_SHARE * dataset.sampling_rate)
    all_hz = np.fft.rfftfreq(span, 1 / dataset.sampling_rate)
    hz = all_hz[_is_shown(all_hz, max_hz)]
    base = np.zeros((dataset.n_vars, len(hz)))
    for channel in range(dataset.n_vars):
        candidates = np.flatnonzero((dataset.channel == channel) | (dataset.channel == -1))
        if not len(candidates):
            continue
        sequences, tokens = _draw_tokens(dataset, candidates, rng)
        channels = np.full(len(sequences), channel)
        segments = cut_segments(dataset, sequences, tokens, channels, span)
        power = relative_power(segments, dataset.sampling_rate, max_hz)
        base[channel] = power.mean(axis=0)
    variance = None
    if not dataset.has_channels:
        drawn = _draw_tokens(dataset, np.arange(len(dataset.recording)), rng)
        variance = _token_variances(dataset, *drawn).mean(axis=0)
    return BaseSpectra(
        span=span,
        max_hz=max_hz,
        hz=hz,
        power=base.astype(np.float32),
        variance=variance,
    )


def segment_samples(dataset: Dataset, w: int) -> int:
    """Return the number of samples around a token that its spectrum and hints are computed from.

    A patch of 1 s or more is taken alone, since its neighbours may show other rhythms. Shorter ones
    have `w` patches to either side, up to 2.1 s in all.
    """
    grid = dataset.tokens
    if grid.longest >= PATCH_SECONDS * dataset.sampling_rate:
        return min(dataset.seq_len, grid.longest)
    longest_span = max(grid.longest, round(SPAN_SECONDS * dataset.sampling_rate))
    return min(dataset.seq_len, 2 * w * grid.mean_step + grid.longest, longest_span)


def _draw_tokens(
    dataset: Dataset, candidates: Int[np.ndarray, " n"], rng: np.random.Generator
) -> tuple[Int[np.ndarray, " n_drawn"], Int[np.ndarray, " n_drawn"]]:
    """Return a random token of each of up to BASE_SEGMENTS of the candidate sequences."""
    count = min(BASE_SEGMENTS, len(candidates))
    sequences = np.sort(rng.choice(candidates, count, replace=False))
    located = dataset.tokens.located
    return sequences, located[rng.integers(0, len(located), count)]


def _is_shown(hz: Float[np.ndarray, " all_hz"], max_hz: float) -> Bool[np.ndarray, " all_hz"]:
    return (hz >= MIN_HZ) & (hz <= max_hz)


def cut_segments(
    dataset: Dataset,
    sequences: Int[np.ndarray, " n"],
    tokens: Int[np.ndarray, " n"],
    channels: Int[np.ndarray, " n"],
    span: int,
) -> Float[np.ndarray, "n span"]:
    """Return `span` samples of EEG in SD, centred on each token, on one channel each.

    Segments stay inside the token's window. A CLS token counts as the first patch.
    """
    grid = dataset.tokens
    first_located = int(grid.located[0])
    segments = []
    for sequence, token, channel in zip(
        sequences.tolist(), tokens.tolist(), channels.tolist(), strict=True
    ):
        place = token if grid.first[token] >= 0 else first_located
        first = int(grid.first[place])
        length = int(grid.last[place]) + 1 - first
        centre = first + length // 2
        begin = min(max(0, centre - span // 2), dataset.seq_len - span)
        eeg = dataset.eeg_of(sequence)
        segments.append(eeg[begin : begin + span, channel])
    return np.stack(segments).astype(np.float32)


def relative_power(
    segments: Float[np.ndarray, "n span"],
    sampling_rate: float,
    max_hz: float,
) -> Float[np.ndarray, "n n_hz"]:
    """Return Hann-windowed periodograms, each divided by its sum over the frequencies shown.

    sampling_rate, max_hz: in Hz.
    """
    n_samples = segments.shape[1]
    centred = segments - segments.mean(axis=1, keepdims=True)
    # In float64, and with a symmetric window where scipy's own is periodic.
    window = np.hanning(n_samples)
    centred = centred.astype(np.float64)
    hz, power = periodogram(centred, sampling_rate, window, detrend=False)
    power = power[:, _is_shown(hz, max_hz)]
    return power / np.maximum(power.sum(axis=1, keepdims=True), 1e-20)


@dataclass(frozen=True)
class SampleSpectra:
    """The EEG around a random sample of a feature's tokens."""

    spectrum: Spectrum
    # Relative power around each example over that of the same channels anywhere
    ratios: Float[np.ndarray, "examples n_hz"]
    # The ratio of the spectrum in each bootstrap sample of the examples
    resampled: Float[np.ndarray, "samples n_hz"]
    # Share of the examples with each artefact hint, on the channel that is shown
    artefacts: dict[str, float]


def measure_spectrum(
    dataset: Dataset,
    base: BaseSpectra,
    examples: Tokens,
    feature: int,
    seed: int,
    top_channel: int,
) -> SampleSpectra | None:
    """Return the spectra of a feature's examples, or None with under MIN_EXAMPLES examples.

    examples: a random sample of each feature's tokens. Power and base rate are means over the
    feature's examples, weighted by their activations; that of a token over all channels is the mean
    over them. top_channel: shown where a token is over all channels, for the artefact hints.
    """
    is_example = examples.token[feature] >= 0
    n_examples = int(is_example.sum())
    if n_examples < MIN_EXAMPLES:
        return None
    sequences = examples.sequence[feature, is_example]
    tokens = examples.token[feature, is_example]
    weights = examples.activation[feature, is_example]
    # A row for each channel of each example.
    row, channels = _rows_by_channel(dataset, sequences, tokens)
    segments = cut_segments(dataset, sequences[row], tokens[row], channels, base.span)
    power = relative_power(segments, dataset.sampling_rate, base.max_hz)
    power = _mean_of_rows(power, row)
    base_power = _mean_of_rows(base.power[channels], row)
    ratio = (weights @ power) / np.maximum(weights @ base_power, 1e-12)
    # A bootstrap sample draws examples with replacement: only how often each is drawn matters.
    rng = np.random.default_rng([seed, feature])
    uniform = np.full(n_examples, 1 / n_examples)
    drawn = rng.multinomial(n_examples, uniform, BOOTSTRAP_SAMPLES) * weights
    # In parts so small that BLAS does not start threads, which cost many times as much.
    parts = drawn.reshape(BOOTSTRAP_PARTS, -1, n_examples)
    ratios = (parts @ power) / np.maximum(parts @ base_power, 1e-12)
    ratios = ratios.reshape(BOOTSTRAP_SAMPLES, -1)
    low, high = np.quantile(ratios, [0.025, 0.975], axis=0)
    is_of_all = dataset.channels_of(sequences, tokens)[row] < 0
    is_shown = ~is_of_all | (channels == top_channel)
    hints = artefact_hints(segments[is_shown], dataset.sampling_rate)
    return SampleSpectra(
        spectrum=Spectrum(base.hz, ratio, low, high),
        ratios=power / np.maximum(base_power, 1e-12),
        resampled=ratios,
        artefacts={hint: float(is_present.mean()) for hint, is_present in hints.items()},
    )


def _rows_by_channel(
    dataset: Dataset, sequences: Int[np.ndarray, " n"], tokens: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """Return (index of the token, channel) of a row for each channel of each token."""
    channels = dataset.channels_of(sequences, tokens)
    n_rows = np.where(channels < 0, dataset.n_vars, 1)
    row = np.repeat(np.arange(len(tokens)), n_rows)
    # A token over all channels has a row for channel 0, 1, and so on.
    return row, np.where(channels[row] < 0, count_up(n_rows), channels[row])


def _mean_of_rows(
    values: Float[np.ndarray, "rows n_hz"], row: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, "n n_hz"]:
    """Return the mean over the rows of each token."""
    n_rows = np.bincount(row)
    if len(n_rows) == len(row):
        return values
    starts = np.cumsum(n_rows) - n_rows
    return np.add.reduceat(values, starts, axis=0) / n_rows[:, None]


def channel_power_ratio(
    dataset: Dataset, base: BaseSpectra, examples: Tokens, feature: int
) -> Float[np.ndarray, " n_vars"]:
    """Return each channel's variance within a feature's tokens over that within any tokens.

    Mean over random examples, weighted by their activations; 0 with under MIN_EXAMPLES examples.
    For tokens over all channels, whose activations do not say which channel they depend on.
    """
    assert base.variance is not None
    is_example = examples.token[feature] >= 0
    is_example &= dataset.tokens.first[examples.token[feature]] >= 0
    if is_example.sum() < MIN_EXAMPLES:
        return np.zeros(dataset.n_vars)
    sequences = examples.sequence[feature, is_example]
    weights = examples.activation[feature, is_example].astype(np.float64)
    variances = _token_variances(dataset, sequences, examples.token[feature, is_example])
    return weights @ variances / weights.sum() / np.maximum(base.variance, 1e-12)


def _token_variances(
    dataset: Dataset, sequences: Int[np.ndarray, " n"], tokens: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n n_vars"]:
    """Return the variance of every channel over the samples of each token, in SD²."""
    grid = dataset.tokens
    variances = []
    for sequence, token in zip(sequences.tolist(), tokens.tolist(), strict=True):
        samples = slice(grid.first[token], grid.last[token] + 1)
        eeg = dataset.eeg_of(sequence)[samples]
        variances.append(eeg.var(axis=0, dtype=np.float64))
    return np.stack(variances)


def artefact_hints(
    eeg: Float[np.ndarray, "*n time"], sampling_rate: float
) -> dict[str, Bool[np.ndarray, "*n"]]:
    """Return which simple signs of an artefact stretches of one channel show; eeg in SD."""
    centred = eeg - eeg.mean(axis=-1, keepdims=True)
    power = np.abs(np.fft.rfft(centred)) ** 2
    hz = np.fft.rfftfreq(eeg.shape[-1], 1 / sampling_rate)
    is_slow = (hz >= 1) & (hz < FAST_HZ)
    is_fast = (hz >= FAST_HZ) & (hz <= MAX_HZ)
    slow = power[..., is_slow].sum(axis=-1)
    fast = power[..., is_fast].sum(axis=-1)
    largest = np.abs(eeg).max(axis=-1)
    is_present = (
        largest > LARGE_SD,
        eeg.std(axis=-1) < FLAT_SD,
        fast > FAST_SHARE * (slow + fast),
    )
    return dict(zip(HINTS, map(np.asarray, is_present), strict=True))


def dominant_band(bands: Sequence[Band], spectra: SampleSpectra | None) -> str:
    """Return the band with the largest mean ratio, `broadband` if it is small, "" if unknown.

    Only bands are considered whose mean ratio is above 1 by its 95 % bootstrap interval, corrected
    for the number of bands (Bonferroni).
    """
    if spectra is None:
        return ""
    hz = spectra.spectrum.hz
    means = {}
    for band in bands:
        if not band.contains(hz).any():
            continue
        low = np.quantile(band_ratio(hz, spectra.resampled, band), 0.025 / len(bands))
        if low > 1:
            means[band.name] = float(band_ratio(hz, spectra.spectrum.ratio, band))
    if not means:
        return "broadband"
    best = max(means, key=means.__getitem__)
    return best if means[best] > BROADBAND_RATIO else "broadband"


def band_ratio(
    hz: Float[np.ndarray, " n_hz"], ratio: Float[np.ndarray, "*n n_hz"], band: Band
) -> Float[np.ndarray, "*n"]:
    """Return the mean ratio in a band."""
    return np.asarray(ratio[..., band.contains(hz)].mean(axis=-1))
