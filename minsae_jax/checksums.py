"""Checksums of the finished files of a folder: `SHA256SUMS`, which `sha256sum -c` reads too.

Commands write it when they finish. It is not needed to read anything; `minsae verify` compares it.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from minsae_jax.errors import UserError
from minsae_jax.files import atomic_write, sha256_of

SUMS = "SHA256SUMS"
# The digest, a space, a space or * for binary mode, and the path below the folder.
LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


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
    for line in path.read_bytes().decode(errors="replace").splitlines():
        match = LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{path} is damaged: remove it, since it is not needed")
        digests[match[2]] = match[1]
    return digests


def files_below(folder: Path) -> list[str]:
    """Return the paths of all files below a folder, as `write_checksums` takes them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in files)
