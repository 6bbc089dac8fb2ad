"""Saved measures: what an earlier evaluation of the run measured and still holds.

Each part of a result is a file `evaluation/<name>.<part>.npz` in the run, with a key: the checksum
of everything that the part depends on. A part with another key is measured again, so that new
labels, another encoder or a retrained member never meet old numbers.
"""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from minsae_jax.files import atomic_write

FOLDER = "evaluation"
# Raise it when a measure changes, so that results of earlier versions are not used.
MEASURES_VERSION = 1
Arrays = Mapping[str, np.ndarray]


def make_key(*parts: object) -> str:
    """Return the checksum of values that JSON can represent."""
    content = json.dumps([MEASURES_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def load_part(run: Path, name: str, part: str, key: str) -> Arrays | None:
    """Return the saved arrays, or None if there are none with this key, or they are damaged."""
    path = run / FOLDER / f"{name}.{part}.npz"
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as content:
            if str(content["key"]) != key:
                return None
            return {array: content[array] for array in content.files}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def save_part(run: Path, name: str, part: str, key: str, arrays: Arrays) -> None:
    """Write arrays with their key, over those of another key."""
    path = run / FOLDER / f"{name}.{part}.npz"
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, key=np.array(key), **arrays)
