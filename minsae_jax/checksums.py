"""Checksums of the finished files of a folder: `SHA256SUMS`, which `sha256sum -c` reads too.

Commands write it when they finish. It is not needed to read anything; `minsae verify` compares it.
Archives of arrays (.npz) have checksums in their format, see `read_npz`.
"""

import os
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from minsae_jax.errors import UserError
from minsae_jax.files import HEADER_LOCK, atomic_write, regular_file, sha256_of

SUMS = "SHA256SUMS"
# The digest, a space, a space or * for binary mode, and the path below the folder.
LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\0][^\0]*)")

ZIP_END_BYTES = 22  # of the record at the end of a zip archive without a comment


def write_checksums(
    folder: Path, names: Iterable[str], known: Mapping[str, str] | None = None
) -> None:
    """Write the SHA-256 of files in a folder, in order of their names.

    names: paths below the folder, separated by /. known: name -> checksum of further files, such as
    one that gets its name after this file.
    """
    digests = {name: sha256_of(folder / name) for name in names}
    digests |= known or {}
    lines = [f"{digests[name]}  {name}\n" for name in sorted(digests)]
    with atomic_write(folder / SUMS) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8", newline="\n")


def update_checksums(folder: Path, names: Iterable[str]) -> None:
    """Write the checksums of some files anew, and keep those of others."""
    names = set(names)
    others = {name: digest for name, digest in read_checksums(folder).items() if name not in names}
    write_checksums(folder, names, others)


def read_checksums(folder: Path) -> dict[str, str]:
    """Return name -> SHA-256 of the files listed in a folder; empty without SHA256SUMS.

    Raises UserError if a line is invalid.
    """
    path = folder / SUMS
    if not path.is_file():
        return {}
    digests = {}
    content = path.read_bytes().decode(errors="replace")
    for line in content.removesuffix("\n").split("\n"):
        match = LINE.fullmatch(line)
        # A path must not lead out of the folder.
        if match is None or ".." in match[2].split("/"):
            raise UserError(f"{path} is damaged: remove it, since it is not needed")
        digests[match[2]] = match[1]
    return digests


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Return all arrays of a .npz file that NumPy wrote, in full.

    Raises many types of errors if it is damaged; any change of the arrays is noticed.
    """
    with regular_file(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
        with HEADER_LOCK:
            arrays = {name: archive[name] for name in archive.files}
        # zipfile compares the checksum of each array, but where the directory of the archive is
        # damaged it can miss an array. Their number is at byte 10 of the archive's last record.
        file.seek(-ZIP_END_BYTES, os.SEEK_END)
        (n_arrays,) = struct.unpack_from("<H", file.read(), 10)
    if n_arrays != len(arrays):
        raise ValueError(f"it has {n_arrays} arrays, but {len(arrays)} can be read")
    return arrays


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a compressed .npz file, over an existing one."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def files_below(folder: Path) -> list[str]:
    """Return the paths of all files below a folder, as `write_checksums` takes them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in files)
