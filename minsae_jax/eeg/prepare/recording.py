"""Prepares one recording: EEG file → .npy and its record."""

from pathlib import Path

from threadpoolctl import threadpool_limits

from minsae_jax.eeg.description import RecordingDescription
from minsae_jax.eeg.events import Event
from minsae_jax.eeg.montage import canonical
from minsae_jax.eeg.prepare.channels import mixing_matrix
from minsae_jax.eeg.prepare.config import PrepareConfig
from minsae_jax.eeg.prepare.errors import BadRecordingError, SkippedError
from minsae_jax.eeg.prepare.file_channels import (
    FileChannels,
    check_channels,
    check_interpolated,
    find_channels,
)
from minsae_jax.eeg.prepare.plan import Plan
from minsae_jax.eeg.prepare.read import EegFile, open_file, read_signals
from minsae_jax.eeg.prepare.record import Record, Rejected, stamp_of, write_record
from minsae_jax.eeg.prepare.signals import Filters, apply_filters, measure, write_recording
from minsae_jax.eeg.prepare.sources import Source
from minsae_jax.errors import join_some
from minsae_jax.files import atomic_write, sha256_of


def prepare_recording(source: Source, plan: Plan, folder: Path) -> Record | Rejected:
    """Write one recording and its record, and return the record, or why there is none."""
    stamp = stamp_of(source)
    try:
        wanted = {canonical(name) for name in (*plan.channels, *plan.settings.reference)}
        file = open_file(source.path, wanted, source.notes)
        # The products are small: threads of BLAS cost more than they save, and with --jobs they
        # take the cores of the other processes.
        with threadpool_limits(1):
            return _prepare(source, file, plan, folder, stamp)
    except SkippedError as e:
        return Rejected(source, str(e), is_bad=False)
    except BadRecordingError as e:
        return Rejected(source, str(e))
    except MemoryError:
        return Rejected(source, "does not fit into memory")


def _prepare(source: Source, file: EegFile, plan: Plan, folder: Path, stamp: str) -> Record:
    settings = plan.settings
    start, stop = _span(file, settings)
    _check_rate(file.sampling_rate, plan.filters)
    channels = find_channels(file, plan)
    # Checked before the samples are read, and again when flat channels are known.
    check_interpolated(channels, plan)
    data = read_signals(file, channels.read, start, stop, settings.scale)
    channels = check_channels(data, channels, file)
    check_interpolated(channels, plan)
    reference = channels.references or settings.reference
    matrix = mixing_matrix(
        plan.channels, settings.montage, channels.read, channels.interpolated, reference
    )
    data = apply_filters(data, file.sampling_rate, plan.filters)
    statistics = measure(data, matrix)
    n_samples = data.shape[1]
    description = RecordingDescription(
        source=source.label,
        mean_uv=tuple(statistics.mean.tolist()),
        sd_uv=tuple(statistics.sd.tolist()),
        bad_channels=channels.named(channels.bad),
        interpolated_channels=channels.named(channels.interpolated),
        original_sampling_rate=file.sampling_rate,
        duration=n_samples / plan.filters.sampling_rate,
    )
    # The record comes first, and is valid only with the recording: a recording without a record
    # could not be distinguished from one of another program.
    path = folder / source.name
    path.unlink(missing_ok=True)
    with atomic_write(path) as temporary:
        write_recording(temporary, data, matrix, statistics, plan.unit)
        record = Record(
            name=source.name,
            patient=source.name.split("_")[0],
            n_samples=n_samples,
            description=description,
            events=_events(file, channels, plan, start / file.sampling_rate, n_samples),
            findings=_findings(file, plan, channels),
            unused_channels=channels.unused,
            sha256=sha256_of(temporary),
        )
        write_record(folder, record, plan.key, stamp, temporary.stat().st_size)
    return record


def _span(file: EegFile, settings: PrepareConfig) -> tuple[int, int]:
    """Return the first sample after cropping, and the sample after the last."""
    start = round(settings.crop * file.sampling_rate)
    stop = file.n_samples - start
    seconds = (stop - start) / file.sampling_rate
    shortest = settings.min_duration
    longest = settings.max_duration
    if seconds < shortest:
        raise BadRecordingError(
            f"is too short: {max(seconds, 0):.4g} s instead of --min_duration {shortest:g}"
        )
    if longest is not None and seconds > longest:
        raise BadRecordingError(
            f"is too long: {seconds:.4g} s instead of --max_duration {longest:g}"
        )
    return start, stop


def _check_rate(rate: float, filters: Filters) -> None:
    """Raise BadRecordingError if an edge of a filter is not below half the sampling rate."""
    edges = {"h_freq": filters.h_freq, "l_freq": filters.l_freq}
    edges["notch"] = max(filters.notch, default=None)
    for name, edge in edges.items():
        if edge is not None and edge >= rate / 2:
            raise BadRecordingError(
                f"has a sampling rate of {rate:g} Hz, which is too low for --{name} {edge:g}"
            )


def _findings(file: EegFile, plan: Plan, channels: FileChannels) -> tuple[str, ...]:
    """Return one line for each property of the recording that the user should know."""
    findings = []
    if file.is_truncated:
        findings.append("file is shorter or longer than its header says")
    if file.n_gaps:
        findings.append(f"gaps across which windows are cut: {file.n_gaps}")
    if file.lacks_markers:
        findings.append("file of markers is missing, so that there are no events of it")
    if file.n_notes_outside:
        findings.append(
            "files of annotations that are all before or after the recording, by the dates and "
            f"times of both: {file.n_notes_outside}"
        )
    if file.sampling_rate < plan.filters.sampling_rate:
        findings.append(f"sampling rate {file.sampling_rate:g} Hz is below the target")
    positions = zip(plan.channels, plan.positions, strict=True)
    unlocated = [name for name, position in positions if position is None]
    if unlocated:
        findings.append(
            f"channels without a position in --montage {plan.settings.montage}, which scalp maps "
            f"leave out: {join_some(unlocated, limit=10)}"
        )
    problems = {"missing": channels.missing} | channels.problems
    for problem, keys in problems.items():
        if keys:
            findings.append(f"channels {problem}: {' '.join(channels.named(keys))}")
    return tuple(findings)


def _events(
    file: EegFile, channels: FileChannels, plan: Plan, offset: float, n_samples: int
) -> tuple[Event, ...]:
    """Return the annotations that are in the recording, in order of time. offset: in seconds.

    A marker, which has no duration or one of a single sample of the file, as in BrainVision files,
    lasts `event_seconds`; other events last one sample of the recording at least.
    """
    rate = plan.filters.sampling_rate
    events = []
    for annotation in file.annotations:
        seconds = annotation.duration
        if round(seconds * file.sampling_rate) <= 1:
            seconds = plan.settings.event_seconds
        onset = annotation.onset - offset
        first = round(onset * rate)
        last = max(round((onset + seconds) * rate), first + 1)
        start = max(first, 0)
        stop = min(last, n_samples)
        of_event = plan.channels
        if annotation.channels:
            named = {canonical(name) for name in annotation.channels}
            of_event = tuple(n for key, n in channels.names.items() if file.is_among(key, named))
        kind = " ".join(annotation.kind.split())
        if kind and start < stop and of_event:
            events.append(Event(kind, start, stop, of_event))
    return tuple(sorted(events, key=lambda event: (event.start, event.stop, event.kind)))
