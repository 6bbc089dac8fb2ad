"""Crash-safe, resumable writer of a store.

Files appear by renaming, so a file with its final name is complete. The manifest lists shards once
they are flushed to the disk, and is rewritten every few seconds; shards that it does not list are
written again.
"""

import hashlib
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped

from minsae_jax.activations.manifest import (
    MANIFEST,
    Manifest,
    ShardEntry,
    StoreIdentity,
    parse_shard_entry,
    read_manifest,
)
from minsae_jax.activations.shards import (
    PROVENANCE,
    find_damage,
    read_header,
    shard_damage,
    shard_files,
)
from minsae_jax.activations.tokens import TOKENS, TokenGrid
from minsae_jax.checksums import SUMS, write_checksums, write_npz
from minsae_jax.errors import UserError
from minsae_jax.files import (
    atomic_write,
    flush,
    foreign_entries,
    make_folder,
    regular_file,
    sha256_of,
)
from minsae_jax.locks import lock_folder
from minsae_jax.parallel.processes import barrier
from minsae_jax.settings import JsonObject

MANIFEST_SECONDS = 5.0  # from one manifest to the next; a killed process loses the shards since
BLOCK = 1 << 20  # bytes that are hashed and then written while they are in the cache
PARTIAL_MANIFESTS = "manifest.*.json"  # of processes other than the first
# Digits are counted, since a pattern like b[0-9]*.npy also matches names of other programs.
_SHARDS = tuple(f"b{'[0-9]' * n_digits}.npy" for n_digits in range(1, 10))
_NAMES = (*_SHARDS, MANIFEST, PARTIAL_MANIFESTS, PROVENANCE, TOKENS, SUMS)
OWNED_FILES = (*_NAMES, *(f"{name}.tmp" for name in _NAMES))


class StoreWriter:
    """Writer of a new store, or of the missing shards of one that was interrupted.

    A `with` block locks the folder, and `begin` prepares it. Raises UserError, before anything is
    written, if the folder contains files of others or a store of another identity; `overwrite`
    replaces the store. layer_from_end: for the manifest.

    Several processes can write one store; all call `begin` and `finish` together. The first writes
    manifest.json; process n lists its shards in manifest.{n}.json, which are merged by `finish` or
    by the next `begin`.
    """

    def __init__(
        self,
        folder: Path,
        identity: StoreIdentity,
        overwrite: bool = False,
        layer_from_end: int | None = None,
    ):
        _check_replaceable(folder, identity, overwrite)
        self.folder = folder
        self.identity = identity
        self.overwrite = overwrite
        self.process = jax.process_index()
        self.finished = False
        self.done: set[int] = set()  # numbers of complete shards
        self._shards: tuple[ShardEntry, ...] = ()  # those that this process lists
        self._manifest = self._new_manifest = Manifest.of(identity, layer_from_end)
        self._unlisted: list[ShardEntry] = []  # shards that are not in the manifest yet
        self._listed_at = -MANIFEST_SECONDS
        self._lock = ExitStack()

    def __enter__(self) -> "StoreWriter":
        if self.process == 0:
            make_folder(self.folder)
            try:
                self._lock.enter_context(lock_folder(self.folder))
            except UserError:
                self._lock.enter_context(lock_folder(self.folder, shared=True))
                # Others may read a store that is complete, since it will not change.
                if self.overwrite or not self._is_complete(read_manifest(self.folder)):
                    self._lock.close()
                    raise
        return self

    def __exit__(self, *_: object) -> None:
        # After an error, such as that of a full disk, which is raised already.
        with suppress(OSError):
            self._list_shards()
        self._lock.close()

    def begin(self) -> None:
        """Prepare the folder, then set `finished` and `done`."""
        with barrier(f"begin {self.folder}"):
            if self.process == 0:
                self._prepare_folder()
        # All processes read it before the first one adds shards to it, since they share out the
        # shards that it lacks.
        with barrier(f"read {self.folder}"):
            manifest = read_manifest(self.folder)
            if manifest is None:
                raise UserError(f"{self.folder / MANIFEST} has disappeared; rerun")
        self._manifest = manifest
        self.finished = manifest.complete
        self.done = {entry.number for entry in manifest.shards}
        if self.process == 0:
            # Shards that were merged into manifest.json belong to the first process.
            self._shards = manifest.shards

    def _prepare_folder(self) -> None:
        """Leave a complete store as it is; otherwise remove all but undamaged shards."""
        if self.overwrite:
            # Before there is a manifest that they could be merged into.
            self._remove_partial_manifests()
        manifest = None
        if not self.overwrite:
            manifest = read_manifest(self.folder)
        if self._is_complete(manifest):
            self._remove_partial_manifests()
            return
        self._manifest = manifest or self._new_manifest
        self._shards = self._manifest.shards
        self._shards = tuple(e for e in self._merged_shards() if self._is_intact(e))
        # The manifest first, then the files: it must never list a shard that is gone.
        self._write_manifest(complete=False)
        current = {MANIFEST, *(entry.file for entry in self._shards)}
        protected = current.union(foreign_entries(self.folder, OWNED_FILES))
        for path in self.folder.iterdir():
            if path.name not in protected:
                path.unlink()

    def _is_complete(self, manifest: Manifest | None) -> bool:
        """Return whether nothing is left to do for a store with this manifest."""
        if manifest is None or not manifest.complete:
            return False
        return not any(find_damage(self.folder, manifest))

    def _is_intact(self, entry: ShardEntry) -> bool:
        path = self.folder / entry.file
        if shard_damage(path, entry, self._manifest.dtype):
            return False
        # Last, since hashing reads the whole file.
        return sha256_of(path) == entry.sha256

    def _merged_shards(self) -> tuple[ShardEntry, ...]:
        """Return this process's shards and those in partial manifests, in order."""
        entries = {entry.file: entry for entry in self._shards}
        for path in self.folder.glob(PARTIAL_MANIFESTS):
            for entry in self._read_partial_manifest(path):
                # A process killed between merging and removing leaves a shard in both lists.
                entries.setdefault(entry.file, entry)
        return tuple(sorted(entries.values(), key=lambda entry: entry.number))

    def _read_partial_manifest(self, path: Path) -> list[ShardEntry]:
        """Return the shards of another process, or none if the file is damaged or of another store.

        The shards of a damaged file are written again.
        """
        sequence_shape = [self.identity.n_tokens, self.identity.d_model]
        try:
            content = json.loads(regular_file(path).read_text(encoding="utf-8"))
            if content["identity"] != self.identity.digest:
                return []
            return [parse_shard_entry(entry, sequence_shape) for entry in content["shards"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            return []

    def _remove_partial_manifests(self) -> None:
        for path in self.folder.glob(PARTIAL_MANIFESTS):
            path.unlink()

    def write(
        self, number: int, pieces: Sequence[Shaped[np.ndarray, "_ n_tokens d_model"]]
    ) -> None:
        """Write one shard in the store's dtype, given in pieces along the first axis.

        Raises UserError if the disk cannot be written.
        """
        path = self.folder / f"b{number:04d}.npy"
        try:
            self._unlisted.append(_write_shard(path, pieces))
            if time.monotonic() - self._listed_at > MANIFEST_SECONDS:
                self._list_shards()
        except OSError as e:
            raise UserError(
                f"{path} could not be written ({e.strerror or e}); rerun the same command to resume"
            ) from e
        self.done.add(number)

    def read(self, number: int) -> Float[np.ndarray, "_ n_tokens d_model"]:
        """Return a shard that is written, as float32."""
        path = self.folder / f"b{number:04d}.npy"
        header = read_header(path)
        content = np.fromfile(path, header.dtype, offset=header.offset).reshape(header.shape)
        if self.identity.dtype == "bfloat16":
            content = content.view(ml_dtypes.bfloat16)
        return content.astype(np.float32)

    def finish(self, provenance: Mapping[str, np.ndarray], tokens: TokenGrid) -> None:
        """Write the provenance, one entry per sequence in the shards' order, and the manifest.

        tokens: places of the tokens of a sequence.
        """
        with barrier(f"list the shards of {self.folder}"):
            self._list_shards()
        with barrier(f"finish {self.folder}"):
            if self.process == 0:
                write_npz(self.folder / PROVENANCE, provenance)
                tokens.write(self.folder)
                self._shards = self._merged_shards()
                self._write_manifest(complete=True)
                self._remove_partial_manifests()

    def _list_shards(self) -> None:
        """Write the manifest with the shards written since the last time, all flushed before."""
        if not self._unlisted:
            return
        flush([self.folder])
        self._shards = (*self._shards, *self._unlisted)
        self._unlisted = []
        self._write_manifest(complete=False)
        self._listed_at = time.monotonic()

    def _write_manifest(self, complete: bool) -> None:
        name = MANIFEST
        if self.process == 0:
            self._manifest = replace(self._manifest, shards=self._shards, complete=complete)
            content = self._manifest.to_json()
        else:
            name = f"manifest.{self.process}.json"
            shards = [entry.to_json() for entry in self._shards]
            content = {"identity": self.identity.digest, "shards": shards}
        with atomic_write(self.folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
            if complete:
                # Before the manifest gets its name, which marks the store as complete. The shards'
                # checksums are in the manifest.
                digests = {MANIFEST: sha256_of(temporary)}
                write_checksums(self.folder, (PROVENANCE, TOKENS), digests)


def _check_replaceable(folder: Path, identity: StoreIdentity, overwrite: bool) -> None:
    """Raise UserError if the folder contains files of others, or another store."""
    manifest = None
    if not overwrite:
        manifest = read_manifest(folder)
    if manifest is not None:
        _check_identity(folder, identity, manifest)
        return
    foreign = foreign_entries(folder, OWNED_FILES)
    if foreign:
        raise UserError(
            f"{folder} contains {foreign[0]}, which is not part of a store; choose another --out"
        )
    if overwrite or not folder.is_dir():
        return
    shards = shard_files(folder)
    if shards:
        raise UserError(
            f"{folder} contains {shards[0].name} but no manifest; choose another --out, or use "
            "--overwrite"
        )


def _check_identity(folder: Path, identity: StoreIdentity, manifest: Manifest) -> None:
    # Stores of the first version have no precision and list no skipped recordings.
    before = {"precision": "float32", "skipped": {}} | _flat(manifest)
    differences = [
        f"{name} ({_short(before.get(name))}, now {_short(value)})"
        for name, value in _flat(identity).items()
        if before.get(name) != value
    ]
    if differences:
        raise UserError(
            f"{folder} contains a store of other settings: {', '.join(differences)}; choose "
            "another --out, or use --overwrite"
        )


def _flat(identity: StoreIdentity) -> JsonObject:
    content = dict(identity.to_json())
    data = content.pop("data")
    return content | data


def _short(value: object) -> str:
    text = str(value)
    if len(text) == 64:  # a SHA-256
        text = f"{text[:12]}…"
    return text


def _write_shard(path: Path, pieces: Sequence[np.ndarray]) -> ShardEntry:
    """Write a .npy file of all pieces, block by block, and hash it on the way."""
    arrays = list(pieces)
    if arrays[0].dtype == ml_dtypes.bfloat16:
        arrays = [array.view(np.uint16) for array in arrays]
    _, n_tokens, d_model = arrays[0].shape
    shape = (sum(len(array) for array in arrays), n_tokens, d_model)
    digest = hashlib.sha256()
    n_bytes = 0
    # Blocks are large already, so a buffer would not save system calls.
    # The folder is flushed once for many shards, before the manifest lists them.
    with atomic_write(path, durable=False) as temporary:
        with temporary.open("wb", buffering=0) as file:
            for block in _blocks(arrays, shape):
                digest.update(block)
                _write_all(file, block)
                n_bytes += len(block)
        flush([temporary])
    return ShardEntry(path.name, shape, n_bytes, digest.hexdigest())


def _blocks(arrays: Sequence[np.ndarray], shape: tuple[int, ...]) -> Iterator[memoryview]:
    """Yield the bytes of a .npy file, at most BLOCK at a time."""
    # The same bytes as np.save writes, but in blocks, so that each is hashed while it is cached.
    header = io.BytesIO()
    description = {"descr": arrays[0].dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    yield header.getbuffer()
    for array in arrays:
        content = np.ascontiguousarray(array).data.cast("B")
        for start in range(0, len(content), BLOCK):
            yield content[start : start + BLOCK]


def _write_all(file: IO[bytes], block: memoryview) -> None:
    while len(block):  # an unbuffered file may write less than it is given
        block = block[file.write(block) :]
