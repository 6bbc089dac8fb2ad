"""Recordings in the layout of the preprocessed TUH corpus, its patient splits, and windows cut from them.

One `<patient>_s<session>_t<token>_preprocessed.npy` a recording: [time, channels] at 100 Hz, in SD; a 1-D file is one
channel. `file_lengths_map.csv` gives their lengths in samples, `tuh_patient_splits_seed_{seed}.pkl` who is in which
split. Files, splits and windows follow gPatchTST's data set, so that the same seed gives the same windows.
"""

import csv
import hashlib
import os
import pickle
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float

from minsae_jax.config import Split, UserError
from minsae_jax.files import written_aside
from minsae_jax.monitor import progress

TRAIN_SHARE, TEST_SHARE = 0.7, 0.2
Splits = dict[str, list[str]]


@dataclass(frozen=True)
class Windows:
    """All windows of a list of recordings, in order: file by file, back to back from each file's start."""

    folder: Path
    files: tuple[str, ...]
    lengths: tuple[int, ...]  # of each file, in samples, as the CSV says
    seq_len: int  # samples a window
    patch_len: int  # the reference leaves so many samples after a window for a target, and so counts fewer windows
    n_vars: int

    @cached_property
    def counts(self) -> np.ndarray:
        """Windows of each file."""
        return np.array([length // (self.seq_len + self.patch_len) for length in self.lengths], np.int64)

    @cached_property
    def ends(self) -> np.ndarray:
        """Windows up to and including each file."""
        return np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.files) else 0

    def places(self, start: int, stop: int) -> np.ndarray:
        """File index and window number within the file of windows start to stop: [windows, 2]."""
        index = np.arange(start, min(stop, len(self)))
        file = np.searchsorted(self.ends, index, side="right")
        return np.stack([file, index - (self.ends[file] - self.counts[file])], axis=1)

    def first(self, count: int) -> "Windows":
        """The same, ended after `count` windows."""
        files = int(np.searchsorted(self.ends, count)) + 1
        kept = np.minimum(self.counts[:files], count - (self.ends[:files] - self.counts[:files]))
        lengths = tuple(int(n) * (self.seq_len + self.patch_len) for n in kept)
        return replace(self, files=self.files[:files], lengths=lengths)

    def read(self, start: int, stop: int) -> Float[np.ndarray, "windows seq_len n_vars"]:
        """Windows start to stop, float32, in SD."""
        places = self.places(start, stop)
        out = np.empty((len(places), self.seq_len, self.n_vars), np.float32)
        for file in np.unique(places[:, 0]):
            rows = np.flatnonzero(places[:, 0] == file)
            first, last = places[rows[0], 1], places[rows[-1], 1]
            samples = load_recording(self.folder / self.files[file])[first * self.seq_len : (last + 1) * self.seq_len]
            out[rows] = samples.reshape(len(rows), self.seq_len, self.n_vars)
        return out

    def survey(self) -> "Survey":
        """Look at every sample of all windows once. Raises UserError naming the recordings with NaN or infinity."""
        digest, shifted, bad = hashlib.sha256(), [], []
        with (
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
            progress("check recordings", len(self.files), "recordings", delay=2.0) as bar,
        ):
            looks = pool.map(self._look, range(len(self.files)))
            for name, (sha256, is_shifted, not_finite) in zip(self.files, looks, strict=True):
                bar.advance(1)
                digest.update(f"{name} {sha256}".encode())
                shifted.append(is_shifted)
                if not_finite is not None:
                    bad.append(f"recording {name} holds NaN or infinity at sample {not_finite}")
        if bad:
            raise UserError(f"{_some(bad, '; ')}: repair or remove it")
        return Survey(digest.hexdigest(), np.array(shifted, bool))

    def _look(self, file: int) -> tuple[str, bool, int | None]:
        """sha256 of a file's windows, whether its last channel is all zero, and its first sample that is not finite."""
        digest, zero = hashlib.sha256(), self.n_vars > 1
        samples = load_recording(self.folder / self.files[file])[: int(self.counts[file]) * self.seq_len]
        for start in range(0, len(samples), 100_000):
            with np.errstate(over="ignore"):
                block = np.ascontiguousarray(samples[start : start + 100_000], np.float32)
            finite = np.isfinite(block).all(1)
            if not finite.all():
                return "", False, start + int(np.flatnonzero(~finite)[0])
            digest.update(block.data)
            zero = zero and not block[:, -1].any()
        return digest.hexdigest(), zero and len(samples) > 0, None


@dataclass(frozen=True)
class Survey:
    """What a look at all samples tells."""

    sha256: str  # over all windows
    # Files whose last channel is all zero: missing electrodes were packed to the end, so that columns no longer stand
    # for the channels of their names. [files] bool
    shifted: np.ndarray


def open_windows(
    root_path: str | Path, split: Split, split_seed: int, seq_len: int, patch_len: int, n_vars: int
) -> Windows:
    """The windows of a split's patients. Everything but the samples' values is checked here, before any work.

    `all` is train, val and test, one after the other. Raises UserError on a folder, CSV, split or recording that is
    not as it should be.
    """
    root = Path(root_path)
    folder = recordings_folder(root)
    names = sorted(f.name for f in folder.iterdir() if f.suffix == ".npy")
    if not names:
        raise UserError(f"there are no recordings (.npy) in {folder}")
    lengths = read_lengths(folder / "file_lengths_map.csv")
    splits = patient_splits(root, names, split_seed)
    patients = splits["train"] + splits["val"] + splits["test"] if split == "all" else splits[split]
    files_of: dict[str, list[str]] = {}
    for name in names:
        files_of.setdefault(patient_of(name), []).append(name)
    files = [name for patient in patients for name in files_of.get(patient, [])]
    missing = [name for name in files if name not in lengths]
    if missing:
        raise UserError(f"{folder / 'file_lengths_map.csv'} has no row for {_some(missing)}")
    windows = Windows(folder, tuple(files), tuple(lengths[f] for f in files), seq_len, patch_len, n_vars)
    if len(windows) == 0:
        raise UserError(
            f"split {split} is empty: {len(patients)} patients with {len(files)} recordings in {folder} "
            f"make no window of {seq_len} samples"
        )
    problems = [
        p for f, n in zip(files, windows.counts, strict=True) if (p := _problem(folder / f, int(n) * seq_len, n_vars))
    ]
    if problems:
        raise UserError(_some(problems, "; "))
    return windows


def recordings_folder(root: Path) -> Path:
    """The folder with file_lengths_map.csv: root itself, or its tuhab_preprocessed."""
    for folder in (root, root / "tuhab_preprocessed"):
        if (folder / "file_lengths_map.csv").is_file():
            return folder
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: --root_path must hold recordings and file_lengths_map.csv")
    raise UserError(f"there is no file_lengths_map.csv in {root}, which must list the recordings and their lengths")


def read_lengths(path: Path) -> dict[str, int]:
    """File name to length in samples, from a CSV with the columns filename and time_len."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            rows = csv.DictReader(f)
            columns = rows.fieldnames or []
            missing = [c for c in ("filename", "time_len") if c not in columns]
            if missing:
                raise UserError(f"{path} lacks the column {' and '.join(missing)}; it has {', '.join(columns)}")
            return {row["filename"]: _length(row["time_len"], path, rows.line_num) for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path} cannot be read as CSV: {e}") from None


def _length(text: str | None, path: Path, line: int) -> int:
    try:
        value = float(text or "")
        if 0 <= value < 2**53 and value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise UserError(f"{path}, line {line}: time_len must be a number of samples, but is {text!r}")


def patient_of(name: str) -> str:
    return name.split("_", 1)[0]


def patient_splits(root: Path, names: list[str], seed: int) -> Splits:
    """Patients of train, val and test: those in the root's pickle, or the reference's shuffle of all, which is then
    written there where the folder can be written to."""
    path = root / f"tuh_patient_splits_seed_{seed}.pkl"
    if path.exists():
        splits = read_splits(path)
        everyone = [patient for patients in splits.values() for patient in patients]
        known = set(everyone)
        if len(everyone) > len(known):
            twice = sorted(p for p in known if everyone.count(p) > 1)
            warnings.warn(f"{_some(twice)} stands in {path.name} more than once: splits overlap", stacklevel=2)
        new = sorted({patient_of(n) for n in names} - known)
        if new:
            warnings.warn(f"{_some(new)} of {root} is in no split of {path.name}, and left out", stacklevel=2)
        return splits
    patients = list(dict.fromkeys(patient_of(name) for name in names))
    random.Random(seed).shuffle(patients)
    train_end = int(len(patients) * TRAIN_SHARE)
    val_end = train_end + int(len(patients) * (1 - TRAIN_SHARE - TEST_SHARE))
    splits = {"train": patients[:train_end], "val": patients[train_end:val_end], "test": patients[val_end:]}
    if os.access(root, os.W_OK):
        with written_aside(path, shared=True) as aside:
            aside.write_bytes(pickle.dumps(splits))
    return splits


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, strings and numbers need no globals, so none is given out."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_splits(path: Path) -> Splits:
    """The pickle of the reference, opened without running anything in it."""
    try:
        with path.open("rb") as f:
            splits = _PlainUnpickler(f).load()
    except Exception as e:
        raise UserError(f"{path} is no pickle of plain lists of patients ({e}): remove it to split anew") from e
    if not isinstance(splits, dict) or not all(
        isinstance(splits.get(k), list) and all(isinstance(p, str) for p in splits[k]) for k in ("train", "val", "test")
    ):
        raise UserError(f"{path} must hold a dict of three lists of patients, train, val and test")
    return {k: splits[k] for k in ("train", "val", "test")}


def load_recording(path: Path) -> np.ndarray:
    """A recording [time, channels], mapped, not read."""
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(mapped, np.ndarray):
        raise ValueError("it is an archive of arrays")
    array = mapped.view(np.ndarray)
    return array[:, None] if array.ndim == 1 else array


def _problem(path: Path, samples: int, n_vars: int) -> str | None:
    """Why a recording cannot be used, from its header and size alone."""
    try:
        array = load_recording(path)
    except Exception as e:
        return f"recording {path} cannot be read ({' '.join(str(e).split()) or type(e).__name__})"
    if array.ndim != 2 or array.dtype.kind != "f":
        return f"recording {path} must be floating-point [time, channels], but is {array.dtype}{list(array.shape)}"
    if array.shape[1] != n_vars:
        return f"recording {path} has {array.shape[1]} channels, but the encoder wants {n_vars}"
    if len(array) < samples:
        return f"recording {path} has {len(array)} samples, but file_lengths_map.csv promises windows up to {samples}"
    return None


def _some(items: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - 5} more" if len(items) > 5 else ""
    return separator.join(items[:5]) + more
