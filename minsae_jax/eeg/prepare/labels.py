"""labels.csv: labels of recordings and patients, from BIDS or a table of the user."""

from collections.abc import Sequence
from pathlib import Path

from minsae_jax.eeg.prepare.bids import bids_patient, bids_root, read_table
from minsae_jax.eeg.prepare.config import PrepareConfig
from minsae_jax.eeg.prepare.errors import BadRecordingError
from minsae_jax.eeg.prepare.sources import Source
from minsae_jax.errors import UserError, brief

KEY_COLUMNS = ("recording", "patient", "participant_id")
PARTICIPANTS = "participants.tsv"

Labels = dict[str, str]  # name -> value, as text


def read_labels(config: PrepareConfig, sources: Sequence[Source]) -> list[Labels]:
    """Return a row for each recording that has labels: recording, patient, and all labels.

    Raises UserError if a table is invalid.
    """
    if config.labels:
        if not Path(config.labels).exists():
            raise UserError(f"--labels {config.labels} does not exist")
        rows = _rows_of_table(Path(config.labels), sources)
        if not rows:
            named = f"{sources[0].short_path}, its patient is {sources[0].patient}"
            raise UserError(
                f"--labels {config.labels} has no row for any of the recordings; the first is "
                f"{named}; with --patient_pattern the patient can be a part of the name"
            )
    else:
        rows = _rows_of_bids(sources)
    columns = dict.fromkeys(name for row in rows.values() for name in row)  # an ordered set
    labels = []
    for source in sources:
        if source.name in rows:
            patient = source.name.split("_")[0]
            values = {name: rows[source.name].get(name, "") for name in columns}
            labels.append({"recording": source.name, "patient": patient} | values)
    return labels


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
    """Return the row of each BIDS recording in the participants.tsv of its dataset."""
    tables: dict[Path, dict[str, Labels]] = {}
    rows = {}
    for source in sources:
        root = bids_root(source.path)
        patient = bids_patient(source.path)
        if root is None or patient is None or not (root / PARTICIPANTS).is_file():
            continue
        if root not in tables:
            tables[root] = _read(root / PARTICIPANTS, ("participant_id",))
        if patient in tables[root]:
            rows[source.name] = tables[root][patient]
    return rows


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
