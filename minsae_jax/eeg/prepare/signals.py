"""Filters, resampling, quality checks and the final unit of one recording, in little memory.

Interpolation and reference are products with a matrix over channels, and filters and resampling are
linear and act on each channel alone, so that their order does not matter. The matrix comes last,
where there are the fewest samples. A recording is in memory once, as float64; everything happens in
that array, and the result is written block by block.
"""

from dataclasses import dataclass
from pathlib import Path

import mne
import numpy as np
from jaxtyping import Float

from minsae_jax.eeg.description import UV_PER_UNIT, Unit
from minsae_jax.eeg.prepare.errors import BadRecordingError

FLAT_UV = 0.1  # SD below which the TUH corpus's preprocessing treats a channel as flat
CLIPPED_SHARE = 1e-3  # of the samples, next to an equal sample at the limit of the channel
WEAKEST_UV = 0.01  # median SD of the channels; EEG has 5 to 100
STRONGEST_UV = 10_000.0  # likewise, and SD of each channel
BLOCK = 10_000  # samples
FILTERED_SAMPLES = 1_000_000  # of all channels that are filtered at a time


@dataclass(frozen=True)
class Quality:
    """Checks of one channel as read."""

    is_flat: bool
    is_too_strong: bool
    is_clipped: bool


@dataclass(frozen=True)
class Filters:
    """Filters and resampling of each channel; None and () for none."""

    sampling_rate: float  # Hz, of the result
    l_freq: float | None
    h_freq: float | None
    notch: tuple[float, ...]


def check_quality(data: Float[np.ndarray, "channels samples"]) -> list[Quality]:
    """Check the channels, in µV. Raises BadRecordingError on NaN and on a wrong unit."""
    sds = []
    channels = []
    for samples in data:
        sd = float(samples.std())
        # The SD is not finite either if any sample is not.
        if not np.isfinite(sd):
            raise BadRecordingError("contains NaN or infinity")
        # Rounding of the mean can leave a constant channel an SD.
        if sd < FLAT_UV and np.ptp(samples) == 0:
            sd = 0.0
        is_clipped = sd > 0 and _clipped_share(samples) > CLIPPED_SHARE
        sds.append(sd)
        channels.append(Quality(sd < FLAT_UV, sd > STRONGEST_UV, is_clipped))
    varying = [sd for sd in sds if sd > 0]
    median = float(np.median(varying)) if varying else 0.0
    if median > STRONGEST_UV or 0 < median < WEAKEST_UV:
        raise BadRecordingError(
            f"has a median SD of {median:.3g} µV, so its unit is probably wrong; correct it with "
            "--scale (1e-6 if µV were read as V, 1e6 if V were read as µV)"
        )
    return channels


def _clipped_share(samples: Float[np.ndarray, " samples"]) -> float:
    """Return the share of samples at the highest or lowest value that follow an equal one."""
    count = 0
    for limit in (samples.min(), samples.max()):
        at_limit = samples == limit
        count += int(np.count_nonzero(at_limit[1:] & at_limit[:-1]))
    return count / len(samples)


def apply_filters(
    data: Float[np.ndarray, "channels samples"], sampling_rate: float, filters: Filters
) -> Float[np.ndarray, "channels resampled"]:
    """Filter and resample as MNE's Raw does, and return the result, which overwrites `data`."""
    result = data
    n_samples = 0
    # MNE's functions copy all the channels that they are given, so a long recording is given in
    # parts. Every call designs the filters anew, which takes longer than filtering a short one.
    size = max(FILTERED_SAMPLES // data.shape[1], 1)
    for start in range(0, len(data), size):
        channels = slice(start, start + size)
        part = _filtered(data[channels], sampling_rate, filters)
        n_samples = part.shape[1]
        if n_samples > result.shape[1]:
            result = np.empty((len(data), n_samples))
        result[channels, :n_samples] = part
    return result[:, :n_samples]


def _filtered(
    samples: Float[np.ndarray, "channels samples"], sampling_rate: float, filters: Filters
) -> Float[np.ndarray, "channels resampled"]:
    if filters.l_freq or filters.h_freq:
        samples = mne.filter.filter_data(
            samples, sampling_rate, filters.l_freq, filters.h_freq, copy=False, verbose="ERROR"
        )
    if filters.notch:
        freqs = np.array(filters.notch)
        samples = mne.filter.notch_filter(
            samples, sampling_rate, freqs, copy=False, verbose="ERROR"
        )
    if filters.sampling_rate != sampling_rate:
        samples = mne.filter.resample(
            samples, filters.sampling_rate, sampling_rate, npad="auto", verbose="ERROR"
        )
    return samples


@dataclass(frozen=True)
class Statistics:
    """Mean and population SD of each channel over the recording, in µV."""

    mean: Float[np.ndarray, " channels"]
    sd: Float[np.ndarray, " channels"]


def measure(
    data: Float[np.ndarray, "sources samples"], matrix: Float[np.ndarray, "channels sources"]
) -> Statistics:
    """Return the statistics of matrix · data."""
    n_samples = data.shape[1]
    total = np.zeros(len(matrix))
    squares = np.zeros(len(matrix))
    # Relative to a value near the mean, so that a large offset does not cost precision.
    blocks = _blocks(data)
    shift = (matrix @ blocks[0]).mean(axis=1)
    for block in blocks:
        deviations = matrix @ block
        deviations -= shift[:, None]
        total += deviations.sum(axis=1)
        squares += np.einsum("ct,ct->c", deviations, deviations)
    mean = total / n_samples
    variance = np.maximum(squares / n_samples - mean**2, 0)
    return Statistics(mean + shift, np.sqrt(variance))


def write_recording(
    path: Path,
    data: Float[np.ndarray, "sources samples"],
    matrix: Float[np.ndarray, "channels sources"],
    statistics: Statistics,
    unit: Unit,
) -> None:
    """Write matrix · data in its unit as .npy, float32 [samples, channels]."""
    if unit == "SD":
        offset = statistics.mean
        # A channel that does not vary, as the reference does, is not divided.
        divisor = np.where(statistics.sd > 0, statistics.sd, 1.0)
    else:
        offset = np.zeros(len(matrix))
        divisor = np.full(len(matrix), UV_PER_UNIT[unit])
    header = {"descr": "<f4", "fortran_order": False, "shape": (data.shape[1], len(matrix))}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in _blocks(data):
            values = matrix @ block
            values -= offset[:, None]
            values /= divisor[:, None]
            file.write(np.ascontiguousarray(values.T, "<f4").tobytes())


def _blocks(data: Float[np.ndarray, "sources samples"]) -> list[np.ndarray]:
    """Return views of consecutive samples."""
    n_samples = data.shape[1]
    return [data[:, start : start + BLOCK] for start in range(0, n_samples, BLOCK)]
