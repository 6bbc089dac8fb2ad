"""Changes of the head's reconstruction and of the last layer over some windows.

Nothing in the windows is masked, whereas the head was trained on masked patches: its reconstruction
resembles the EEG, and `WindowChanges.r` measures how closely. A token is affected if one of the
steered features is active on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.signal import welch

from minsae_jax.evaluation.config import Band
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.evaluation.steering.edit import Place, SteeredEncoder

SPECTRUM_SECONDS = 2.0  # segments of Welch's method
EXAMPLE_SECONDS = 2.0
N_EXAMPLES = 3
TINY = 1e-20  # below any norm or power, to divide by


@dataclass(frozen=True)
class Reconstruction:
    """The head's reconstruction at one scale; amplitudes in the unit of the encoder's input."""

    # Change of a patch, mean over affected tokens
    waveform: Float[np.ndarray, " patch_len"]
    # Power spectral density, mean over the affected channels of each window
    power: Float[np.ndarray, " n_hz"]
    # Power in each band over that of the untouched reconstruction
    band_ratio: dict[str, float]
    # Root mean square over time and windows of the change on each channel
    rms: Float[np.ndarray, " n_vars"]


@dataclass(frozen=True)
class ExampleTrace:
    """A stretch of a channel around an affected token."""

    place: Place
    channel: int
    # First sample in the window
    first: int
    eeg: Float[np.ndarray, " samples"]
    # Reconstructed: scale 1, then each scale
    traces: Float[np.ndarray, "variants samples"]


@dataclass(frozen=True)
class WindowChanges:
    """Changes over all windows; the first variant is scale 1."""

    n_tokens: int
    n_affected: int
    # ‖change‖ / ‖activation‖ of the last layer, over affected tokens and over the others
    last: Float[np.ndarray, " variants"]
    last_elsewhere: Float[np.ndarray, " variants"]
    # Empty without a head that reconstructs
    reconstructions: tuple[Reconstruction, ...]
    hz: Float[np.ndarray, " n_hz"]
    # Correlation of the untouched reconstruction with the EEG, mean over affected channels
    r: float
    # Around the largest activations, each of another window
    examples: tuple[ExampleTrace, ...]


class _LayerSums(NamedTuple):
    """Sums of one window; of a pair the first is over affected tokens, the second over others."""

    n_tokens: int
    n_affected: int
    squares: Float[np.ndarray, " 2"]
    change_squares: Float[np.ndarray, "2 variants"]


class _OutputSums(NamedTuple):
    """Sums of one window over its affected patches, or over its affected channels."""

    n_windows: int
    n_patches: int
    waveform: Float[np.ndarray, "variants patch_len"]
    n_channels: int
    power: Float[np.ndarray, "variants n_hz"]
    correlation: float
    # Over all channels: mean over time of (change)²
    mean_squares: Float[np.ndarray, "variants n_vars"]


def measure_windows(
    steered: SteeredEncoder,
    places: Sequence[Place],
    features: Sequence[int],
    scales: Float[np.ndarray, "variants features"],
    bands: Sequence[Band],
) -> WindowChanges:
    """Run some windows at scale 1 and with all scales, and measure the changes."""
    dataset = steered.dataset
    layers = []
    outputs = []
    examples: list[tuple[float, ExampleTrace]] = []
    hz = np.zeros(0)
    for windows in steered.run(places, features, scales):
        strength = steered.strength(windows.hidden, features)
        for i, of_window in enumerate(strength):
            layers.append(_layer_sums(of_window, windows.last[i]))
            if windows.patches is None:
                continue
            place = places[windows.start + i]
            eeg = steered.read_window(place)
            patches = windows.patches[i]
            traces = assemble(dataset, patches)
            is_affected = of_window[:, dataset.tokens.located] > 0
            hz, sums = _output_sums(dataset, is_affected, patches, traces, eeg)
            outputs.append(sums)
            example = _cut_example(dataset, place, of_window, traces, eeg)
            examples.append(example)
    layer = _LayerSums(*_total(layers))
    squares = np.maximum(layer.squares, TINY)
    last = np.sqrt(layer.change_squares / squares[:, None])
    reconstructions: tuple[Reconstruction, ...] = ()
    r = 0.0
    if outputs:
        output = _OutputSums(*_total(outputs))
        reconstructions = _reconstructions(output, hz, bands)
        r = output.correlation / max(output.n_channels, 1)
    examples.sort(key=lambda example: -example[0])
    return WindowChanges(
        n_tokens=layer.n_tokens,
        n_affected=layer.n_affected,
        last=last[0],
        last_elsewhere=last[1],
        reconstructions=reconstructions,
        hz=hz,
        r=r,
        examples=tuple(trace for _, trace in examples[:N_EXAMPLES]),
    )


def _total(windows: Sequence[tuple]) -> list[Any]:
    """Return the sum of each field over windows."""
    return [sum(values) for values in zip(*windows, strict=True)]


def _layer_sums(
    strength: Float[np.ndarray, "sequences n_tokens"],
    last: Float[np.ndarray, "variants sequences n_tokens d_model"],
) -> _LayerSums:
    is_affected = strength > 0
    groups = np.stack([is_affected, ~is_affected])
    groups = groups.astype(np.float64)
    untouched = last[0].astype(np.float64)
    squares = np.square(untouched).sum(-1)
    changes = last.astype(np.float64) - untouched
    change_squares = np.square(changes).sum(-1)
    return _LayerSums(
        n_tokens=strength.size,
        n_affected=int(is_affected.sum()),
        squares=np.einsum("gst,st->g", groups, squares),
        change_squares=np.einsum("gst,vst->gv", groups, change_squares),
    )


def token_channels(dataset: Dataset, n_sequences: int) -> Int[np.ndarray, "sequences n_located"]:
    """Return the channel of each token with samples of a window: its own, or its sequence's."""
    channel = dataset.tokens.channel[dataset.tokens.located]
    sequence = np.arange(n_sequences)
    return np.where(channel >= 0, channel, sequence[:, None])


def assemble(
    dataset: Dataset, patches: Float[np.ndarray, "variants sequences n_located patch_len"]
) -> Float[np.ndarray, "variants n_vars seq_len"]:
    """Return the traces that the patches of a window make; overlapping patches are averaged.

    Samples without a patch are 0.
    """
    n_variants, n_sequences, _, patch_len = patches.shape
    channel = token_channels(dataset, n_sequences)[:, :, None]
    first = dataset.tokens.first[dataset.tokens.located]
    sample = first[None, :, None] + np.arange(patch_len)
    # The last patch of a window may end after it.
    n_samples = dataset.seq_len + patch_len
    count = np.zeros((dataset.n_vars, n_samples))
    np.add.at(count, (channel, sample), 1)
    traces = np.zeros((n_variants, dataset.n_vars, n_samples))
    for trace, of_variant in zip(traces, patches, strict=True):
        np.add.at(trace, (channel, sample), of_variant)
    traces /= np.maximum(count, 1)
    return traces[:, :, : dataset.seq_len]


def _output_sums(
    dataset: Dataset,
    is_affected: Bool[np.ndarray, "sequences n_located"],
    patches: Float[np.ndarray, "variants sequences n_located patch_len"],
    traces: Float[np.ndarray, "variants n_vars seq_len"],
    eeg: Float[np.ndarray, "seq_len n_vars"],
) -> tuple[Float[np.ndarray, " n_hz"], _OutputSums]:
    """Return frequencies in Hz, and the sums of one window."""
    affected = patches[:, is_affected].astype(np.float64)
    changes = affected - affected[:1]
    channel_of_token = token_channels(dataset, len(is_affected))
    channels = np.unique(channel_of_token[is_affected])
    n_segment = min(dataset.seq_len, round(SPECTRUM_SECONDS * dataset.sampling_rate))
    # Of all channels, since welch returns other shapes if no channel is affected.
    hz, power = welch(traces, dataset.sampling_rate, nperseg=n_segment)
    correlation = _correlation(traces[0], eeg.T)
    sums = _OutputSums(
        n_windows=1,
        n_patches=changes.shape[1],
        waveform=changes.sum(axis=1),
        n_channels=len(channels),
        power=power[:, channels].sum(axis=1),
        correlation=float(correlation[channels].sum()),
        mean_squares=np.square(traces - traces[:1]).mean(axis=2),
    )
    return hz, sums


def _correlation(
    x: Float[np.ndarray, "n_vars seq_len"], y: Float[np.ndarray, "n_vars seq_len"]
) -> Float[np.ndarray, " n_vars"]:
    """Return Pearson's correlation of each channel, 0 for a flat one."""
    centred_x = x - x.mean(axis=1, keepdims=True)
    centred_y = y - y.mean(axis=1, keepdims=True)
    products = (centred_x * centred_y).sum(axis=1)
    norm_x = np.linalg.norm(centred_x, axis=1)
    norm_y = np.linalg.norm(centred_y, axis=1)
    return products / np.maximum(norm_x * norm_y, TINY)


def _cut_example(
    dataset: Dataset,
    place: Place,
    strength: Float[np.ndarray, "sequences n_tokens"],
    traces: Float[np.ndarray, "variants n_vars seq_len"],
    eeg: Float[np.ndarray, "seq_len n_vars"],
) -> tuple[float, ExampleTrace]:
    """Return the strength of the strongest token of a window, and the traces around it."""
    tokens = dataset.tokens
    of_located = strength[:, tokens.located]
    strongest = np.unravel_index(of_located.argmax(), of_located.shape)
    channels = token_channels(dataset, len(strength))
    channel = int(channels[strongest])
    token = tokens.located[strongest[1]]
    centre = int(tokens.first[token] + tokens.last[token]) // 2
    span = min(dataset.seq_len, round(EXAMPLE_SECONDS * dataset.sampling_rate))
    last_first = dataset.seq_len - span
    first = min(max(0, centre - span // 2), last_first)
    samples = slice(first, first + span)
    example = ExampleTrace(
        place=place,
        channel=channel,
        first=first,
        eeg=eeg[samples, channel],
        traces=traces[:, channel, samples],
    )
    return float(of_located[strongest]), example


def _reconstructions(
    sums: _OutputSums, hz: Float[np.ndarray, " n_hz"], bands: Sequence[Band]
) -> tuple[Reconstruction, ...]:
    """Return the means of each variant."""
    waveforms = sums.waveform / max(sums.n_patches, 1)
    powers = sums.power / max(sums.n_channels, 1)
    rms = np.sqrt(sums.mean_squares / sums.n_windows)
    reconstructions = []
    for waveform, power, of_channels in zip(waveforms, powers, rms, strict=True):
        ratios = {}
        for band in bands:
            is_inside = band.contains(hz)
            if is_inside.any():
                untouched = powers[0, is_inside].sum()
                in_band = power[is_inside].sum()
                ratios[band.name] = float(in_band / max(untouched, TINY))
        reconstructions.append(Reconstruction(waveform, power, ratios, of_channels))
    return tuple(reconstructions)
