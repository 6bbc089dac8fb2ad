"""`events.csv`: labelled events in recordings."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

EVENTS = "events.csv"


@dataclass(frozen=True)
class Event:
    """A labelled stretch of a recording."""

    kind: str
    start: int  # sample
    stop: int  # sample
    channels: tuple[str, ...]


def write_events(path: Path, events: Iterable[tuple[str, Event]]) -> None:
    """Write events with the file names of their recordings, in the given order."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("recording", "event", "start", "stop", "channels"))
        for recording, event in events:
            channels = " ".join(event.channels)
            writer.writerow((recording, event.kind, event.start, event.stop, channels))
