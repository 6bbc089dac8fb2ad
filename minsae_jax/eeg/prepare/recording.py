"""Prepares one recording: EEG file → .npy and its record in the folder `.prepare`.

The record has everything that the tables of the whole folder need, so that a rerun skips what is
done.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from minsae_jax.eeg.description import Position, RecordingDescription, Unit
from minsae_jax.eeg.events import Event
from minsae_jax.eeg.montage import canonical
from minsae_jax.eeg.prepare.channels import mixing_matrix
from minsae_jax.eeg.prepare.read import BadRecordingError, EegFile, open_file, read_signals
from minsae_jax.eeg.prepare.signals import (
    Filters,
    Statistics,
    apply_filters,
    check_quality,
    measure,
    write_recording,
)
from minsae_jax.eeg.prepare.sources import Source, files_of
from minsae_jax.files import atomic_write

RECORDS = ".prepare"


@dataclass(frozen=True)
class Plan:
    """Resolved settings of every recording; equal keys give equal recordings of equal files."""

    channels: tuple[str, ...]
    positions: tuple[Position | None, ...]
    montage: str
    reference: tuple[str, ...]
    filters: Filters
    unit: Unit
    scale: float
    crop: float  # seconds
    min_duration: float  # seconds
    max_duration: float | None  # seconds
    on_missing: Literal["interpolate", "skip", "error"]
    max_interpolated: float  # share of the channels
    event_seconds: float
    key: str


@dataclass(frozen=True)
class Record:
    """A prepared recording."""

    name: str
    patient: str  # in the names of files
    n_samples: int
    description: RecordingDescription
    events: tuple[Event, ...]
    findings: tuple[str, ...]
    unused_channels: tuple[str, ...]  # of the source


@dataclass(frozen=True)
class Rejected:
    """A recording that is left out. is_bad: it is an error unless bad recordings are skipped."""

    source: Source
    reason: str
    is_bad: bool = True


def prepare_recording(source: Source, plan: Plan, folder: Path) -> Record | Rejected:
    """Write one recording and its record, and return the record, or why there is none."""
    stamp = stamp_of(source)
    try:
        file = open_file(source.path)
        return _prepare(source, file, plan, folder, stamp)
    except _SkippedError as e:
        return Rejected(source, str(e), is_bad=False)
    except BadRecordingError as e:
        return Rejected(source, str(e))
    except MemoryError:
        return Rejected(source, "does not fit into memory")


def read_record(source: Source, plan: Plan, folder: Path) -> Record | None:
    """Return the record of a recording that is complete and up to date, or None."""
    path = record_path(folder, source.name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        size = (folder / source.name).stat().st_size
    except (OSError, ValueError):
        return None
    is_current = content["key"] == plan.key and content["stamp"] == stamp_of(source)
    if not is_current or content["size"] != size:
        return None
    values = content["record"]
    description = {name: _tuple(value) for name, value in values["description"].items()}
    events = [{name: _tuple(value) for name, value in event.items()} for event in values["events"]]
    nested = {
        "description": RecordingDescription(**description),
        "events": tuple(Event(**event) for event in events),
    }
    return Record(**{name: _tuple(value) for name, value in values.items()} | nested)


def record_path(folder: Path, name: str) -> Path:
    """Return the path of a recording's record."""
    return folder / RECORDS / f"{name}.json"


def stamp_of(source: Source) -> str:
    """Return a hash of names, sizes and modification times of all files of a source."""
    stamps = []
    for path in files_of(source.path):
        status = path.stat()
        stamps.append([path.name, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def _tuple(value: Any) -> Any:
    # JSON has lists only.
    return tuple(value) if isinstance(value, list) else value


class _SkippedError(Exception):
    """A recording that the settings leave out."""


@dataclass(frozen=True)
class _Channels:
    """Channels of one file by their canonical names, which are keys of `names`."""

    names: dict[str, str]  # of the target channels, in column order
    missing: tuple[str, ...]  # of the target channels
    references: tuple[str, ...]
    read: tuple[str, ...]  # target channels in the file, then references
    flat: tuple[str, ...] = ()  # of `read`, once the samples are known, and so are these
    clipped: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()  # target channels that are flat or marked as bad

    @property
    def interpolated(self) -> tuple[str, ...]:
        return tuple(key for key in self.names if key in self.missing or key in self.bad)

    def named(self, keys: Sequence[str]) -> tuple[str, ...]:
        """Return the names as the settings spell them."""
        return tuple(self.names.get(key, key) for key in keys)


def _prepare(source: Source, file: EegFile, plan: Plan, folder: Path, stamp: str) -> Record:
    start, stop = _span(file, plan)
    _check_rate(file.sampling_rate, plan.filters)
    channels = _find_channels(file, plan)
    # Checked before the samples are read, and again when flat channels are known.
    _check_interpolated(channels, plan)
    data = read_signals(file, channels.read, start, stop, plan.scale)
    channels = _check_channels(data, channels, file)
    _check_interpolated(channels, plan)
    reference = channels.references or plan.reference
    matrix = mixing_matrix(
        plan.channels, plan.montage, channels.read, channels.interpolated, reference
    )
    data = apply_filters(data, file.sampling_rate, plan.filters)
    statistics = measure(data, matrix)
    n_samples = data.shape[1]
    record = Record(
        name=source.name,
        patient=source.name.split("_")[0],
        n_samples=n_samples,
        description=_describe(source, file, plan, channels, statistics, n_samples),
        events=_events(file, channels, plan, start / file.sampling_rate, n_samples),
        findings=_findings(file, plan, channels),
        unused_channels=tuple(sorted(file.names.keys() - set(channels.read))),
    )
    # The record comes first, and is valid only with the recording: a recording without a record
    # could not be distinguished from one of another program.
    path = folder / source.name
    path.unlink(missing_ok=True)
    with atomic_write(path) as temporary:
        write_recording(temporary, data, matrix, statistics, plan.unit)
        _write_record(folder, record, plan.key, stamp, temporary.stat().st_size)
    return record


def _find_channels(file: EegFile, plan: Plan) -> _Channels:
    """Return the channels to read. Raises BadRecordingError if the file lacks a reference."""
    names = {canonical(channel): channel for channel in plan.channels}
    present = [key for key in names if key in file.names]
    references: list[str] = []
    if plan.reference not in (("average",), ("none",)):
        references = [canonical(name) for name in plan.reference]
    absent = [name for name in references if name not in file.names]
    if absent:
        raise BadRecordingError(f"has no reference channel {' '.join(absent)}")
    return _Channels(
        names=names,
        missing=tuple(key for key in names if key not in file.names),
        references=tuple(references),
        read=(*present, *(key for key in references if key not in present)),
    )


def _check_channels(
    data: Float[np.ndarray, "channels samples"], channels: _Channels, file: EegFile
) -> _Channels:
    """Return the channels with those that are flat, clipped or bad.

    Raises BadRecordingError on NaN, a wrong unit, and unusable references.
    """
    quality = check_quality(data)
    read = np.array(channels.read)
    flat = tuple(read[quality.is_flat].tolist())
    unusable = [key for key in channels.references if key in flat or key in file.bad]
    if unusable:
        raise BadRecordingError(f"has a flat or bad reference channel: {' '.join(unusable)}")
    targets = [key for key in channels.read if key in channels.names]
    return dataclasses.replace(
        channels,
        flat=flat,
        clipped=tuple(read[quality.is_clipped].tolist()),
        bad=tuple(key for key in targets if key in flat or key in file.bad),
    )


def _describe(
    source: Source,
    file: EegFile,
    plan: Plan,
    channels: _Channels,
    statistics: Statistics,
    n_samples: int,
) -> RecordingDescription:
    return RecordingDescription(
        source=source.label,
        mean_uv=tuple(statistics.mean.tolist()),
        sd_uv=tuple(statistics.sd.tolist()),
        bad_channels=channels.named(channels.bad),
        interpolated_channels=channels.named(channels.interpolated),
        original_sampling_rate=file.sampling_rate,
        duration=n_samples / plan.filters.sampling_rate,
    )


def _findings(file: EegFile, plan: Plan, channels: _Channels) -> tuple[str, ...]:
    """Return one line for each property of the recording that the user should know."""
    findings = []
    if file.is_truncated:
        findings.append("file is shorter or longer than its header says")
    if file.sampling_rate < plan.filters.sampling_rate:
        findings.append(f"sampling rate {file.sampling_rate:g} Hz is below the target")
    marked = [key for key in channels.bad if key not in channels.flat]
    problems = {
        "missing": channels.missing,
        "flat": channels.flat,
        "marked as bad": marked,
        "clipped": channels.clipped,
    }
    for problem, keys in problems.items():
        if keys:
            findings.append(f"channels {problem}: {' '.join(channels.named(keys))}")
    return tuple(findings)


def _write_record(folder: Path, record: Record, key: str, stamp: str, size: int) -> None:
    content = {"key": key, "stamp": stamp, "size": size, "record": dataclasses.asdict(record)}
    with atomic_write(record_path(folder, record.name)) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


def _span(file: EegFile, plan: Plan) -> tuple[int, int]:
    """Return the first sample after cropping, and the sample after the last."""
    start = round(plan.crop * file.sampling_rate)
    stop = file.n_samples - start
    seconds = (stop - start) / file.sampling_rate
    if seconds < plan.min_duration:
        raise BadRecordingError(
            f"is too short: {max(seconds, 0):.4g} s instead of --min_duration {plan.min_duration:g}"
        )
    if plan.max_duration is not None and seconds > plan.max_duration:
        raise BadRecordingError(
            f"is too long: {seconds:.4g} s instead of --max_duration {plan.max_duration:g}"
        )
    return start, stop


def _check_rate(rate: float, filters: Filters) -> None:
    edges = {"h_freq": filters.h_freq or 0, "l_freq": filters.l_freq or 0}
    edges["notch"] = max(filters.notch, default=0)
    for name, edge in edges.items():
        if edge >= rate / 2:
            raise BadRecordingError(
                f"has a sampling rate of {rate:g} Hz, which is too low for --{name} {edge:g}"
            )


def _check_interpolated(channels: _Channels, plan: Plan) -> None:
    """Raise if so many channels cannot be interpolated, or must not be."""
    if channels.missing and plan.on_missing != "interpolate":
        reason = f"lacks {' '.join(channels.named(channels.missing))}"
        if plan.on_missing == "skip":
            raise _SkippedError(reason)
        raise BadRecordingError(reason)
    names = channels.named(channels.interpolated)
    n_channels = len(plan.channels)
    if len(names) > plan.max_interpolated * n_channels:
        raise BadRecordingError(
            f"has {n_channels - len(names)} usable channels of {n_channels}; missing, flat or bad "
            f"are {' '.join(names)}"
        )
    positions = dict(zip(plan.channels, plan.positions, strict=True))
    unknown = [name for name in names if positions[name] is None]
    if unknown:
        raise BadRecordingError(
            f"lacks {' '.join(unknown)}, which --montage {plan.montage} has no position for"
        )


def _events(
    file: EegFile, channels: _Channels, plan: Plan, offset: float, n_samples: int
) -> tuple[Event, ...]:
    """Return the annotations that are in the recording, in order of time. offset: in seconds."""
    rate = plan.filters.sampling_rate
    events = []
    for annotation in file.annotations:
        onset = annotation.onset - offset
        seconds = annotation.duration or plan.event_seconds
        start = max(round(onset * rate), 0)
        stop = min(round((onset + seconds) * rate), n_samples)
        of_event = plan.channels
        if annotation.channels:
            named = {canonical(name) for name in annotation.channels}
            of_event = tuple(name for key, name in channels.names.items() if key in named)
        if start < stop and of_event:
            kind = " ".join(annotation.kind.split())
            events.append(Event(kind, start, stop, of_event))
    return tuple(sorted(events, key=lambda event: (event.start, event.stop, event.kind)))
