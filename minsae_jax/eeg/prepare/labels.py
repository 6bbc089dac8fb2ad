"""labels.csv: labels of recordings and patients, from BIDS or a table of the user."""

from collections.abc import Sequence
from pathlib import Path

from minsae_jax.eeg.prepare.config import PrepareConfig
from minsae_jax.eeg.prepare.sources import Source, bids_patient, bids_root
from minsae_jax.eeg.prepare.tables import BadRecordingError, read_table
from minsae_jax.errors import UserError

KEY_COLUMNS = ("recording", "patient", "participant_id")
PARTICIPANTS = "participants.tsv"


def read_labels(config: PrepareConfig, sources: Sequence[Source]) -> list[dict[str, str]]:
    """Return a row for each recording that has labels: recording, patient, and all labels.

    Rows of recordings take precedence over those of their patients. Raises UserError if a table is
    invalid.
    """
    if config.labels:
        rows = _rows_of_table(Path(config.labels), sources)
        if not rows:
            raise UserError(f"--labels {config.labels} has no row for any of the recordings")
    else:
        rows = _rows_of_bids(sources)
    columns = dict.fromkeys(name for row in rows.values() for name in row)  # an ordered set
    labels = []
    for source in sources:
        if source.name in rows:
            patient = source.name.split("_")[0]
            values = {name: _text(rows[source.name].get(name, "")) for name in columns}
            labels.append({"recording": source.name, "patient": patient} | values)
    return labels


def _rows_of_table(path: Path, sources: Sequence[Source]) -> dict[str, dict[str, str]]:
    """Return the row of each recording in a table of recordings or patients."""
    of_key = _read(path, KEY_COLUMNS)
    rows = {}
    for source in sources:
        file_name = source.path.name
        keys = (source.name, file_name, file_name.split(".")[0], source.patient)
        matching = [of_key[_without_sub(key)] for key in keys if _without_sub(key) in of_key]
        if matching:
            rows[source.name] = matching[0]
    return rows


def _rows_of_bids(sources: Sequence[Source]) -> dict[str, dict[str, str]]:
    """Return the row of each BIDS recording in the participants.tsv of its dataset."""
    tables: dict[Path, dict[str, dict[str, str]]] = {}
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


def _read(path: Path, key_columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the labels in each row of a table, by its value in the first of the key columns."""
    try:
        rows = read_table(path, ())
    except BadRecordingError as e:
        raise UserError(f"{path} {e}") from None
    key_column = _key_column(path, rows, key_columns)
    # The columns of keys are those of the output, whose patients may be hashes.
    return {
        _without_sub(row[key_column]): {
            name: value for name, value in row.items() if name not in KEY_COLUMNS
        }
        for row in rows
    }


def _without_sub(key: str) -> str:
    """Return a key without BIDS's prefix: tables have sub-01 or 01 for the patient 01."""
    return key.removeprefix("sub-")


def _key_column(path: Path, rows: Sequence[dict[str, str]], key_columns: Sequence[str]) -> str:
    """Return the column that identifies rows. Raises UserError if none does."""
    columns = list(rows[0]) if rows else []
    for name in key_columns:
        if name in columns:
            _check_different(path, name, rows)
            return name
    raise UserError(f"{path} must have rows and a column {' or '.join(key_columns)}")


def _check_different(path: Path, column: str, rows: Sequence[dict[str, str]]) -> None:
    seen = set()
    for row in rows:
        key = row[column]
        if not key or key in seen:
            raise UserError(f"{path} must have different values of {column}, got {key!r}")
        seen.add(key)


def _text(value: str) -> str:
    return "" if value == "n/a" else value
