"""BIDS datasets: their folders, and their tables events.tsv and channels.tsv."""

import csv
import math
import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path

from minsae_jax.eeg.events import Annotation
from minsae_jax.eeg.montage import canonical
from minsae_jax.eeg.prepare.errors import BadRecordingError
from minsae_jax.errors import brief
from minsae_jax.files import regular_file

ROOT_FILE = "dataset_description.json"
BIDS = r"(?:^|[/\\])sub-(?P<patient>[^_/\\]+)(?:_ses-(?P<session>[^_/\\]+))?[^/\\]*$"
# Columns of events.tsv with the kind of an event; the first that is not empty is used. The second
# is that of SzCORE, a format for seizures in BIDS.
KIND_COLUMNS = ("trial_type", "eventType", "value")
CHANNEL_COLUMNS = ("channel", "channels")  # of BIDS, and of SzCORE


def is_bids(folder: Path) -> bool:
    """Return whether a folder is the root of a BIDS dataset."""
    return (folder / ROOT_FILE).is_file()


def bids_root(path: Path) -> Path | None:
    """Return the root of the BIDS dataset that a recording is in; None if it is in none."""
    root = _folders_up_to_root(path.parent)[-1]
    return root if is_bids(root) else None


def bids_patient(path: Path) -> str | None:
    """Return the patient in the name of a BIDS recording; None for other names."""
    match = re.search(BIDS, path.as_posix())
    return match["patient"] if match else None


def bids_sidecar(path: Path, what: str) -> Path | None:
    """Return the table, events or channels, that applies to a BIDS recording; None without one.

    By BIDS's inheritance principle, a table applies to all recordings in its folder and below whose
    names contain all parts of the table's name (`sub-01`, `task-rest`). The nearest folder takes
    precedence, and within a folder the table with the most parts.
    """
    stem, is_eeg, _ = path.name.rpartition("_eeg.")
    if not is_eeg:
        return None
    parts = set(stem.split("_"))
    for folder in _folders_up_to_root(path.parent):
        n_parts: dict[Path, int] = {}
        for table in _tables(folder, folder.stat().st_mtime_ns):
            *of_table, kind = table.stem.split("_")
            if kind == what and parts.issuperset(of_table) and table.is_file():
                n_parts[table] = len(of_table)
        if n_parts:
            return max(n_parts, key=n_parts.__getitem__)
    return None


# The root of a BIDS dataset has a folder for each of thousands of patients: it is not listed again
# for each recording. The time of its last change is an argument, so that a new file is seen.
@lru_cache(maxsize=16)
def _tables(folder: Path, modified_ns: int) -> list[Path]:
    """Return the tables in a folder."""
    return sorted(folder.glob("*.tsv"))


def _folders_up_to_root(folder: Path) -> list[Path]:
    """Return a folder and those above it up to the BIDS dataset's, or only itself without one."""
    folders = [folder, *folder.parents]
    for count, each in enumerate(folders, start=1):
        if is_bids(each):
            return folders[:count]
    return [folder]


def read_channels(path: Path) -> tuple[set[str], set[str]]:
    """Return the canonical names of channels marked as bad, and of those of other types than EEG.

    Channels without a type may be EEG. Raises BadRecordingError if channels.tsv is invalid.
    """
    bad = set()
    not_eeg = set()
    for row in read_table(path, ("name",)):
        name = canonical(row["name"])
        if row.get("status", "").lower() == "bad":
            bad.add(name)
        if row.get("type", "").upper() not in ("", "EEG"):
            not_eeg.add(name)
    return bad, not_eeg


def read_events(
    path: Path, in_file: Collection[str], default: tuple[Annotation, ...]
) -> tuple[Annotation, ...]:
    """Return the events of events.tsv, or the default if no column has their kinds.

    in_file: canonical names of the recording's channels. An event that names none of them, but
    `all` or a derivation, is one of all channels. Raises BadRecordingError if it is invalid.
    """
    rows = read_table(path, ("onset", "duration"))
    if rows and not any(column in rows[0] for column in KIND_COLUMNS):
        return default
    events = []
    for number, row in enumerate(rows, start=2):
        kinds = [row[column] for column in KIND_COLUMNS if row.get(column)]
        if not kinds:
            continue
        try:
            onset = float(row["onset"])
            duration = float(row["duration"] or 0)
            if not math.isfinite(onset) or not 0 <= duration < math.inf:
                raise ValueError
        except ValueError:
            raise BadRecordingError(
                f"has invalid events: {path.name}, line {number}, onset and duration must be "
                "seconds"
            ) from None
        names = [name for column in CHANNEL_COLUMNS for name in _split(row.get(column, ""))]
        channels = tuple(name for name in names if canonical(name) in in_file)
        events.append(Annotation(kinds[0], onset, duration, channels))
    return tuple(events)


def _split(cell: str) -> list[str]:
    """Return the names in a cell. Its separator is in events.json, if at all: | or , mostly.

    >>> _split("F,1|F,2|Cz"), _split("Fz, Cz")
    (['F,1', 'F,2', 'Cz'], ['Fz', ' Cz'])
    """
    for separator in "|;":
        if separator in cell:
            return cell.split(separator)
    return cell.split(",")


def read_table(path: Path, required: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a CSV or TSV file, with "" for BIDS's n/a.

    Raises BadRecordingError if it is invalid.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with regular_file(path).open(newline="", encoding="utf-8-sig") as file:
            # Otherwise a quotation mark that is never closed would take in all further lines.
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            rows = list(reader)
            columns = reader.fieldnames or []
    except csv.Error as e:
        raise BadRecordingError(
            f"has an invalid table: {path.name} ({brief(e)}; a field that starts with a quotation "
            "mark must end with one)"
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        raise BadRecordingError(f"has an invalid table: {path.name} ({brief(e)})") from None
    repeated = [name for name in columns if name and columns.count(name) > 1]
    if repeated:
        raise BadRecordingError(
            f"has an invalid table: {path.name} has the column {repeated[0]} twice"
        )
    missing = [name for name in required if name not in columns]
    if missing:
        raise BadRecordingError(
            f"has an invalid table: {path.name} lacks the column {' and '.join(missing)}"
        )
    for number, row in enumerate(rows, start=2):
        # DictReader marks fields that a line has too many or too few with None.
        if None in row or None in row.values():
            raise BadRecordingError(
                f"has an invalid table: {path.name}, line {number}, does not have "
                f"{len(columns)} fields"
            )
        row |= {column: "" for column, value in row.items() if value == "n/a"}
    return rows
