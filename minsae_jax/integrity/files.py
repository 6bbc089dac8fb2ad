"""Checks of single files: each returns the problem, or None.

A file with a checksum is compared with it. Others are read in full, which finds damage where the
format has its own checksums (.npz, .png, TensorBoard's events) or the content is invalid.
"""

import csv
import json
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from safetensors.numpy import load_file

from minsae_jax.checksums import read_npz
from minsae_jax.eeg.recordings import load_recording, recordings_folder
from minsae_jax.eeg.splits import patient_of, read_splits
from minsae_jax.errors import UserError, brief, is_system_error, system_reason
from minsae_jax.files import sha256_of
from minsae_jax.monitor import ACT_FREQS_NPY, TFEVENTS_PREFIX, open_table
from minsae_jax.sae.member import WEIGHTS, load_sae

BLOCK = 100_000  # rows of an array that are read at once
HEADER_BYTES = 12  # of a TensorBoard record: its length in 8 bytes and their checksum in 4


def differs(path: Path, digest: str) -> str | None:
    """Compare a file with its SHA-256."""
    try:
        is_equal = sha256_of(path) == digest
    except FileNotFoundError:
        return "is missing"
    except OSError as e:
        return f"cannot be read ({system_reason(e)})"
    return None if is_equal else "differs from its checksum"


def unreadable(path: Path, is_known: bool) -> str | None:
    """Read a file that has no checksum, by the rules of its format if that is known."""
    read = _reader_of(path) if is_known else sha256_of
    try:
        read(path)
    except UserError as e:
        return f"is damaged ({e})"
    except Exception as e:  # readers raise many types on damaged files
        if is_system_error(e):
            return f"cannot be read ({system_reason(e)})"
        return f"is damaged ({brief(e) or type(e).__name__})"
    return None


def _reader_of(path: Path) -> Callable[[Path], object]:
    """Return the reader of a format; of unknown ones all bytes are read, by `sha256_of`."""
    if path.name.startswith(TFEVENTS_PREFIX):
        return _read_events
    if path.name == ACT_FREQS_NPY:
        return lambda path: open_table(path.parent)
    return READERS.get(path.suffix, sha256_of)


def _read_npy(path: Path) -> None:
    array = load_recording(path)
    if array.dtype.kind != "f":
        sha256_of(path)
        return
    for start in range(0, len(array), BLOCK):
        if not np.isfinite(array[start : start + BLOCK]).all():
            raise ValueError("it contains NaN or infinity")


def _read_json(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))


def _read_yaml(path: Path) -> None:
    yaml.safe_load(path.read_text(encoding="utf-8"))


def _read_csv(path: Path) -> None:
    """Check that all rows have the columns of the header; numbers can be wrong unnoticed."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        # A killed process leaves half a line.
        rows = csv.reader((line for line in file if line.endswith("\n")), strict=True)
        header = next(rows, [])
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"line {rows.line_num} has {len(row)} columns, not {len(header)}")


def _read_image(path: Path) -> None:
    # The chunks of a PNG have checksums.
    with Image.open(path) as image:
        image.verify()


def _read_safetensors(path: Path) -> None:
    if path.name == WEIGHTS:
        load_sae(path.parent)
    else:  # of another program
        load_file(path)


def _read_splits(path: Path) -> None:
    """Check that each patient with recordings is in one split."""
    listed = Counter(patient for patients in read_splits(path).values() for patient in patients)
    folder = recordings_folder(path.parent)
    for name in sorted(each.name for each in folder.glob("*.npy")):
        if listed[patient_of(name)] != 1:
            raise ValueError(f"{patient_of(name)} is in {listed[patient_of(name)]} splits")


def _read_events(path: Path) -> None:
    """Compare the checksums of TensorBoard's records; a killed process leaves half a record."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    def is_valid(content: bytes, checksum: bytes) -> bool:
        return masked_crc32c(content) == struct.unpack("<I", checksum)[0]

    content = path.read_bytes()
    start = 0
    while start + HEADER_BYTES <= len(content):
        header = content[start : start + HEADER_BYTES]
        if not is_valid(header[:8], header[8:]):
            raise ValueError(f"the record at byte {start} fails its checksum")
        first = start + HEADER_BYTES
        end = first + struct.unpack("<Q", header[:8])[0]
        if end + 4 > len(content):
            return
        if not is_valid(content[first:end], content[end : end + 4]):
            raise ValueError(f"the record at byte {start} fails its checksum")
        start = end + 4


READERS: dict[str, Callable[[Path], object]] = {
    ".npy": _read_npy,
    ".npz": read_npz,
    ".json": _read_json,
    ".yaml": _read_yaml,
    ".csv": _read_csv,
    ".png": _read_image,
    ".safetensors": _read_safetensors,
    ".pkl": _read_splits,
}
