"""Reads EEG files with MNE: the channels that are needed, in microvolts, and the annotations."""

import csv
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mne
import numpy as np
from jaxtyping import Float

from minsae_jax.eeg.montage import canonical
from minsae_jax.eeg.prepare.edf_gaps import Records, read_records
from minsae_jax.eeg.prepare.sources import bids_sidecar, files_with_stem
from minsae_jax.errors import brief
from minsae_jax.files import regular_file

# Annotations that MNE adds itself, or that mark the start of a file.
IGNORED = re.compile(r"^(EDGE boundary|BAD boundary|New Segment/.*)$")
TRUNCATED = "does not match the file size"


class BadRecordingError(Exception):
    """A recording that cannot be used; the message continues "recording NAME …"."""


@dataclass(frozen=True)
class Annotation:
    """A labelled stretch of a recording, as in its source."""

    kind: str
    onset: float  # seconds from the first sample
    duration: float  # seconds; 0 if the source gives none
    channels: tuple[str, ...]  # names in the file; () for all


@dataclass(frozen=True)
class EegFile:
    """An open EEG file whose samples have not been read."""

    raw: mne.io.BaseRaw
    sampling_rate: float
    n_samples: int
    names: dict[str, list[str]]  # canonical name -> names in the file, of which one is usual
    bad: frozenset[str]  # canonical names of channels that the source marks as bad
    annotations: tuple[Annotation, ...]
    is_truncated: bool  # shorter than its header says
    n_gaps: int = 0  # across which the samples are joined


def open_file(path: Path) -> EegFile:
    """Open an EEG file.

    Raises BadRecordingError if MNE cannot read it or its BIDS tables are invalid.
    """
    try:
        # MNE would wait for a named pipe, also if another part is one, such as the .eeg of a .vhdr.
        for each in (path, *files_with_stem(path.parent, path.stem)):
            regular_file(each)
        # Warnings can contain parts of the header, so they are not shown.
        with warnings.catch_warnings(), mne.utils.catch_logging() as log:
            warnings.simplefilter("ignore")
            raw = mne.io.read_raw(path, preload=False, verbose="WARNING")
        sampling_rate = float(raw.info["sfreq"])
        n_samples = len(raw.times)
        records = None
        if path.suffix.lower() in (".edf", ".bdf"):
            records = read_records(path)
    except Exception as e:  # damaged files raise almost anything
        raise BadRecordingError(f"cannot be read ({_without_quotes(e)})") from None
    if not (np.isfinite(sampling_rate) and sampling_rate > 0 and n_samples > 0):
        raise BadRecordingError("contains no samples")
    bad = {canonical(name) for name in raw.info["bads"]}
    channels_table = bids_sidecar(path, "channels")
    if channels_table is not None:
        bad |= _bads_in_bids(channels_table)
    annotations = _annotations(raw)
    if records is not None:
        annotations = _annotations_of(records)
    events_table = bids_sidecar(path, "events")
    if events_table is not None:
        annotations = _bids_events(events_table)
    if records is not None:
        annotations = _without_gaps(annotations, records)
    return EegFile(
        raw=raw,
        sampling_rate=sampling_rate,
        n_samples=n_samples,
        names=_names(raw.ch_names),
        bad=frozenset(bad),
        annotations=annotations,
        is_truncated=TRUNCATED in log.getvalue(),
        n_gaps=0 if records is None else records.n_gaps,
    )


def read_signals(
    file: EegFile, channels: Sequence[str], start: int, stop: int, scale: float
) -> Float[np.ndarray, "channels samples"]:
    """Return samples start to stop of some channels (canonical names), in µV, times `scale`.

    The file cannot be read again afterwards: for some formats the result is MNE's own memory,
    since a recording must not be in memory twice.
    """
    names = [_only_name(file.names[channel]) for channel in channels]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file.raw.pick(names, verbose="ERROR")
            data, _ = file.raw[:, start:stop]
    except Exception as e:  # as in open_file
        raise BadRecordingError(f"cannot be read ({_without_quotes(e)})") from None
    data *= 1e6 * scale
    if file.raw.ch_names == names:
        return data
    return data[[file.raw.ch_names.index(name) for name in names]]


def _names(in_file: Sequence[str]) -> dict[str, list[str]]:
    """Return names in the file by canonical names."""
    # MNE numbers equal names, as Fz-0 and Fz-1.
    repeated = {name.removesuffix("-1") for name in in_file if name.endswith("-1")}
    repeated = {name for name in repeated if f"{name}-0" in in_file}
    names: dict[str, list[str]] = {}
    for name in in_file:
        stem, _, number = name.rpartition("-")
        is_copy = stem in repeated and number.isdecimal()
        names.setdefault(canonical(stem if is_copy else name), []).append(name)
    return names


def _only_name(names: list[str]) -> str:
    if len(names) > 1:
        raise BadRecordingError(f"has several channels of one electrode: {', '.join(names)}")
    return names[0]


def _annotations(raw: mne.io.BaseRaw) -> tuple[Annotation, ...]:
    annotations = []
    for each in raw.annotations:
        kind = str(each["description"])
        if IGNORED.match(kind):
            continue
        # Onsets are times of the acquisition system, for which the file may start later than 0.
        onset = float(each["onset"]) - raw.first_time
        channels = tuple(each.get("ch_names", ()))
        annotations.append(Annotation(kind, onset, float(each["duration"]), channels))
    return tuple(annotations)


def _annotations_of(records: Records) -> tuple[Annotation, ...]:
    annotations = []
    for note in records.notes:
        kind, *channel = note.text.split("@@")  # one channel, as MNE reads and writes it
        annotations.append(Annotation(kind, note.onset, note.duration, tuple(channel)))
    return tuple(annotations)


def _without_gaps(annotations: Sequence[Annotation], records: Records) -> tuple[Annotation, ...]:
    """Return annotations by the times of the joined records; those within a gap are left out."""
    placed = []
    for each in annotations:
        onset = records.without_gaps(each.onset)
        duration = records.without_gaps(each.onset + each.duration) - onset
        if duration > 0 or not records.is_in_gap(each.onset):
            placed.append(replace(each, onset=onset, duration=duration))
    return tuple(placed)


def _bads_in_bids(path: Path) -> set[str]:
    rows = read_table(path, ("name",))
    bad = [row["name"] for row in rows if (row.get("status") or "").lower() == "bad"]
    return {canonical(name) for name in bad}


def _bids_events(path: Path) -> tuple[Annotation, ...]:
    events = []
    for number, row in enumerate(read_table(path, ("onset", "duration")), start=2):
        kind = row.get("trial_type") or row.get("value") or "n/a"
        if kind == "n/a":
            continue
        try:
            onset = float(row["onset"])
            duration = 0.0
            if row["duration"] != "n/a":
                duration = float(row["duration"])
        except ValueError:
            raise BadRecordingError(
                f"has invalid events: {path.name}, line {number}, onset and duration must be "
                "seconds"
            ) from None
        if not np.isfinite([onset, duration]).all() or duration < 0:
            raise BadRecordingError(f"has invalid events: {path.name}, line {number}")
        events.append(Annotation(kind, onset, duration, ()))
    return tuple(events)


def read_table(path: Path, required: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a CSV or TSV file. Raises BadRecordingError if it is invalid."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with regular_file(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            rows = list(reader)
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise BadRecordingError(f"has an invalid table: {path.name} ({brief(e)})") from None
    missing = [name for name in required if name not in columns]
    if missing:
        raise BadRecordingError(
            f"has an invalid table: {path.name} lacks the column {' and '.join(missing)}"
        )
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise BadRecordingError(
                f"has an invalid table: {path.name}, line {number}, does not have "
                f"{len(columns)} fields"
            )
    return rows


def _without_quotes(error: Exception) -> str:
    """Return an error's message without quoted parts, which can be from a patient's header."""
    message = re.sub(r"'[^']*'|\"[^\"]*\"", "…", brief(error))
    return message or type(error).__name__
