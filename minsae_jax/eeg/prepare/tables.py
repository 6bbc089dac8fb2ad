"""Tables of BIDS: events.tsv, channels.tsv, and CSV and TSV files in general."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minsae_jax.eeg.montage import canonical
from minsae_jax.errors import brief
from minsae_jax.files import regular_file

# Columns of BIDS's events.tsv with the kind of an event; the first that is not n/a is used.
EVENT_COLUMNS = ("trial_type", "eventType", "value")
NOT_AVAILABLE = ("", "n/a")


class BadRecordingError(Exception):
    """A recording that cannot be used; the message continues "recording NAME …"."""


@dataclass(frozen=True)
class Annotation:
    """A labelled stretch of a recording, as in its source."""

    kind: str
    onset: float  # seconds from the first sample
    duration: float  # seconds; 0 if the source gives none
    channels: tuple[str, ...]  # names in the file; () for all


def read_channels(path: Path) -> tuple[set[str], set[str]]:
    """Return the canonical names of channels marked as bad, and of those of other types than EEG.

    Raises BadRecordingError if channels.tsv is invalid.
    """
    rows = read_table(path, ("name",))
    bad = {canonical(row["name"]) for row in rows if _cell(row, "status").lower() == "bad"}
    not_eeg = {canonical(row["name"]) for row in rows if not _is_eeg(row)}
    return bad, not_eeg


def _cell(row: dict[str, str], column: str) -> str:
    """Return a value of a BIDS table, "" if it is not available."""
    value = row.get(column, "")
    return "" if value in NOT_AVAILABLE else value


def _is_eeg(row: dict[str, str]) -> bool:
    """Return whether a channel of channels.tsv is EEG or of no known type."""
    return _cell(row, "type").upper() in ("", "EEG")


def read_events(path: Path, default: tuple[Annotation, ...]) -> tuple[Annotation, ...]:
    """Return the events of events.tsv, or the default if no column has their kinds.

    Raises BadRecordingError if it is invalid.
    """
    rows = read_table(path, ("onset", "duration"))
    if rows and not any(column in rows[0] for column in EVENT_COLUMNS):
        return default
    events = []
    for number, row in enumerate(rows, start=2):
        kinds = [_cell(row, column) for column in EVENT_COLUMNS]
        kind = next((kind for kind in kinds if kind), None)
        if kind is None:
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
