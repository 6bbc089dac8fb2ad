"""Labelled events, spans of EEG with and without them, and the tokens that they touch.

`events.csv` (see minsae_jax/eeg/events.py) is in the folder of the recordings. Each event is
compared with a random span of the same length, on the same channels of the same recording. The
score of a span is the largest activation of a feature over the tokens of its channels that it
touches. No token of the random span touches an event of the same kind. Both spans begin at the same
offset from the tokens and touch equally many: the largest of more tokens is larger by chance.
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from sys import intern
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from minsae_jax.eeg.description import read_description
from minsae_jax.eeg.events import COLUMNS, EVENTS, split_channels
from minsae_jax.eeg.montage import canonical
from minsae_jax.errors import UserError, brief
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.files import regular_file
from minsae_jax.sae.member import SparseAutoencoder

T = TypeVar("T")
# Of a recording, for each sample: tokens that begin before it, and tokens that end there or before
TokenCounts = tuple[np.ndarray, np.ndarray]
# Encoded at a time: malloc reuses the memory of so many features, unlike that of larger arrays.
BATCH_TOKENS = 2048
# Why a kind of events is left out, after the patients that it is missing for
WITHOUT_SPANS = (
    "of these patients, no event is inside the windows and has a free place of its length in its "
    "recording"
)


@dataclass(frozen=True, slots=True)
class LabelledEvent:
    """One line of events.csv without its kind; start and stop in samples of the recording."""

    recording: str
    start: int
    stop: int
    # Columns of the recording
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """A stretch of a recording, with an event or without one."""

    recording: int
    # First sample of the recording, and the one after the last
    start: int
    stop: int
    channels: tuple[int, ...]
    is_event: bool


@dataclass(frozen=True)
class SpanActivations:
    """Spans, and for each the activations of the tokens that it touches."""

    spans: list[Span]
    # [tokens, d_model] of each span
    activations: list[np.ndarray]

    @cached_property
    def is_event(self) -> Bool[np.ndarray, " spans"]:
        return np.array([span.is_event for span in self.spans], bool)

    @cached_property
    def lengths(self) -> Int[np.ndarray, " spans"]:
        """Number of tokens of each span."""
        return np.array([len(x) for x in self.activations], np.int64)

    @cached_property
    def recording(self) -> Int[np.ndarray, " spans"]:
        """The recording of each span, as an index into the dataset's."""
        return np.array([span.recording for span in self.spans], np.int64)

    @property
    def has_both(self) -> bool:
        """Whether there are spans with and without an event."""
        return bool(self.is_event.any() and not self.is_event.all())


def read_events(folder: Path) -> dict[str, list[LabelledEvent]]:
    """Return the events of every kind.

    Raises UserError if events.csv is invalid, or has no event of any recording in the folder.
    """
    names = [canonical(name) for name in read_description(folder).channels]

    # Few channels or groups of them occur in many rows.
    @cache
    def columns_of(cell: str) -> tuple[int, ...]:
        return _columns_of(cell, names)

    events: dict[str, list[LabelledEvent]] = {}
    path = folder / EVENTS
    # Spreadsheets write a byte order mark.
    with regular_file(path).open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        try:
            missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise UserError(
                    f"{path} has no column {missing[0]}; it requires {', '.join(COLUMNS)}"
                )
            for row in rows:
                if any(row[name] is None for name in COLUMNS):
                    raise ValueError("the row is too short")
                events.setdefault(row["event"], []).append(_parse_event(row, columns_of))
        except (ValueError, csv.Error) as e:
            raise UserError(
                f"{path}, line {rows.line_num}: expected recording, event, start, stop and "
                f"channels ({brief(e)})"
            ) from None
    named = {event.recording for of_kind in events.values() for event in of_kind}
    recordings = sorted(path.name for path in folder.glob("*.npy"))
    if named and recordings and named.isdisjoint(recordings):
        raise UserError(
            f"{path} has no event of any recording in its folder; recordings are named like "
            f"{recordings[0]}, got {min(named)}"
        )
    return events


def _columns_of(cell: str, channel_names: list[str]) -> tuple[int, ...]:
    """Return the columns of the channels in a cell. Raises ValueError or csv.Error."""
    in_cell = split_channels(cell)
    for name in in_cell:
        if canonical(name) not in channel_names:
            raise ValueError(f"unknown channel {name}")
    return tuple(channel_names.index(canonical(name)) for name in in_cell)


def _parse_event(
    row: Mapping[str, str], columns_of: Callable[[str], tuple[int, ...]]
) -> LabelledEvent:
    """Return the event of a row. Raises ValueError or csv.Error if a cell is invalid."""
    channels = columns_of(row["channels"])
    start = int(row["start"])
    stop = int(row["stop"])
    if not (0 <= start < stop < 2**53 and channels):
        raise ValueError("the event is empty")
    # The events of a recording share its name.
    return LabelledEvent(intern(row["recording"]), start, stop, channels)


def events_by_recording(events: Sequence[LabelledEvent]) -> dict[str, list[LabelledEvent]]:
    """Return the events of each recording, in their order."""
    by_recording: dict[str, list[LabelledEvent]] = {}
    for event in events:
        by_recording.setdefault(event.recording, []).append(event)
    return by_recording


def sample(items: Sequence[T], n: int | None, seed: int) -> list[T]:
    """Return n of the items at random, in their order, or all if they are fewer or n is None."""
    order = np.random.default_rng(seed).permutation(len(items))
    return [items[i] for i in np.sort(order[:n])]


def draw_spans(
    dataset: Dataset, events: list[LabelledEvent], seed: int, max_events: int | None = None
) -> list[Span]:
    """Return the events inside the dataset's windows, each followed by a span without an event.

    Events without any free place of their length in the recording are left out: compared with other
    recordings, they would show differences between patients. max_events: of more events in the
    dataset's recordings, so many are drawn, always the same.
    """
    rng = np.random.default_rng(seed)
    step = dataset.tokens.step or 1  # if tokens are not evenly spaced, any offset will do
    spans = []
    by_recording = events_by_recording(events)
    located = []
    for recording, name in enumerate(dataset.recordings):
        located += [(recording, event) for event in by_recording.get(name, [])]
    for recording, drawn in groupby(sample(located, max_events, seed=0), itemgetter(0)):
        end = windows_end(dataset, recording)
        sequences = slice(*dataset.sequences_of(recording))
        windows = np.unique(dataset.window[sequences]).astype(np.int64) * dataset.seq_len
        # Windows, or channels of some, may be missing in a store of another program.
        channels = dataset.channel[sequences]
        is_complete = len(channels) == len(windows) * len(np.unique(channels))
        # is_taken[i + 1] says whether sample i is part of a token that an event touches, so that
        # its cumulative sum counts such samples before each sample. A span is free if it does not
        # grow in it.
        is_taken = np.zeros(end + 1, np.int32)
        begin, stop = _tokens_of_windows(dataset, windows)
        # Those of a complete recording are the same on all channels.
        counts: dict[tuple[int, ...] | None, TokenCounts] = {None: _count_tokens(begin, stop, end)}
        for event in by_recording[dataset.recordings[recording]]:
            is_touched = (begin < event.stop) & (stop > event.start)
            first = begin[is_touched].min(initial=event.start)
            last = stop[is_touched].max(initial=event.stop)
            is_taken[first + 1 : last + 1] = 1
        n_taken = np.cumsum(is_taken, dtype=np.int32)
        for _, event in drawn:
            if event.stop > end:
                continue
            key = None if is_complete else event.channels
            if key not in counts:
                on_channels = _tokens_on_channels(dataset, recording, end, event.channels)
                counts[key] = _count_tokens(*on_channels, end)
            n_begun, n_ended = counts[key]
            length = event.stop - event.start
            offset = event.start % dataset.seq_len % step
            starts = windows[:, None] + np.arange(offset, dataset.seq_len, step)
            starts = starts[starts <= end - length]
            starts = starts[n_taken[starts] == n_taken[starts + length]]
            n_touched = n_begun[starts + length] - n_ended[starts]
            # It differs where tokens overlap, do not fill the window, or are missing.
            starts = starts[n_touched == n_begun[event.stop] - n_ended[event.start]]
            if len(starts):
                start = int(rng.choice(starts))
                span = Span(recording, event.start, event.stop, event.channels, is_event=True)
                spans.append(span)
                spans.append(replace(span, start=start, stop=start + length, is_event=False))
    return spans


def _tokens_of_windows(
    dataset: Dataset, windows: Int[np.ndarray, " windows"]
) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " tokens"]]:
    """Return first sample, and the one after the last, of the tokens of windows.

    windows: the first sample of each.
    """
    located = dataset.tokens.located
    first = dataset.tokens.first[located]
    in_window = np.stack([first, first + dataset.lengths(located)])
    distinct = np.unique(in_window, axis=1).astype(np.int64)
    begin, stop = (distinct[:, None, :] + windows[None, :, None]).reshape(2, -1)
    return begin, stop


def _tokens_on_channels(
    dataset: Dataset, recording: int, end: int, channels: tuple[int, ...]
) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " tokens"]]:
    """Return first sample, and the one after the last, of a recording's tokens on some channels."""
    whole = Span(recording, 0, end, channels, is_event=False)
    sequences, tokens = tokens_of(dataset, whole)
    begin = dataset.first_samples(sequences, tokens)
    return begin, begin + dataset.lengths(tokens)


def _count_tokens(
    begin: Int[np.ndarray, " tokens"], stop: Int[np.ndarray, " tokens"], end: int
) -> TokenCounts:
    """Return the number of tokens that begin before each sample up to `end`, and that end by it."""
    n_begun = np.insert(np.bincount(begin, minlength=end).cumsum(dtype=np.int32), 0, 0)
    n_ended = np.bincount(stop, minlength=end + 1).cumsum(dtype=np.int32)
    return n_begun, n_ended


def windows_end(dataset: Dataset, recording: int) -> int:
    """Return the sample after the last window of a recording."""
    first, last = dataset.sequences_of(recording)
    if first == last:
        return 0
    return (int(dataset.window[last - 1]) + 1) * dataset.seq_len


def tokens_of(dataset: Dataset, span: Span) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return sequence and position of the tokens whose samples a span touches on its channels.

    Tokens over all channels are among them; a CLS token never is.
    """
    first, last = dataset.sequences_of(span.recording)
    windows = dataset.window[first:last]
    first_window = span.start // dataset.seq_len
    last_window = (span.stop - 1) // dataset.seq_len
    is_near = (windows >= first_window) & (windows <= last_window)
    is_near &= np.isin(dataset.channel[first:last], [*span.channels, -1])
    near = np.arange(first, last)[is_near]
    grid = np.meshgrid(near, dataset.tokens.located, indexing="ij")
    sequences = grid[0].reshape(-1)
    tokens = grid[1].reshape(-1)
    begin = dataset.first_samples(sequences, tokens)
    is_touched = (begin < span.stop) & (begin + dataset.lengths(tokens) > span.start)
    is_touched &= np.isin(dataset.channels_of(sequences, tokens), [*span.channels, -1])
    return sequences[is_touched], tokens[is_touched]


def gather(dataset: Dataset, spans: list[Span]) -> SpanActivations:
    """Return the spans that touch at least one token, by recording, with their activations."""
    touching = []
    activations = []
    for span in sorted(spans, key=lambda span: span.recording):
        sequences, tokens = tokens_of(dataset, span)
        if len(sequences):
            # Its windows only: few of the recording's
            first = int(sequences.min())
            x = dataset.read(first, int(sequences.max()) + 1)
            touching.append(span)
            activations.append(x[sequences - first, tokens])
    return SpanActivations(touching, activations)


def span_groups(activations: Sequence[np.ndarray]) -> Iterator[Int[np.ndarray, " spans"]]:
    """Yield the indices of spans, in order, with at most BATCH_TOKENS tokens together.

    A span with more tokens is alone.
    """
    group: list[int] = []
    n_tokens = 0
    for i, x in enumerate(activations):
        if group and n_tokens + len(x) > BATCH_TOKENS:
            yield np.array(group)
            group = []
            n_tokens = 0
        group.append(i)
        n_tokens += len(x)
    if group:
        yield np.array(group)


def max_over_spans(
    values: Float[np.ndarray, "tokens n"], lengths: Int[np.ndarray, " spans"]
) -> Float[np.ndarray, "spans n"]:
    """Return the maximum over the tokens of each span; lengths: their tokens, span after span."""
    stops = np.cumsum(lengths)
    if values.shape[1] == 1:
        # From each span's first row to that of the next
        return np.maximum.reduceat(values, stops - lengths)
    # Of many columns reduceat takes ten times as long.
    spans = zip(stops - lengths, stops, strict=True)
    return np.stack([values[start:stop].max(axis=0) for start, stop in spans])


def span_maxima(sae: SparseAutoencoder, spans: SpanActivations) -> Float[np.ndarray, "spans d_sae"]:
    """Return the largest activation of each feature in every span."""
    maxima = []
    for group in span_groups(spans.activations):
        x = np.concatenate([spans.activations[i] for i in group])
        features = np.asarray(sae.encode(x))
        maxima.append(max_over_spans(features, spans.lengths[group]))
    return np.concatenate(maxima)


def event_share(
    dataset: Dataset, events: list[LabelledEvent]
) -> Float[np.ndarray, "sequences n_located"]:
    """Return the share of each token's samples that are in an event on its channel.

    Tokens without samples are left out. A token over all channels may be in an event on any.
    """
    located = dataset.tokens.located
    share = np.zeros((len(dataset.recording), len(located)), np.float32)
    by_recording = events_by_recording(events)
    for recording, name in enumerate(dataset.recordings):
        if name not in by_recording:
            continue
        first, last = dataset.sequences_of(recording)
        n_samples = windows_end(dataset, recording)
        # The last row is of any channel, so that -1 is its index.
        is_event = np.zeros((dataset.n_vars + 1, n_samples + 1), bool)
        for event in by_recording[name]:
            is_event[[*event.channels, -1], event.start + 1 : event.stop + 1] = True
        # Event samples before each sample; a day at 256 Hz has 22 million.
        n_before = is_event.cumsum(axis=1, dtype=np.int32)
        sequences, tokens = np.meshgrid(np.arange(first, last), located, indexing="ij")
        begin = dataset.first_samples(sequences, tokens)
        length = dataset.lengths(tokens)
        channel = dataset.channels_of(sequences, tokens)
        n_inside = n_before[channel, begin + length] - n_before[channel, begin]
        share[first:last] = n_inside / length
    return share
