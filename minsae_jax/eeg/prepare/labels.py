"""labels.csv: labels of recordings and patients, from BIDS or a table of the user."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minsae_jax.eeg.prepare.bids import bids_patient, bids_root, read_table
from minsae_jax.eeg.prepare.config import PrepareConfig
from minsae_jax.eeg.prepare.errors import BadRecordingError
from minsae_jax.eeg.prepare.sources import Source
from minsae_jax.errors import UserError, brief

KEY_COLUMNS = ("recording", "patient", "participant_id")
PARTICIPANTS = "participants.tsv"

Labels = dict[str, str]  # name -> value, as text


@dataclass(frozen=True)
class LabelTable:
    """Labels of the recordings."""

    rows: tuple[Labels, ...]  # of each recording that has labels: recording, patient, all labels
    without: tuple[str, ...]  # recordings that a table has no row for


def read_labels(config: PrepareConfig, sources: Sequence[Source]) -> LabelTable:
    """Return the labels of recordings from --labels, or else from BIDS's participants.tsv.

    Raises UserError if a table is invalid.
    """
    if config.labels:
        if not Path(config.labels).exists():
            raise UserError(f"--labels {config.labels} does not exist")
        in_table = sources
        rows = _rows_of_table(Path(config.labels), sources)
        if not rows:
            named = f"{sources[0].short_path}, its patient is {sources[0].patient}"
            raise UserError(
                f"--labels {config.labels} has no row for any of the recordings; the first is "
                f"{named}; with --patient_pattern the patient can be a part of the name"
            )
    else:
        in_table = [source for source in sources if _participants(source) is not None]
        rows = _rows_of_bids(in_table)
    columns = dict.fromkeys(name for row in rows.values() for name in row)  # an ordered set
    labels = []
    for source in sources:
        if source.name in rows:
            patient = source.name.split("_")[0]
            values = {name: rows[source.name].get(name, "") for name in columns}
            labels.append({"recording": source.name, "patient": patient} | values)
    without = tuple(source.name for source in in_table if source.name not in rows)
    return LabelTable(tuple(labels), without)


def _rows_of_table(path: Path, sources: Sequence[Source]) -> dict[str, Labels]:
    """Return the row of each recording, or else of its patient."""
    of_key = _read(path, KEY_COLUMNS)
    rows = {}
    for source in sources:
        stem = source.short_path.removesuffix("".join(source.path.suffixes))
        for key in (source.name, source.short_path, stem, source.patient):
            if _without_sub(key) in of_key:
                rows[source.name] = of_key[_without_sub(key)]
                break
    return rows


def _rows_of_bids(sources: Sequence[Source]) -> dict[str, Labels]:
    """Return the row of each recording in the participants.tsv of its dataset."""
    tables: dict[Path, dict[str, Labels]] = {}
    rows = {}
    for source in sources:
        path = _participants(source)
        patient = bids_patient(source.path)
        assert path is not None
        assert patient is not None
        if path not in tables:
            tables[path] = _read(path, ("participant_id",))
        if patient in tables[path]:
            rows[source.name] = tables[path][patient]
    return rows


def _participants(source: Source) -> Path | None:
    """Return the participants.tsv for a BIDS recording; None for others and without one."""
    root = bids_root(source.path)
    if root is None or bids_patient(source.path) is None:
        return None
    path = root / PARTICIPANTS
    return path if path.is_file() else None


def _read(path: Path, key_columns: Sequence[str]) -> dict[str, Labels]:
    """Return the labels in each row of a table, by its value in the first of the key columns."""
    try:
        rows = read_table(path, ())
    except BadRecordingError as e:
        raise UserError(f"{path} {e}") from None
    if not rows:
        raise UserError(f"{path} has no rows")
    columns = list(rows[0])
    present = [name for name in key_columns if name in columns]
    if not present:
        advice = ""
        if len(columns) == 1:
            advice = "; columns are separated by commas in .csv and by tabs in .tsv files"
        raise UserError(
            f"{path} requires a column {' or '.join(key_columns)}, got "
            f"{brief(', '.join(columns))}{advice}"
        )
    labels: dict[str, Labels] = {}
    for row in rows:
        key = _without_sub(row[present[0]])
        if not key or key in labels:
            raise UserError(f"{path} must have different values of {present[0]}, got {key!r}")
        # The output has its own columns of keys: its patients may be hashes.
        labels[key] = {name: value for name, value in row.items() if name not in KEY_COLUMNS}
    return labels


def _without_sub(key: str) -> str:
    """Return a key without BIDS's prefix: tables have sub-01 or 01 for the patient 01."""
    return key.removeprefix("sub-")
