"""Recordings in the layout of the preprocessed TUH corpus, and windows cut from them.

Each recording is a file `<patient>_s<session>_t<token>_preprocessed.npy` of [time, channels]; a 1-D
file has one channel. `file_lengths_map.csv` lists the lengths in samples, and `dataset.json`
describes channels, sampling rate and unit; without it they are 19 channels in SD at 100 Hz.
Files, patient splits and windows follow gPatchTST's data set: equal seeds give equal windows.
"""

import csv
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from minsae_jax.eeg.splits import (
    MIN_PATIENTS,
    Split,
    Splits,
    patient_of,
    patient_splits,
    splits_path,
)
from minsae_jax.errors import UserError, brief, join_some
from minsae_jax.files import HEADER_LOCK, regular_file
from minsae_jax.settings import shown

OnBadRecording = Literal["error", "skip"]

SAMPLING_RATE = 100  # Hz, of recordings without dataset.json
LENGTHS = "file_lengths_map.csv"
LABELS = "labels.csv"


class WindowShape(NamedTuple):
    """The samples of a window, [seq_len, n_vars], and those left out after it."""

    seq_len: int
    # The reference reserves this many samples after each window for a forecasting target, so a
    # file of n samples has n // (seq_len + reserved_samples) windows.
    reserved_samples: int
    n_vars: int


@dataclass(frozen=True)
class Windows:
    """All windows of some recordings in order: file by file, consecutive from each file's start."""

    folder: Path
    files: tuple[str, ...]
    lengths: tuple[int, ...]  # samples of each file
    seq_len: int  # samples per window
    reserved_samples: int
    n_vars: int
    stamps: Mapping[str, tuple[int, int]]  # file_stamp of each file when it was opened

    @cached_property
    def counts(self) -> np.ndarray:
        """Number of windows of each file."""
        counts = [length // (self.seq_len + self.reserved_samples) for length in self.lengths]
        return np.array(counts, np.int64)

    @cached_property
    def ends(self) -> np.ndarray:
        """Number of windows up to and including each file."""
        return np.cumsum(self.counts)

    @property
    def _starts(self) -> np.ndarray:
        return self.ends - self.counts

    def __len__(self) -> int:
        return int(self.counts.sum())

    def places(self, index: Int[np.ndarray, " windows"]) -> Int[np.ndarray, "windows 2"]:
        """Return the file index of each window and its number within the file."""
        # side="right" passes over files without windows, which end where the file before ends.
        file = np.searchsorted(self.ends, index, side="right")
        return np.stack([file, index - self._starts[file]], axis=1)

    def first(self, count: int) -> "Windows":
        """Return the first `count` windows."""
        n_files = int(np.searchsorted(self.ends, count)) + 1
        counts = np.minimum(self.counts[:n_files], count - self._starts[:n_files])
        # `counts` follows from the lengths, so the last file is shortened to its windows.
        lengths = tuple(int(n) * (self.seq_len + self.reserved_samples) for n in counts)
        return replace(self, files=self.files[:n_files], lengths=lengths)

    def without(self, names: Collection[str]) -> "Windows":
        """Return the windows of all other files."""
        lengths = dict(zip(self.files, self.lengths, strict=True))
        files = tuple(name for name in self.files if name not in names)
        return replace(self, files=files, lengths=tuple(lengths[name] for name in files))

    def read(self, start: int, stop: int) -> Float[np.ndarray, "windows seq_len n_vars"]:
        """Return windows start to stop, float32, in SD."""
        return self.read_at(np.arange(start, min(stop, len(self))))

    def read_at(
        self, index: Int[np.ndarray, " windows"]
    ) -> Float[np.ndarray, "windows seq_len n_vars"]:
        """Return any windows, float32, in SD. Raises UserError if a file has changed."""
        places = self.places(index)
        windows = np.empty((len(places), self.seq_len, self.n_vars), np.float32)
        for file in np.unique(places[:, 0]):
            path = self.folder / self.files[file]
            recording = load_recording(path)
            # The hash in the store's identity is of the samples at the start.
            if file_stamp(path) != self.stamps.get(path.name):
                raise UserError(f"recording {path.name} has changed since the start; rerun")
            for i in np.flatnonzero(places[:, 0] == file):
                start = places[i, 1] * self.seq_len
                windows[i] = recording[start : start + self.seq_len]
        return windows


def check_usable(bad: Mapping[str, str]) -> None:
    """Raise UserError if any recording is bad. bad: file name -> reason."""
    if bad:
        raise UserError(
            f"{list_bad(bad)}: repair or remove them, or skip them with --on_bad_recording skip"
        )


def list_bad(bad: Mapping[str, str], limit: int = 50) -> str:
    """Return the recordings of each reason as text. bad: file name -> reason.

    limit: reasons that are listed, and other recordings of each.

    >>> list_bad({"a.npy": "is too short", "b.npy": "contains NaN", "c.npy": "is too short"})
    'recording a.npy is too short (also c.npy); recording b.npy contains NaN'
    """
    names_of: dict[str, list[str]] = {}
    for name, reason in bad.items():
        names_of.setdefault(reason, []).append(name)
    clauses = []
    n_more = len(bad)
    for reason, names in list(names_of.items())[:limit]:
        clause = f"recording {names[0]} {reason}"
        if len(names) > 1:
            clause += f" (also {join_some(names[1:], limit=limit)})"
        clauses.append(clause)
        n_more -= len(names)
    if n_more:
        clauses.append(f"and {n_more} more")
    return "; ".join(clauses)


def open_windows(
    root_path: str | Path, split: Split, split_seed: int, seq_len: int, patch_len: int, n_vars: int
) -> Windows:
    """Return the windows of a split's patients, from headers alone: for use in notebooks.

    patch_len: samples left out after each window, which gPatchTST reserves for a patch.

    `windows.read(start, stop)` returns float32 [windows, seq_len, n_vars] for an encoder. Raises
    UserError listing all unusable recordings; NaN is only detected by `scan.open_recordings`.
    """
    shape = WindowShape(seq_len, patch_len, n_vars)
    windows, bad = find_windows(root_path, split, split_seed, shape)
    check_usable(bad)
    return windows


def find_windows(
    root_path: str | Path, split: Split, split_seed: int, shape: WindowShape
) -> tuple[Windows, dict[str, str]]:
    """Return the windows of a split's patients, and unusable recordings with the reason for each.

    Only file names, headers and the CSV are read. `all` is train, val and test in this order.
    Raises UserError if the folder, the CSV or the split is missing or invalid.
    """
    root = Path(root_path)
    folder = recordings_folder(root)
    names = sorted(path.name for path in folder.iterdir() if path.suffix == ".npy")
    if not names:
        raise UserError(f"there are no recordings (.npy) in {folder}")
    _warn_of_names(folder, names, splits_path(root, split_seed))
    lengths = read_lengths(folder / LENGTHS)
    splits = patient_splits(root, names, split_seed)
    selected = list(splits) if split == "all" else [split]
    patients = [patient for name in selected for patient in splits[name]]
    if not patients:
        raise _no_patients(split, splits, folder, splits_path(root, split_seed))

    in_any_split = {patient for members in splits.values() for patient in members}
    others = in_any_split - set(patients)
    bad = {}
    for name in sorted(lengths.keys() - set(names)):
        # Files of other splits are not read, so they may be missing.
        if patient_of(name) not in others:
            bad[name] = f"is listed in {LENGTHS}, but there is no such file"

    files_of: dict[str, list[str]] = {}
    for name in names:
        files_of.setdefault(patient_of(name), []).append(name)
    files = [name for patient in patients for name in files_of.get(patient, [])]
    for name in files:
        problem = _problem(folder / name, lengths.get(name), shape.n_vars)
        if problem:
            bad[name] = problem

    good = tuple(name for name in files if name not in bad)
    windows = Windows(
        folder=folder,
        files=good,
        lengths=tuple(lengths[name] for name in good),
        seq_len=shape.seq_len,
        reserved_samples=shape.reserved_samples,
        n_vars=shape.n_vars,
        stamps={name: file_stamp(folder / name) for name in good},
    )
    if len(windows) == 0 and not bad:
        raise UserError(
            f"split {split} is empty: {len(patients)} patients with {len(files)} recordings in "
            f"{folder} have no window of {shape.seq_len} samples"
        )
    return windows, bad


def _warn_of_names(folder: Path, names: Sequence[str], path: Path) -> None:
    """Warn about names without `<patient>_`, or all with the same. path: of the pickle of splits.

    `prepare` writes no such names. The splits of a folder have the same text, which is shown once.
    """
    stems = {name: name.removesuffix(".npy").removesuffix("_preprocessed") for name in names}
    without = [name for name, stem in stems.items() if "_" not in stem]
    if without:
        warnings.warn(
            f"{len(without)} of {len(names)} recordings in {folder}, such as {without[0]}, have no "
            "patient before a `_`: each file counts as a patient, so that a person with several "
            "can be in both train and test; rename them to <patient>_<recording>.npy, also in "
            f"{LENGTHS}, and remove {path.name}",
            stacklevel=2,
        )
    elif len(names) > 1 and len({patient_of(name) for name in names}) == 1:
        warnings.warn(
            f"all {len(names)} recordings in {folder} are of one patient, {patient_of(names[0])}, "
            "since the patient is the part of a name before the first `_`; one patient cannot be "
            "split into train, val and test: if there are several, rename their recordings to "
            f"<patient>_<recording>.npy, also in {LENGTHS}",
            stacklevel=2,
        )


def _no_patients(split: Split, splits: Splits, folder: Path, path: Path) -> UserError:
    counts = ", ".join(f"{len(members)} {name}" for name, members in splits.items())
    advice = (
        f"add recordings: {MIN_PATIENTS} patients are enough for all three; or use --split all, "
        "which makes one store of all patients"
    )
    if path.exists():
        advice += f"; then remove {path.name} to draw a new split"
    return UserError(f"split {split} has no patients in {folder} ({counts}); {advice}")


def recordings_folder(root: Path) -> Path:
    """Return the folder of file_lengths_map.csv: `root` itself or its tuhab_preprocessed."""
    for folder in (root, root / "tuhab_preprocessed"):
        if (folder / LENGTHS).is_file():
            return folder
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}; --root_path must contain recordings and {LENGTHS}"
        )
    raise UserError(
        f"there is no {LENGTHS} in {root}, which must list the recordings and their lengths; "
        "`minsae prepare` makes recordings and this file from EEG files"
    )


def read_lengths(path: Path) -> dict[str, int]:
    """Return file name -> length in samples, from a CSV with columns filename and time_len."""
    try:
        # Spreadsheets write a byte order mark, which plain UTF-8 would add to a column's name.
        with regular_file(path).open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or []
            missing = [column for column in ("filename", "time_len") if column not in columns]
            if missing:
                raise UserError(
                    f"{path} lacks the column {' and '.join(missing)}; it has "
                    f"{brief(', '.join(columns))}"
                )
            lengths = {}
            for row in rows:
                lengths[row["filename"]] = _parse_length(row["time_len"], path, rows.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path} cannot be read as CSV: {brief(e)}") from None
    if None in lengths or "" in lengths:
        raise UserError(f"{path} has a row without a filename")
    return lengths


def _parse_length(text: str | None, path: Path, line: int) -> int:
    try:
        value = float(text or "")
        # From 2^53 on, float64 skips whole numbers.
        if 0 <= value < 2**53 and value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise UserError(
        f"{path}, line {line}: time_len must be a number of samples, but is {shown(text)}"
    )


def file_stamp(path: Path) -> tuple[int, int]:
    """Return size and modification time, to detect changes."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def load_recording(path: Path) -> np.ndarray:
    """Return a recording [time, channels] as a memory map."""
    with HEADER_LOCK:
        mapped = np.load(regular_file(path), mmap_mode="r", allow_pickle=False)
    if not isinstance(mapped, np.ndarray):
        raise ValueError("it is an archive of arrays")
    # Slices of np.memmap are slow to make, those of an ndarray are not.
    array = mapped.view(np.ndarray)
    if array.ndim == 1:
        array = array[:, None]
    return array


def _problem(path: Path, length: int | None, n_vars: int) -> str | None:
    """Return why a recording is unusable, from its header, its size and its length in the CSV."""
    if length is None:
        return f"cannot be used: {LENGTHS} has no row for it"
    try:
        array = load_recording(path)
    except Exception as e:  # NumPy raises many types on damaged files
        return f"cannot be read ({brief(e) or type(e).__name__})"
    if array.ndim != 2 or array.dtype.kind != "f":
        return f"must be floating-point [time, channels], but is {array.dtype}{list(array.shape)}"
    if array.shape[1] != n_vars:
        return f"has {array.shape[1]} channels, but the encoder expects {n_vars}"
    if len(array) != length:
        return f"has {len(array)} samples, but {LENGTHS} says {length}"
    return None
