"""labels.csv: labels of recordings and patients, from BIDS or a table of the user."""

from collections.abc import Sequence
from pathlib import Path

from minsae_jax.eeg.prepare.config import PrepareConfig
from minsae_jax.eeg.prepare.read import BadRecordingError, read_table
from minsae_jax.eeg.prepare.sources import Source, is_bids
from minsae_jax.errors import UserError

KEY_COLUMNS = ("recording", "patient", "participant_id")
PARTICIPANTS = "participants.tsv"


def read_labels(config: PrepareConfig, sources: Sequence[Source]) -> list[dict[str, str]]:
    """Return a row for each recording that has labels: recording, patient, and all labels.

    Rows of recordings take precedence over those of their patients. Raises UserError if a table is
    invalid.
    """
    tables = [Path(source) / PARTICIPANTS for source in config.source if is_bids(Path(source))]
    tables = [path for path in tables if path.is_file()]
    if config.labels:
        tables = [Path(config.labels)]
    of_key: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}  # an ordered set
    for path in tables:
        rows = _read(path)
        key_column = _key_column(path, rows)
        for row in rows:
            key = row[key_column]
            # They are those of the output, whose patients may be hashes.
            row = {name: value for name, value in row.items() if name not in KEY_COLUMNS}
            # participants.tsv has sub-01 for the patient 01.
            of_key.setdefault(key.removeprefix("sub-"), row)
            columns |= dict.fromkeys(row)
    labels = []
    for source in sources:
        file_name = source.path.name
        keys = (source.name, file_name, file_name.split(".")[0], source.patient)
        matching = [of_key[key] for key in keys if key in of_key]
        if matching:
            row = matching[0]
            patient = source.name.split("_")[0]
            values = {name: _text(row.get(name, "")) for name in columns}
            labels.append({"recording": source.name, "patient": patient} | values)
    if config.labels and not labels:
        raise UserError(f"--labels {config.labels} has no row for any of the recordings")
    return labels


def _key_column(path: Path, rows: Sequence[dict[str, str]]) -> str:
    """Return the column that identifies rows. Raises UserError if none does."""
    columns = list(rows[0]) if rows else []
    for name in KEY_COLUMNS:
        if name in columns:
            _check_different(path, name, rows)
            return name
    raise UserError(f"{path} must have rows and a column patient, participant_id or recording")


def _check_different(path: Path, column: str, rows: Sequence[dict[str, str]]) -> None:
    seen = set()
    for row in rows:
        key = row[column]
        if not key or key in seen:
            raise UserError(f"{path} must have different values of {column}, got {key!r}")
        seen.add(key)


def _read(path: Path) -> list[dict[str, str]]:
    try:
        return read_table(path, ())
    except BadRecordingError as e:
        raise UserError(f"{path} {e}") from None


def _text(value: str) -> str:
    return "" if value == "n/a" else value
