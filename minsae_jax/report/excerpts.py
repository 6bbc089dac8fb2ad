"""The EEG around single tokens of a feature, as the report shows it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int8
from scipy.signal import resample_poly

from minsae_jax.eeg.events import EVENTS
from minsae_jax.evaluation.dataset import Dataset, TokenPlaces
from minsae_jax.evaluation.events import LabelledEvent, read_events
from minsae_jax.report.activations import stretch_of
from minsae_jax.report.selection import shown_span
from minsae_jax.report.spectra import artefact_hints

TRACE_STEP = 0.1  # SD per unit of an int8 trace
SHOWN_SECONDS = 6.0  # of EEG in an example, by default and at most, unless patches are long
MONTAGE_RATE = 50  # Hz, at least, of the traces of all channels
FILTER_REACH = 10  # samples of a montage to either side, of the filter in `resample_poly`
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
    # Start of the trace in the recording [s]; it can reach beyond the token's window
    start: float
    # Start and end of the active patch [s]; None for a CLS token
    patch: tuple[float, float] | None
    # EEG of the token's channel, or of the feature's top channel, in units of TRACE_STEP SD
    trace: Int8[np.ndarray, " samples"]
    # EEG of all channels, see `montage_eeg`
    others: Int8[np.ndarray, "channels fewer_samples"] | None
    # Largest activation of the feature at each start of the window's tokens around the token, and
    # the first start [s]
    strip: Float[np.ndarray, " patches"]
    strip_start: float
    # Artefact hints
    hints: list[str]
    # Name of the trace's channel, if the token is over all channels
    trace_channel: str | None = None
    # µV in an SD of the trace's channel; None if unknown
    uv_per_sd: float | None = None
    # The same of every channel, if all are shown
    others_uv: Float[np.ndarray, " channels"] | None = None
    events: list[EventSpan] = field(default_factory=list)
    # Other features active at the token, with their activations, largest first
    other_features: list[tuple[int, float]] = field(default_factory=list)


EventsByRecording = Mapping[str, Sequence[tuple[str, LabelledEvent]]]


def read_events_by_recording(dataset: TokenPlaces) -> EventsByRecording:
    """Return kind and place of the events of each recording, by its file name.

    There are none without events.csv. Raises UserError if the file is invalid.
    """
    events: dict[str, list[tuple[str, LabelledEvent]]] = {}
    if (dataset.folder / EVENTS).exists():
        for kind, of_kind in read_events(dataset.folder).items():
            for event in of_kind:
                events.setdefault(event.recording, []).append((kind, event))
    return events


@dataclass(frozen=True)
class ChosenToken:
    """A token to be shown as an example; fields as in `Example`."""

    group: str
    sequence: int
    token: int
    activation: float
    # Whether all channels are shown
    has_montage: bool


def shown_samples(dataset: Dataset, w: int, context_seconds: float | None = None) -> int:
    """Return the samples of EEG shown around a patch.

    Those of `context_seconds`, or else of `w` patches to either side, up to 6 s or three patches.
    """
    if context_seconds is not None:
        return max(1, round(context_seconds * dataset.sampling_rate))
    grid = dataset.tokens
    # In a figure of an example, waves of 10 Hz cannot be seen in more.
    limit = max(3 * grid.longest, round(SHOWN_SECONDS * dataset.sampling_rate))
    return min(2 * w * grid.mean_step + grid.longest, limit)


def cut_example(
    dataset: Dataset,
    chosen: ChosenToken,
    around: Float[np.ndarray, " n_shown"],
    other_features: list[tuple[int, float]],
    events: EventsByRecording,
    w: int,
    n_samples: int,
    top_channel: int,
) -> Example:
    """Return the EEG around a token, and the feature's activations there.

    around, other_features: see `ExampleActivations`. w: patches to either side with activations.
    n_samples: of EEG, see `shown_span`. top_channel: shown where a token is over all channels.
    """
    grid = dataset.tokens
    stretch = stretch_of(grid, chosen.token, w)
    strip = np.zeros(stretch.last - stretch.first + 1, around.dtype)
    np.maximum.at(strip, grid.slot[stretch.tokens] - stretch.first, around)
    recording = int(dataset.recording[chosen.sequence])
    sequence = np.array([chosen.sequence])
    token = np.array([chosen.token])
    channel = int(dataset.channels_of(sequence, token)[0])
    trace_channel = channel if channel >= 0 else top_channel
    # Samples of the recording before the window.
    offset = int(dataset.window[chosen.sequence]) * dataset.seq_len
    spans = shown_span(dataset, recording, sequence, token, n_samples)
    begin, stop = (int(sample[0]) for sample in spans)
    eeg = np.asarray(dataset.eeg_between(recording, begin, stop), np.float32)
    patch = None
    if grid.first[chosen.token] >= 0:
        patch_begin = offset + int(grid.first[chosen.token])
        patch_end = patch_begin + int(dataset.lengths(token)[0])
        patch = (dataset.seconds(patch_begin), dataset.seconds(patch_end))
    hints = artefact_hints(eeg[:, trace_channel], dataset.sampling_rate)
    name = channel_name(dataset, recording, trace_channel)
    uv_per_sd = dataset.uv_per_sd(recording)
    others = None
    if chosen.has_montage:
        others = to_int8(montage_eeg(dataset, recording, begin, stop).T)
    return Example(
        group=chosen.group,
        activation=chosen.activation,
        recording=dataset.recordings[recording],
        patient=dataset.patients[recording],
        channel=name if channel >= 0 else ALL_CHANNELS,
        trace_channel=name if channel < 0 else None,
        start=dataset.seconds(begin),
        patch=patch,
        trace=to_int8(eeg[:, trace_channel]),
        uv_per_sd=None if uv_per_sd is None else float(uv_per_sd[trace_channel]),
        others=others,
        others_uv=uv_per_sd if chosen.has_montage else None,
        strip=strip if grid.step is not None else strip[:0],
        strip_start=dataset.seconds(offset + int(grid.starts[stretch.first])),
        hints=[name for name, is_present in hints.items() if is_present],
        events=events_between(dataset, recording, begin, stop, events),
        other_features=other_features,
    )


def events_between(
    dataset: TokenPlaces, recording: int, begin: int, stop: int, events: EventsByRecording
) -> list[EventSpan]:
    """Return the events that overlap samples begin:stop of a recording."""
    spans = []
    for kind, event in events.get(dataset.recordings[recording], ()):
        if event.start < stop and event.stop > begin:
            span = EventSpan(
                kind=kind,
                start=dataset.seconds(event.start),
                stop=dataset.seconds(event.stop),
                channels=[channel_name(dataset, recording, c) for c in event.channels],
            )
            spans.append(span)
    return spans


def channel_name(dataset: TokenPlaces, recording: int, channel: int) -> str:
    """Return the channel's name, or its column if names are unknown or may be wrong."""
    names = dataset.channel_names
    if names is None or dataset.shifted[recording]:
        return f"column {channel + 1}"
    return names[channel]


def montage_step(sampling_rate: float, rate: int = MONTAGE_RATE) -> int:
    """Return the samples of a recording per sample of its montages, at `rate` or a little more."""
    return max(1, int(sampling_rate // rate))


def montage_eeg(
    dataset: TokenPlaces, recording: int, begin: int, stop: int, rate: int = MONTAGE_RATE
) -> Float[np.ndarray, "fewer_samples n_vars"]:
    """Return samples begin:stop of all channels in SD, at `rate` [Hz] or a little more.

    Activity that is too fast for this rate is filtered out, since it would look like slow waves.
    The filter is symmetric, so that waves stay at their times.
    """
    step = montage_step(dataset.sampling_rate, rate)
    before = min(begin // step, FILTER_REACH) * step
    after = FILTER_REACH * step
    eeg = dataset.eeg_between(recording, begin - before, stop + after)
    # The sample at `begin` is one of those that stay.
    filtered = resample_poly(np.asarray(eeg, np.float32), 1, step, axis=0, padtype="reflect")
    n_samples = -(-(stop - begin) // step)
    return filtered[before // step :][:n_samples]


def to_int8(eeg: Float[np.ndarray, "*n"]) -> Int8[np.ndarray, "*n"]:
    """Return EEG in SD as multiples of TRACE_STEP, clipped at 12.7 SD."""
    return np.clip(np.rint(eeg / TRACE_STEP), -127, 127).astype(np.int8)
