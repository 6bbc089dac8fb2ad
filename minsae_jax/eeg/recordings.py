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
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from minsae_jax.errors import UserError, brief
from minsae_jax.files import atomic_write
from minsae_jax.monitor import progress

Split = Literal["train", "val", "test", "all"]
OnBadRecording = Literal["error", "skip"]

LENGTHS = "file_lengths_map.csv"
TRAIN_SHARE, TEST_SHARE = 0.7, 0.2
Splits = dict[str, list[str]]
_one_header = Lock()  # Python 3.11 cannot parse in two threads at a time (SystemError), which is how numpy reads headers


@dataclass(frozen=True)
class Windows:
    """All windows of a list of recordings, in order: file by file, back to back from each file's start."""

    folder: Path
    files: tuple[str, ...]
    lengths: tuple[int, ...]  # of each file, in samples, as the CSV says
    seq_len: int  # samples a window
    patch_len: int  # the reference leaves so many samples after a window for a target, and so counts fewer windows
    n_vars: int
    stamps: Mapping[
        str, tuple[int, int]
    ]  # size and time of change of each file when it was first seen

    @cached_property
    def counts(self) -> np.ndarray:
        """Windows of each file."""
        return np.array(
            [length // (self.seq_len + self.patch_len) for length in self.lengths], np.int64
        )

    @cached_property
    def ends(self) -> np.ndarray:
        """Windows up to and including each file."""
        return np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.files) else 0

    def places(self, index: Int[np.ndarray, " windows"]) -> Int[np.ndarray, "windows 2"]:
        """File index and window number within the file."""
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
        return self.read_at(np.arange(start, min(stop, len(self))))

    def read_at(
        self, index: Int[np.ndarray, " windows"]
    ) -> Float[np.ndarray, "windows seq_len n_vars"]:
        """Any windows, float32, in SD."""
        places = self.places(index)
        out = np.empty((len(places), self.seq_len, self.n_vars), np.float32)
        for file in np.unique(places[:, 0]):
            recording = load_recording(self.folder / self.files[file])
            if stamp_of(self.folder / self.files[file]) != self.stamps.get(self.files[file]):
                raise UserError(
                    f"recording {self.files[file]} has changed since the start: give the same command again"
                )
            for i in np.flatnonzero(places[:, 0] == file):
                out[i] = recording[places[i, 1] * self.seq_len : (places[i, 1] + 1) * self.seq_len]
        return out

    def without(self, names: Collection[str]) -> "Windows":
        """The same without some files."""
        kept = [(f, n) for f, n in zip(self.files, self.lengths, strict=True) if f not in names]
        return replace(self, files=tuple(f for f, _ in kept), lengths=tuple(n for _, n in kept))

    def survey(self) -> dict[str, "Look"]:
        """Look at every sample of all windows once; file name to what was seen."""
        with (
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
            progress("check recordings", len(self.files), "recordings", delay=2.0) as bar,
        ):
            looks = {}
            for name, look in zip(
                self.files, pool.map(self._look, range(len(self.files))), strict=True
            ):
                bar.advance(1)
                looks[name] = look
        return looks

    def _look(self, file: int) -> "Look":
        digest, zero = hashlib.sha256(), self.n_vars > 1
        samples = load_recording(self.folder / self.files[file])[
            : int(self.counts[file]) * self.seq_len
        ]
        for start in range(0, len(samples), 100_000):
            with np.errstate(over="ignore"):
                block = np.ascontiguousarray(samples[start : start + 100_000], np.float32)
            finite = np.isfinite(block).all(1)
            if not finite.all():
                return Look("", False, start + int(np.flatnonzero(~finite)[0]))
            digest.update(block.data)
            zero = zero and not block[:, -1].any()
        return Look(digest.hexdigest(), zero and len(samples) > 0, None)


@dataclass(frozen=True)
class Look:
    """What a look at all samples of a file's windows tells."""

    sha256: str
    # The last channel is all zero: missing electrodes were packed to the end, so that columns no longer stand for the
    # channels of their names.
    shifted: bool
    not_finite: int | None  # the first sample that is NaN or infinite


@dataclass(frozen=True)
class Recordings:
    """Windows of which every sample has been looked at."""

    windows: Windows
    sha256: str  # over all windows
    shifted: np.ndarray  # [files] bool, see Look
    skipped: dict[str, str]  # files that were left out, and why


def open_recordings(
    root_path: str | Path, splits: Sequence[Split], split_seed: int, sizes: tuple[int, int, int],
    max_windows: int | None = None, on_bad_recording: OnBadRecording = "error",
) -> list[Recordings]:  # fmt: skip
    """The windows of each split's patients, of (seq_len, patch_len, n_vars).

    Raises UserError naming all recordings of all splits that cannot be used; with "skip" they are left out instead.
    """
    found = []
    for split in splits:
        windows, bad = find_windows(root_path, split, split_seed, *sizes)
        while True:
            wanted = windows.first(min(max_windows, len(windows))) if max_windows else windows
            looks = wanted.survey()
            new = {
                n: f"holds NaN or infinity at sample {k}"
                for n, look in looks.items()
                if (k := look.not_finite) is not None
            }
            bad |= new
            windows = windows.without(new)
            if not new or not max_windows or on_bad_recording == "error":
                break  # else others take the place of those that were left out
        found.append((wanted.without(new), looks, bad))
    if on_bad_recording == "error":
        refuse_bad({name: reason for _, _, bad in found for name, reason in bad.items()})
    recordings = []
    for split, (windows, looks, bad) in zip(splits, found, strict=True):
        if not len(windows):
            raise UserError(
                f"split {split} is empty: none of its recordings can be used ({_listed(bad)})"
            )
        digest = hashlib.sha256(
            "".join(f"{name} {looks[name].sha256}" for name in windows.files).encode()
        )
        shifted = np.array([looks[name].shifted for name in windows.files], bool)
        recordings.append(Recordings(windows, digest.hexdigest(), shifted, bad))
    return recordings


def warn_of(recordings: Recordings, split: Split) -> None:
    """Tell of recordings that were left out, and of those whose columns are shifted."""
    shifted = [f for f, s in zip(recordings.windows.files, recordings.shifted, strict=True) if s]
    if shifted:
        warnings.warn(
            f"last channel all zero in {_some(shifted, at_most=3)}: missing electrodes shifted the columns, so that "
            "channel names do not hold there; a store's provenance.npz marks these recordings",
            stacklevel=2,
        )
    if recordings.skipped:
        reasons = _some(
            [f"{name} {reason}" for name, reason in recordings.skipped.items()], at_most=3
        )
        warnings.warn(
            f"left out of split {split}: {reasons}; the manifest names them all", stacklevel=2
        )


def refuse_bad(bad: Mapping[str, str]) -> None:
    """Raise UserError where there is any."""
    if bad:
        raise UserError(
            f"{_listed(bad)}: repair or remove, or leave out with --on_bad_recording skip"
        )


def _listed(bad: Mapping[str, str]) -> str:
    return _some([f"recording {name} {reason}" for name, reason in bad.items()], "; ", at_most=50)


def open_windows(
    root_path: str | Path, split: Split, split_seed: int, seq_len: int, patch_len: int, n_vars: int
) -> Windows:
    """`find_windows`, where recordings that cannot be used are an error."""
    windows, bad = find_windows(root_path, split, split_seed, seq_len, patch_len, n_vars)
    refuse_bad(bad)
    return windows


def find_windows(
    root_path: str | Path, split: Split, split_seed: int, seq_len: int, patch_len: int, n_vars: int
) -> tuple[Windows, dict[str, str]]:
    """The windows of a split's patients, and the recordings that cannot be used, with the reason; from names, headers
    and the CSV, not from the samples' values.

    `all` is train, val and test, one after the other. Raises UserError on a folder, CSV or split that is not as it
    should be.
    """
    root = Path(root_path)
    folder = recordings_folder(root)
    names = sorted(f.name for f in folder.iterdir() if f.suffix == ".npy")
    if not names:
        raise UserError(f"there are no recordings (.npy) in {folder}")
    lengths = read_lengths(folder / LENGTHS)
    splits = patient_splits(root, names, split_seed)
    patients = splits["train"] + splits["val"] + splits["test"] if split == "all" else splits[split]
    elsewhere = {p for s in splits.values() for p in s} - set(patients)
    files_of: dict[str, list[str]] = {}
    for name in names:
        files_of.setdefault(patient_of(name), []).append(name)
    files = [name for patient in patients for name in files_of.get(patient, [])]
    bad = {
        name: f"is listed in {LENGTHS}, but there is no such file"
        for name in sorted(lengths.keys() - set(names))
        if patient_of(name) not in elsewhere
    }
    for name in files:
        if reason := _problem(folder / name, lengths.get(name), n_vars):
            bad[name] = reason
    good = tuple(f for f in files if f not in bad)
    stamps = {name: stamp_of(folder / name) for name in good}
    windows = Windows(
        folder, good, tuple(lengths[f] for f in good), seq_len, patch_len, n_vars, stamps
    )
    if len(windows) == 0 and not bad:
        raise UserError(
            f"split {split} is empty: {len(patients)} patients with {len(files)} recordings in {folder} "
            f"make no window of {seq_len} samples"
        )
    return windows, bad


def recordings_folder(root: Path) -> Path:
    """The folder with file_lengths_map.csv: root itself, or its tuhab_preprocessed."""
    for folder in (root, root / "tuhab_preprocessed"):
        if (folder / LENGTHS).is_file():
            return folder
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}: --root_path must hold recordings and file_lengths_map.csv"
        )
    raise UserError(
        f"there is no file_lengths_map.csv in {root}, which must list the recordings and their lengths"
    )


def read_lengths(path: Path) -> dict[str, int]:
    """File name to length in samples, from a CSV with the columns filename and time_len."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            rows = csv.DictReader(f)
            columns = rows.fieldnames or []
            missing = [c for c in ("filename", "time_len") if c not in columns]
            if missing:
                raise UserError(
                    f"{path} lacks the column {' and '.join(missing)}; it has {', '.join(columns)}"
                )
            lengths = {
                row["filename"]: _length(row["time_len"], path, rows.line_num) for row in rows
            }
            if None in lengths or "" in lengths:
                raise UserError(f"{path} has a row without a filename")
            return lengths
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
            warnings.warn(
                f"{_some(twice)} stands in {path.name} more than once: splits overlap", stacklevel=2
            )
        new = sorted({patient_of(n) for n in names} - known)
        if new:
            warnings.warn(
                f"{_some(new)} of {root} is in no split of {path.name}, and left out", stacklevel=2
            )
        return splits
    patients = list(dict.fromkeys(patient_of(name) for name in names))
    random.Random(seed).shuffle(patients)
    train_end = int(len(patients) * TRAIN_SHARE)
    val_end = train_end + int(len(patients) * (1 - TRAIN_SHARE - TEST_SHARE))
    splits = {
        "train": patients[:train_end],
        "val": patients[train_end:val_end],
        "test": patients[val_end:],
    }
    if os.access(root, os.W_OK):
        with atomic_write(path, shared=True) as aside:
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
        raise UserError(
            f"{path} is no pickle of plain lists of patients ({e}): remove it to split anew"
        ) from e
    if not isinstance(splits, dict) or not all(
        isinstance(splits.get(k), list) and all(isinstance(p, str) for p in splits[k])
        for k in ("train", "val", "test")
    ):
        raise UserError(f"{path} must hold a dict of three lists of patients, train, val and test")
    return {k: splits[k] for k in ("train", "val", "test")}


def stamp_of(path: Path) -> tuple[int, int]:
    """Size and time of change."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def load_recording(path: Path) -> np.ndarray:
    """A recording [time, channels], mapped, not read."""
    with _one_header:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(mapped, np.ndarray):
        raise ValueError("it is an archive of arrays")
    array = mapped.view(np.ndarray)
    return array[:, None] if array.ndim == 1 else array


def _problem(path: Path, length: int | None, n_vars: int) -> str | None:
    """Why a recording cannot be used, from its header, its size and its length in the CSV."""
    if length is None:
        return f"cannot be used: {LENGTHS} has no row for it"
    try:
        array = load_recording(path)
    except Exception as e:
        return f"cannot be read ({brief(e) or type(e).__name__})"
    if array.ndim != 2 or array.dtype.kind != "f":
        return f"must be floating-point [time, channels], but is {array.dtype}{list(array.shape)}"
    if array.shape[1] != n_vars:
        return f"has {array.shape[1]} channels, but the encoder wants {n_vars}"
    if len(array) != length:
        return f"has {len(array)} samples, but {LENGTHS} says {length}"
    return None


def _some(items: list[str], separator: str = ", ", at_most: int = 5) -> str:
    more = f"{separator}and {len(items) - at_most} more" if len(items) > at_most else ""
    return separator.join(items[:at_most]) + more
