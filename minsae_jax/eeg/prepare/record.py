"""Records of prepared recordings, in the folder `.prepare`.

A record contains everything the folder's tables need, so that a rerun skips finished recordings.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minsae_jax.eeg.description import RecordingDescription
from minsae_jax.eeg.events import Event
from minsae_jax.eeg.prepare.plan import Plan
from minsae_jax.eeg.prepare.sources import Source, files_of
from minsae_jax.files import atomic_write, regular_file
from minsae_jax.settings import JsonObject

RECORDS = ".prepare"


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
    sha256: str  # of the recording's file


@dataclass(frozen=True)
class Rejected:
    """A recording that is left out. is_bad: it is an error unless bad recordings are skipped."""

    source: Source
    reason: str
    is_bad: bool = True


def read_record(source: Source, plan: Plan, folder: Path) -> Record | None:
    """Return the record of a recording that is complete and up to date, or None."""
    path = record_path(folder, source.name)
    try:
        content = json.loads(regular_file(path).read_text(encoding="utf-8"))
        size = (folder / source.name).stat().st_size
        is_current = content["key"] == plan.key and content["stamp"] == stamp_of(source)
        if not is_current or content["size"] != size:
            return None
        record = _parse_record(content["record"])
        # It depends on the other files, which may be new.
        return replace(record, description=replace(record.description, source=source.label))
    # A damaged record is written again.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _parse_record(values: Mapping[str, Any]) -> Record:
    nested = {
        "description": RecordingDescription(**_with_tuples(values["description"])),
        "events": tuple(Event(**_with_tuples(event)) for event in values["events"]),
    }
    return Record(**_with_tuples(values) | nested)


def record_path(folder: Path, name: str) -> Path:
    """Return the path of a recording's record."""
    return folder / RECORDS / f"{name}.json"


def stamp_of(source: Source) -> str:
    """Return a hash of paths, sizes and modification times of all files of a source.

    Names are not enough: a new file can change the numbers of others in its patient's folders.
    """
    stamps = []
    for path in (*files_of(source.path), *source.notes):
        status = path.stat()
        stamps.append([os.path.abspath(path), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def _with_tuples(values: Mapping[str, Any]) -> JsonObject:
    """Return values with tuples instead of lists, since JSON has lists only."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def write_record(folder: Path, record: Record, key: str, stamp: str, size: int) -> None:
    """Write a record. key, stamp, size: of the plan, the source, and the recording in bytes."""
    content = {"key": key, "stamp": stamp, "size": size, "record": dataclasses.asdict(record)}
    with atomic_write(record_path(folder, record.name)) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
