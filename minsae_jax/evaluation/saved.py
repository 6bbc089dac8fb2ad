"""Measures of earlier evaluations, saved to be used again.

Each part of a result is a file `evaluation/<name>.<part>.npz` in the output folder, with a key: the
checksum of everything that the part depends on. A part with another key is measured again, so that
old measures are never used for new labels, another encoder or a retrained member.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from minsae_jax.checksums import read_npz, write_npz
from minsae_jax.errors import is_system_error
from minsae_jax.evaluation.members import Member
from minsae_jax.files import atomic_write, flush

FOLDER = "evaluation"
# Suffix of a file that is there while a part is saved. It contains the names of the members.
UNFINISHED = ".unfinished.json"
# Increment when a measure changes, so that results of earlier versions are not used.
MEASURES_VERSION = 11
Arrays = Mapping[str, np.ndarray]
T = TypeVar("T")


class Keys(NamedTuple):
    """Checksums of the inputs of an autoencoder's measures, by part."""

    tokens: str
    loss: str
    features: str


def make_key(*parts: object) -> str:
    """Return the checksum of values that JSON can represent."""
    content = json.dumps([MEASURES_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def part_file(out: Path, name: str, part: str) -> Path:
    """Return the file of a part of one autoencoder's measures."""
    return out / FOLDER / f"{name}.{part}.npz"


def load_part(out: Path, name: str, part: str, key: str) -> Arrays | None:
    """Return the saved arrays, or None if there are none with this key, or they are damaged."""
    path = part_file(out, name, part)
    if not path.is_file():
        return None
    try:
        arrays = read_npz(path)
        saved_key = str(arrays.pop("key"))
    except Exception as e:  # zipfile and NumPy raise many types on damaged files
        if is_system_error(e):
            raise
        return None
    return arrays if saved_key == key else None


def save_part(out: Path, name: str, part: str, key: str, arrays: Arrays) -> None:
    """Write arrays with their key, over those of another key."""
    path = part_file(out, name, part)
    path.parent.mkdir(exist_ok=True)
    write_npz(path, {"key": np.array(key), **arrays})


def discard_unfinished(out: Path) -> None:
    """Remove measures of a part that was not saved for all members before a process was killed.

    They would be measured again without the members that are saved already, and be rounded in
    another way, since the size of a batch depends on the members that are measured together.
    """
    for unfinished in (out / FOLDER).glob(f"*{UNFINISHED}"):
        part = unfinished.name.removesuffix(UNFINISHED)
        for name in json.loads(unfinished.read_text()):
            unfinished.with_name(f"{name}.{part}.npz").unlink(missing_ok=True)
        flush([unfinished.parent])
        unfinished.unlink()


def saved_or_measured(
    out: Path,
    part: str,
    members: Sequence[Member],
    keys: Mapping[str, Keys],
    measure_missing: Callable[[list[Member]], Mapping[str, T]],
    to_arrays: Callable[[T], Arrays],
    from_arrays: Callable[[Arrays], T],
) -> dict[str, T]:
    """Return a part of the results of all members; missing results are measured and saved."""
    results = {}
    missing = []
    for member in members:
        saved = load_part(out, member.name, part, getattr(keys[member.name], part))
        if saved is None:
            missing.append(member)
        else:
            results[member.name] = from_arrays(saved)
    if missing:
        measured = measure_missing(missing)
        unfinished = out / FOLDER / f"{part}{UNFINISHED}"
        unfinished.parent.mkdir(exist_ok=True)
        with atomic_write(unfinished) as temporary:
            temporary.write_text(json.dumps(list(measured)))
        for name, result in measured.items():
            save_part(out, name, part, getattr(keys[name], part), to_arrays(result))
        unfinished.unlink()
        flush([unfinished.parent])
        results |= measured
    return {member.name: results[member.name] for member in members}
