"""Patient splits: the patients of train, val and test, drawn exactly as gPatchTST's data set does.

The root folder of the recordings keeps them in `tuh_patient_splits_seed_{seed}.pkl`.
"""

import io
import os
import pickle
import pickletools
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from minsae_jax.errors import UserError, join_some, reading
from minsae_jax.files import atomic_write, regular_file

Split = Literal["train", "val", "test", "all"]
Splits = dict[str, list[str]]  # train, val, test -> patients

TRAIN_SHARE = 0.7
TEST_SHARE = 0.2
MIN_PATIENTS = 10  # for at least one in val


def patient_of(name: str) -> str:
    """Return the patient of a recording's file name.

    >>> patient_of("aaaaabgf_s001_t000_preprocessed.npy")
    'aaaaabgf'
    """
    return name.split("_", 1)[0]


def patient_splits(root: Path, names: Sequence[str], seed: int) -> Splits:
    """Return the patients of each split, from the pickle in `root` or drawn from `names`.

    A new draw is written to the pickle if the folder is writable and every split has a patient;
    with fewer, patients that are added later are drawn as well. Warns about patients that are in
    several splits of the pickle or in none.
    """
    path = splits_path(root, seed)
    if path.exists():
        splits = read_splits(path)
        _warn_about_patients(splits, names, path)
        return splits
    # In the order of the file names, on which the result of the shuffle depends.
    splits = draw_splits(list(dict.fromkeys(patient_of(name) for name in names)), seed)
    if all(splits.values()) and os.access(root, os.W_OK):
        with atomic_write(path, shared=True) as temporary:
            temporary.write_bytes(pickle.dumps(splits))
    return splits


def splits_path(root: Path, seed: int) -> Path:
    """Return the path of the pickle with the splits of a seed."""
    return root / f"tuh_patient_splits_seed_{seed}.pkl"


def draw_splits(patients: list[str], seed: int) -> Splits:
    """Return a random split of distinct patients: 70 % train, 20 % test, the rest val.

    The order, the generator and the rounding are those of gPatchTST, so equal seeds agree.
    """
    patients = list(patients)
    random.Random(seed).shuffle(patients)
    train_end = int(len(patients) * TRAIN_SHARE)
    # Not 0.1: the float 1 - 0.7 - 0.2 rounds some sizes differently.
    val_end = train_end + int(len(patients) * (1 - TRAIN_SHARE - TEST_SHARE))
    return {
        "train": patients[:train_end],
        "val": patients[train_end:val_end],
        "test": patients[val_end:],
    }


def _warn_about_patients(splits: Splits, names: Sequence[str], path: Path) -> None:
    listed = [patient for patients in splits.values() for patient in patients]
    known = Counter(listed)
    duplicates = sorted(patient for patient, count in known.items() if count > 1)
    if duplicates:
        warnings.warn(
            f"{path.name} contains {join_some(duplicates)} more than once: splits overlap",
            stacklevel=3,
        )
    unknown = sorted({patient_of(name) for name in names} - known.keys())
    if unknown:
        warnings.warn(
            f"{join_some(unknown)} of {path.parent} is in no split of {path.name} and is left out; "
            "remove that file to draw a new split (then extract all splits again)",
            stacklevel=3,
        )


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler without globals: enough for lists, dicts, strings and numbers, and runs no code."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it requires {module}.{name}")


def read_splits(path: Path) -> Splits:
    """Return the splits in a pickle of the reference, without running code from it.

    Raises UserError if it is not a dict of three lists of patients.
    """
    problem = f"{path} is not a pickle of lists of patients"
    with reading(problem, remedy="; remove it to draw a new split"):
        content = regular_file(path).read_bytes()
        # CPython itself prints an error when a damaged pickle contains one of these.
        if any(opcode.name == "BYTEARRAY8" for opcode, _, _ in pickletools.genops(content)):
            raise pickle.UnpicklingError("it contains a bytearray")
        splits = _PlainUnpickler(io.BytesIO(content)).load()
    names = ("train", "val", "test")
    if not isinstance(splits, dict) or not all(_is_patient_list(splits.get(n)) for n in names):
        raise UserError(f"{path} must contain a dict of three lists of patients: train, val, test")
    return {name: splits[name] for name in names}


def _is_patient_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(patient, str) for patient in value)
