"""Labelled events in recordings, and `events.csv`.

Its columns are recording, event (its kind), start, stop (samples) and channels. Names of channels
are separated by spaces; a name that contains spaces is in double quotes.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

EVENTS = "events.csv"
COLUMNS = ("recording", "event", "start", "stop", "channels")


@dataclass(frozen=True)
class Event:
    """A labelled stretch of a recording."""

    kind: str
    start: int  # sample
    stop: int  # sample
    channels: tuple[str, ...]


@dataclass(frozen=True)
class Annotation:
    """A labelled stretch of an EEG file, before it becomes an event of a recording."""

    kind: str
    onset: float  # seconds from the first sample
    duration: float  # seconds; 0 if the source gives none
    channels: tuple[str, ...]  # names in the file; () for all


def join_channels(names: Sequence[str]) -> str:
    """Return names of channels as they are written in events.csv.

    >>> join_channels(["Fp1", "Resp Belt"])
    'Fp1 "Resp Belt"'
    """
    cell = io.StringIO()
    csv.writer(cell, delimiter=" ", lineterminator="").writerow(names)
    return cell.getvalue()


def split_channels(cell: str) -> list[str]:
    """Return the names of channels in a cell of events.csv. Inverse of `join_channels`.

    >>> split_channels('Fp1 "Resp Belt"')
    ['Fp1', 'Resp Belt']
    """
    (names,) = csv.reader([cell.strip()], delimiter=" ", skipinitialspace=True)
    return names


def write_events(path: Path, events: Iterable[tuple[str, Event]]) -> None:
    """Write events with the file names of their recordings, in the given order."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for recording, event in events:
            channels = join_channels(event.channels)
            writer.writerow((recording, event.kind, event.start, event.stop, channels))
