"""Reads EEG files with MNE: the channels that are needed, in microvolts, and the annotations."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import mne
import numpy as np
from jaxtyping import Float

from minsae_jax.eeg.events import Annotation
from minsae_jax.eeg.montage import canonical
from minsae_jax.eeg.prepare import edf
from minsae_jax.eeg.prepare.bids import bids_sidecar, read_channels, read_events
from minsae_jax.eeg.prepare.errors import BadRecordingError
from minsae_jax.eeg.prepare.sources import files_in_header, files_with_stem
from minsae_jax.errors import brief
from minsae_jax.files import regular_file

# Annotations at the start of a file and at gaps, by MNE, EEGLAB and BrainVision.
BOUNDARY = re.compile(r"^(EDGE boundary|BAD boundary|BAD_ACQ_SKIP|boundary|New Segment/.*)$")
MIN_SHARED = 10  # channels, for a reference that is shared
TRUNCATED = "does not match the file size"  # in MNE's warning, of EDF files


@dataclass(frozen=True)
class EegFile:
    """An open EEG file whose samples have not been read."""

    raw: mne.io.BaseRaw
    sampling_rate: float
    n_samples: int
    names: dict[str, list[str]]  # canonical name -> names in the file, of which one is usual
    bad: frozenset[str]  # canonical names of channels that the source marks as bad
    not_eeg: frozenset[str]  # canonical names of channels of other types in BIDS's channels.tsv
    annotations: tuple[Annotation, ...]
    is_truncated: bool  # shorter or longer than its header says
    n_gaps: int  # across which the samples are joined
    lacks_markers: bool  # a file of markers that the header names does not exist
    n_notes_outside: int  # files of annotations, all of which are before or after the recording
    scales: dict[str, float]  # that MNE leaves out, by the name in the file; see `edf.Header`
    is_resampled: bool  # by MNE, since channels of `raw` have different rates

    def is_among(self, channel: str, names: Collection[str]) -> bool:
        """Return whether a channel, by its canonical name, is among such names.

        They can also have the reference that is part of its name in the file.
        """
        spellings = {channel, *map(canonical, self.names.get(channel, ()))}
        return not spellings.isdisjoint(names)


def open_file(path: Path, wanted: Collection[str], notes: Sequence[Path]) -> EegFile:
    """Open an EEG file.

    wanted: canonical names of the channels that will be read. notes: EDF+ files of annotations.
    Raises BadRecordingError if MNE cannot read it or its BIDS tables are invalid.
    """
    records = None
    rates: dict[str, int] = {}
    scales: dict[str, float] = {}
    try:
        # MNE would wait for a named pipe, also if another part is one, such as the .eeg of a .vhdr.
        for each in (path, *files_with_stem(path.parent, path.stem)):
            regular_file(each)
        # Warnings can contain parts of the header, so they are not shown.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            raw = _read_raw(path)
            names = _names(raw.ch_names)
            annotations = _annotations(raw)
            start = _start_time(raw)
            in_notes = [_annotations_in(note, start) for note in notes]
            in_notes = [each for each in in_notes if each]
            if path.suffix.lower() in edf.SUFFIXES:
                header = edf.read_header(path)
                signals = dict(zip(raw.ch_names, header.signals, strict=True))
                rates = {name: header.n_samples[i] for name, i in signals.items()}
                scales = {name: header.scales[i] for name, i in signals.items()}
                if header.is_discontinuous:
                    records = edf.read_records(path, header)
                else:
                    annotations += edf.read_several_lines(path, header)
                if len(set(rates.values())) > 1:
                    raw = _without_unused(path, raw, names, wanted)
        sampling_rate = float(raw.info["sfreq"])
        n_samples = len(raw.times)
    except Exception as e:  # damaged files raise almost anything
        raise BadRecordingError(f"cannot be read ({_without_quotes(e)})") from None
    if not edf.has_signals(path):
        raise BadRecordingError(
            "contains annotations and no signals; these would be of the recording of the same "
            "patient and session, if there is only one (see --patient_pattern)"
        )
    if not (np.isfinite(sampling_rate) and sampling_rate > 0 and n_samples > 0):
        raise BadRecordingError("contains no samples")

    # Gaps that programs have marked in the file, or those between the records of EDF+D.
    boundaries = {each.onset for each in annotations if BOUNDARY.match(each.kind)}
    n_gaps = sum(onset > 0 for onset in boundaries)
    if records is not None:
        annotations = records.annotations
        n_gaps = records.n_gaps
    events_table = bids_sidecar(path, "events")
    if events_table is not None:
        annotations = read_events(events_table, names, default=annotations)
    if records is not None:
        # Times of all of them are by the clock.
        annotations = records.joined(annotations)
        in_notes = [records.joined(each) for each in in_notes]
    n_notes_outside = 0
    for of_note in in_notes:
        annotations += of_note
        n_notes_outside += not _any_within(of_note, n_samples / sampling_rate)

    bad = {canonical(name) for name in raw.info["bads"]}
    not_eeg: set[str] = set()
    channels_table = bids_sidecar(path, "channels")
    if channels_table is not None:
        marked, not_eeg = read_channels(channels_table)
        bad |= marked
    return EegFile(
        raw=raw,
        sampling_rate=sampling_rate,
        n_samples=n_samples,
        names=names,
        bad=frozenset(bad),
        not_eeg=frozenset(not_eeg),
        annotations=tuple(each for each in annotations if not BOUNDARY.match(each.kind)),
        is_truncated=any(TRUNCATED in str(each.message) for each in caught),
        n_gaps=n_gaps,
        # MNE cannot read it without the data. Of both, it also finds those of the header's name.
        lacks_markers=not all(
            each.exists() or path.with_suffix(each.suffix).exists()
            for each in files_in_header(path)
        ),
        n_notes_outside=n_notes_outside,
        scales=scales,
        is_resampled=len({rates.get(name) for name in raw.ch_names}) > 1,
    )


def _read_raw(path: Path, exclude: Sequence[str] = ()) -> mne.io.BaseRaw:
    """Open a file with MNE. exclude: names of channels to leave out of an EDF or BDF file."""
    settings: dict[str, Any] = {"preload": False, "verbose": "WARNING"}
    if path.suffix.lower() not in edf.SUFFIXES:
        return mne.io.read_raw(path, **settings)
    settings |= {"exclude": exclude, "exclude_after_unique": True}
    return _in_either_encoding(mne.io.read_raw, path, **settings)


def _start_time(raw: mne.io.BaseRaw) -> datetime | None:
    """Return the time of the first sample, which in FIF can be after that of the acquisition."""
    begin = raw.info["meas_date"]
    return None if begin is None else begin + timedelta(seconds=raw.first_time)


def _any_within(annotations: Sequence[Annotation], seconds: float) -> bool:
    """Return whether any annotation is in a recording of some length."""
    return any(each.onset < seconds and each.onset + each.duration >= 0 for each in annotations)


def _annotations_in(path: Path, start: datetime | None) -> tuple[Annotation, ...]:
    """Return the annotations of an EDF+ file without signals, for a recording from `start` on."""
    delay = 0.0
    begin = _start_time(_read_raw(path))
    if start is not None and begin is not None:
        delay = (begin - start).total_seconds()
    rows = _in_either_encoding(mne.read_annotations, path)
    return tuple(
        Annotation(str(row["description"]), float(row["onset"]) + delay, float(row["duration"]), ())
        for row in rows
    )


def _in_either_encoding(read: Callable[..., Any], path: Path, **settings: Any) -> Any:
    """Read an EDF or BDF file with texts in UTF-8, as EDF+ requires, or else in Latin-1."""
    try:
        return read(path, **settings)
    except Exception:  # the type that MNE raises for other encodings
        return read(path, encoding="latin1", **settings)


def _without_unused(
    path: Path, raw: mne.io.BaseRaw, names: dict[str, list[str]], wanted: Collection[str]
) -> mne.io.BaseRaw:
    """Open an EDF or BDF file without its unused channels.

    MNE resamples all channels to the highest rate, so that a fast ECG would change the EEG, most of
    all near the ends.
    """
    used = {name for key in wanted for name in names.get(key, ())}
    unused = [name for name in raw.ch_names if name not in used]
    if not used or not unused:
        return raw
    return _read_raw(path, exclude=unused)


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
            if file.is_resampled:
                # MNE cuts such channels at other times than the others.
                data = file.raw.get_data()[:, start:stop]
            else:
                data, _ = file.raw[:, start:stop]
    except Exception as e:  # as in open_file
        raise BadRecordingError(f"cannot be read ({_without_quotes(e)})") from None
    data *= 1e6 * scale
    for row, name in enumerate(file.raw.ch_names):
        data[row] *= file.scales.get(name, 1.0)
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
    for electrode, name in _shared_reference(names).items():
        names.setdefault(electrode, names[name])
    return names


def _shared_reference(names: Collection[str]) -> dict[str, str]:
    """Return electrodes and their channels if most channels have one reference, such as C3-A2."""
    pairs = {name: name.rpartition("-") for name in names if "-" in name}
    counts = Counter(reference.strip() for _, _, reference in pairs.values())
    for reference, count in counts.most_common(1):
        if count >= MIN_SHARED and count > len(names) / 2:
            return {
                canonical(electrode): name
                for name, (electrode, _, of_name) in pairs.items()
                if of_name.strip() == reference
            }
    return {}


def _only_name(names: list[str]) -> str:
    if len(names) > 1:
        raise BadRecordingError(f"has several channels of one electrode: {', '.join(names)}")
    return names[0]


def _annotations(raw: mne.io.BaseRaw) -> tuple[Annotation, ...]:
    annotations = []
    for each in raw.annotations:
        # MNE names the comments of BrainVision so; in other formats the same text has no prefix.
        kind = str(each["description"]).removeprefix("Comment/")
        # Onsets are times of the acquisition system, for which the file may start later than 0.
        onset = float(each["onset"]) - raw.first_time
        channels = tuple(each.get("ch_names", ()))
        annotations.append(Annotation(kind, onset, float(each["duration"]), channels))
    return tuple(annotations)


def _without_quotes(error: Exception) -> str:
    """Return an error's message without quoted parts, which can be from a patient's header."""
    message = re.sub(r"'[^']*'|\"[^\"]*\"", "…", brief(error))
    return message or type(error).__name__
