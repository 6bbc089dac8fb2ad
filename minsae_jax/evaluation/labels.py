"""`labels.csv`: labels of recordings and patients, such as age, sex, pathology or medication.

The file is in the folder of the recordings. (Names of features are in another file,
`report/labels.csv` of a run.) A row applies to the recording in its column `recording`, or else to
all recordings of the patient in its column `patient`; rows of recordings take precedence. Every
other column is a label: a number if all its values are numbers other than 0 and 1, else a category.
"""

import csv
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from minsae_jax.eeg.recordings import LABELS, LENGTHS, read_lengths
from minsae_jax.eeg.splits import patient_of
from minsae_jax.errors import UserError, brief, join_some

MISSING = ("", "n/a", "na", "nan")  # in lower case
KEYS = ("recording", "patient")
ENDINGS = ("_preprocessed.npy", ".npy")
BOOLEANS = ({"0", "1"}, {"false", "true"}, {"no", "yes"}, {"n", "y"}, {"f", "t"})


@dataclass(frozen=True)
class PatientLabel:
    """One label of patients; those without a value are left out."""

    name: str
    patients: tuple[str, ...]
    # The value of a number, else an index into `categories`
    values: Float[np.ndarray, " patients"]
    # Sorted; empty for a number
    categories: tuple[str, ...]
    # Patients left out because their recordings belong to several categories
    n_ambiguous: int = 0

    @property
    def is_number(self) -> bool:
        return not self.categories

    @property
    def category(self) -> Int[np.ndarray, " patients"]:
        """Index into `categories` of every patient."""
        return self.values.astype(np.int64)

    def describe(self, limit: int) -> str:
        """Return the range of a number, or the patients of each of the first `limit` categories.

        Such as "21 to 83, median 52" or "female 9, male 7".
        """
        if len(self.values) == 0:
            return "none"
        if self.is_number:
            low, middle, high = np.quantile(self.values, [0, 0.5, 1])
            return f"{low:g} to {high:g}, median {middle:g}"
        counts = np.bincount(self.category, minlength=len(self.categories))
        texts = [f"{name} {n}" for name, n in zip(self.categories, counts, strict=True)]
        return join_some(texts, limit=limit)

    def select(self, is_selected: Bool[np.ndarray, " patients"]) -> "PatientLabel":
        """Return the label of some of the patients."""
        patients = tuple(self.patients[i] for i in np.flatnonzero(is_selected))
        return replace(self, patients=patients, values=self.values[is_selected])

    def only(self, categories: Sequence[str]) -> "PatientLabel":
        """Return the label of the patients of some categories; a number stays as it is."""
        if self.is_number:
            return self
        is_kept = np.array([name in categories for name in self.categories], bool)
        selected = self.select(is_kept[self.category])
        new_index = np.cumsum(is_kept) - 1
        values = new_index[selected.category].astype(np.float64)
        return replace(selected, categories=tuple(categories), values=values)


def read_labels(folder: Path, recordings: Sequence[str]) -> tuple[PatientLabel, ...]:
    """Return the labels of the patients of some recordings, from labels.csv in their folder.

    folder: of the recordings and their file_lengths_map.csv. A patient's number is the mean over
    its recordings. There are no labels if there is no such file. Warns of values that look like
    mistakes. Raises UserError if the file is invalid, or has no row for any recording in the
    folder.
    """
    path = folder / LABELS
    if not path.is_file():
        return ()
    rows = _read_rows(path)
    names = list(read_lengths(folder / LENGTHS))
    if not names:
        raise UserError(f"{folder / LENGTHS} lists no recordings")
    if not any(_row_of(rows, name) for name in names):
        raise UserError(
            f"{path} has no row for any recording in its folder; recordings are named like "
            f"{names[0]}, and patients like {patient_of(names[0])}"
        )
    columns = [column for column in next(iter(rows.values())) if column not in KEYS]
    for column in columns:
        _warn_of_mistakes(path, column, _values(column, rows))
    return tuple(_patient_label(column, rows, recordings) for column in columns)


def _values(column: str, rows: Mapping[tuple[str, str], dict[str, str]]) -> set[str]:
    """Return the distinct values of a column without the missing ones."""
    texts = {row[column] for row in rows.values()}
    return {text for text in texts if text.lower() not in MISSING}


def _warn_of_mistakes(path: Path, column: str, texts: set[str]) -> None:
    """Warn of a few values that make numbers categories, and of "Control" beside "control"."""
    words = sorted(text for text in texts if not _is_number(text))
    if 0 < 3 * len(words) < len(texts):
        warnings.warn(
            f"{path}: {column} is read as categories and not as a number, because of "
            f"{join_some(list(map(repr, words)))}; leave a cell empty if the value is missing",
            stacklevel=3,
        )
    spellings: dict[str, list[str]] = {}
    for text in words:
        spellings.setdefault(text.lower(), []).append(text)
    for same in spellings.values():
        if len(same) > 1 and not _are_booleans(texts):
            warnings.warn(
                f"{path}: {column} has categories that differ in upper and lower case only, and "
                f"are not the same: {join_some(list(map(repr, same)))}",
                stacklevel=3,
            )


def _read_rows(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Return rows by key: column "recording" or "patient", and its value."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path} cannot be read as CSV: {brief(e)}") from None
    if not any(key in columns for key in KEYS):
        raise UserError(
            f"{path} requires a column recording or patient, got "
            f"{brief(', '.join(columns)) or 'none'}"
        )
    if len(set(columns)) < len(columns) or "" in columns:
        raise UserError(f"{path} must have a different name for every column")
    if not set(columns) - set(KEYS):
        raise UserError(f"{path} has no column of labels besides {brief(' and '.join(columns))}")
    by_key: dict[tuple[str, str], dict[str, str]] = {}
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise UserError(f"{path}, row {line}: expected {len(columns)} values")
        key = _key(row)
        if not key[1]:
            raise UserError(f"{path}, row {line} has neither a recording nor a patient")
        if key in by_key:
            raise UserError(f"{path}, row {line}: a second row for the {key[0]} {brief(key[1])}")
        by_key[key] = {column: value.strip() for column, value in row.items()}
    if not by_key:
        raise UserError(f"{path} has no rows")
    return by_key


def _key(row: Mapping[str, str]) -> tuple[str, str]:
    recording = row.get("recording", "").strip()
    if recording:
        return "recording", _stem(recording)
    return "patient", row.get("patient", "").strip()


def _stem(recording: str) -> str:
    for ending in ENDINGS:
        recording = recording.removesuffix(ending)
    return recording


def _row_of(
    rows: Mapping[tuple[str, str], dict[str, str]], recording: str
) -> dict[str, str] | None:
    row = rows.get(("recording", _stem(recording)))
    return row or rows.get(("patient", patient_of(recording)))


def _patient_label(
    column: str, rows: Mapping[tuple[str, str], dict[str, str]], recordings: Sequence[str]
) -> PatientLabel:
    """Return a column as a label of the recordings' patients.

    Its type depends on all rows, so that it is the same for every set of recordings.
    """
    texts = _values(column, rows)
    by_patient: dict[str, list[str]] = {}
    for recording in recordings:
        row = _row_of(rows, recording)
        if row is not None and row[column] in texts:
            by_patient.setdefault(patient_of(recording), []).append(row[column])
    category_of = {text: text for text in texts}
    if texts and all(map(_is_number, texts)):
        if not {float(text) for text in texts} <= {0, 1}:
            means = [np.mean([float(text) for text in values]) for values in by_patient.values()]
            return PatientLabel(column, tuple(by_patient), np.array(means, np.float64), ())
        # 0 and 1 are categories: no and yes. pandas writes 1.0 into columns with empty cells.
        category_of = {text: str(int(float(text))) for text in texts}
    # "Yes" and "yes" are one category; other labels may tell cases apart.
    if _are_booleans(texts):
        category_of = {text: text.lower() for text in texts}
    categories = tuple(sorted(set(category_of.values())))
    index_of_patient = {}
    for patient, values in by_patient.items():
        of_recordings = {category_of[text] for text in values}
        # A patient whose recordings disagree, as after an operation, is in no category.
        if len(of_recordings) == 1:
            index_of_patient[patient] = categories.index(of_recordings.pop())
    indices = np.array(list(index_of_patient.values()), np.float64)
    n_ambiguous = len(by_patient) - len(index_of_patient)
    return PatientLabel(column, tuple(index_of_patient), indices, categories, n_ambiguous)


def _are_booleans(texts: set[str]) -> bool:
    in_lower_case = {text.lower() for text in texts}
    return any(pair.issuperset(in_lower_case) for pair in BOOLEANS)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
