"""The EEG around single tokens of a feature, as the report shows it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int, Int8

from minsae_jax.activations.tokens import TokenGrid
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.report.spectra import artefact_hints
from minsae_jax.sae.member import SparseAutoencoder

TRACE_STEP = 0.1  # SD per unit of an int8 trace
MONTAGE_RATE = 50  # Hz, at least, of the traces of all channels
ALL_CHANNELS = "all channels"  # of a token over all of them


@dataclass(frozen=True)
class EventSpan:
    """A labelled event that overlaps the EEG shown."""

    kind: str
    # In the recording [s]
    start: float
    stop: float
    channels: list[str]


@dataclass(frozen=True)
class Example:
    """EEG around one token of a feature."""

    # "top", "random", or "q1" … "q10" for tenths of the activations
    group: str
    activation: float
    recording: str
    patient: str
    channel: str
    # Start of the trace in the recording [s]
    start: float
    # Start and end of the active patch [s]; None for a CLS token
    patch: tuple[float, float] | None
    # EEG of the token's channel, or of the feature's top channel, in units of TRACE_STEP SD
    trace: Int8[np.ndarray, " samples"]
    # EEG of all channels, every 2nd sample at 100 Hz
    others: Int8[np.ndarray, "channels fewer_samples"] | None
    # Largest activation of the feature at each start of tokens shown, and the first start [s]
    strip: Float[np.ndarray, " patches"]
    strip_start: float
    # Artefact hints
    hints: list[str]
    # Name of the trace's channel, if the token is over all channels
    trace_channel: str | None = None
    # µV in an SD of the trace's channel; None if unknown
    uv_per_sd: float | None = None
    events: list[EventSpan] = field(default_factory=list)
    # Other features active at the token, with their activations, largest first
    other_features: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class ChosenToken:
    """A token to be shown as an example; fields as in `Example`."""

    group: str
    sequence: int
    token: int
    activation: float
    # Whether all channels are shown
    has_montage: bool


def cut_examples(
    dataset: Dataset,
    sae: SparseAutoencoder,
    feature: int,
    chosen: Sequence[ChosenToken],
    w: int,
    top_channel: int,
) -> list[Example]:
    """Return the EEG around tokens, and the feature's activations there.

    w: patches shown before and after a token's patch. top_channel: shown where a token is over all
    channels.
    """
    if not chosen:
        return []
    grid = dataset.tokens
    stretches = [_stretch(grid, one.token, w) for one in chosen]
    activations = []
    for one, stretch in zip(chosen, stretches, strict=True):
        activations.append(dataset.read(one.sequence, one.sequence + 1)[0, stretch.tokens])
    values = sae.encode_features(np.concatenate(activations), [feature])[:, 0]
    ends = np.cumsum([len(x) for x in activations])
    examples = []
    for one, stretch, of_tokens in zip(chosen, stretches, np.split(values, ends[:-1]), strict=True):
        strip = np.zeros(stretch.last - stretch.first + 1, values.dtype)
        np.maximum.at(strip, grid.slot[stretch.tokens] - stretch.first, of_tokens)
        examples.append(_make_example(dataset, one, stretch, strip, top_channel))
    return examples


@dataclass(frozen=True)
class _Stretch:
    """What is shown around a token."""

    # First and last start of tokens, as indices into `TokenGrid.starts`
    first: int
    last: int
    # The tokens between, on the channel of the token in the middle
    tokens: Int[np.ndarray, " n_shown"]


def _stretch(grid: TokenGrid, token: int, w: int) -> _Stretch:
    slot = int(grid.slot[token])
    # A CLS token is shown with its whole window, a patch with w others to either side.
    first = 0
    last = len(grid.starts) - 1
    if slot >= 0:
        first = max(first, slot - w)
        last = min(last, slot + w)
    is_shown = (grid.slot >= first) & (grid.slot <= last)
    channel = grid.channel[token]
    if channel >= 0:
        is_shown &= grid.channel == channel
    return _Stretch(first, last, np.flatnonzero(is_shown))


def _make_example(
    dataset: Dataset,
    chosen: ChosenToken,
    stretch: _Stretch,
    strip: Float[np.ndarray, " starts"],
    top_channel: int,
) -> Example:
    grid = dataset.tokens
    recording = int(dataset.recording[chosen.sequence])
    sequence = np.array([chosen.sequence])
    channel = int(dataset.channels_of(sequence, np.array([chosen.token]))[0])
    trace_channel = channel if channel >= 0 else top_channel
    # Samples of the window that are shown, and of the recording before it.
    begin = int(grid.starts[stretch.first])
    end = min(int(grid.last[stretch.tokens].max()) + 1, dataset.seq_len)
    offset = int(dataset.window[chosen.sequence]) * dataset.seq_len
    eeg = np.asarray(dataset.eeg_of(chosen.sequence)[begin:end], np.float32)
    patch = None
    if grid.first[chosen.token] >= 0:
        patch_begin = offset + int(grid.first[chosen.token])
        patch_end = offset + int(grid.last[chosen.token]) + 1
        patch = (dataset.seconds(patch_begin), dataset.seconds(patch_end))
    hints = artefact_hints(eeg[:, trace_channel], dataset.sampling_rate)
    name = _channel_name(dataset, recording, trace_channel)
    uv_per_sd = dataset.uv_per_sd(recording)
    every = max(1, int(dataset.sampling_rate // MONTAGE_RATE))
    return Example(
        group=chosen.group,
        activation=chosen.activation,
        recording=dataset.recordings[recording],
        patient=dataset.patients[recording],
        channel=name if channel >= 0 else ALL_CHANNELS,
        trace_channel=name if channel < 0 else None,
        start=dataset.seconds(offset + begin),
        patch=patch,
        trace=to_int8(eeg[:, trace_channel]),
        uv_per_sd=None if uv_per_sd is None else float(uv_per_sd[trace_channel]),
        others=to_int8(eeg[::every].T) if chosen.has_montage else None,
        strip=strip if grid.step is not None else strip[:0],
        strip_start=dataset.seconds(offset + begin),
        hints=[name for name, is_present in hints.items() if is_present],
    )


def _channel_name(dataset: Dataset, recording: int, channel: int) -> str:
    """Return the channel's name, or its column if names are unknown or may be wrong."""
    names = dataset.channel_names
    if names is None or dataset.shifted[recording]:
        return f"column {channel + 1}"
    return names[channel]


def to_int8(eeg: Float[np.ndarray, "*n"]) -> Int8[np.ndarray, "*n"]:
    """Return EEG in SD as multiples of TRACE_STEP, clipped at 12.7 SD."""
    return np.clip(np.rint(eeg / TRACE_STEP), -127, 127).astype(np.int8)
