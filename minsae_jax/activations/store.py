"""The store: activations of one encoder layer on disk, one file a batch of windows; its format and its reader.

`b0000.npy`, `b0001.npy`, … hold [sequences, n_tokens, d_model]; bfloat16 is kept as its uint16 bits, since .npy has no
such type. `manifest.json` says what belongs, `provenance.npz` where each sequence came from. A folder without a
manifest, as minSAE writes it, is read too.
"""

import bisect
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from minsae_jax.errors import UserError, brief
from minsae_jax.monitor import progress

FORMAT_VERSION = 1
MANIFEST, PROVENANCE = "manifest.json", "provenance.npz"
SHARD_NAME = re.compile(r"b(\d+)\.npy")
ON_DISK = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "uint16",
}  # dtype -> what .npy calls it
CHUNK_ROWS = 256  # consecutive rows a read: single rows are a hundred times slower
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Shard:
    path: Path
    rows: int  # tokens: sequences * n_tokens
    offset: int  # of the first number in the file, in bytes
    sha256: str | None  # None where there is no manifest


@dataclass(frozen=True)
class Store:
    """An opened store. `manifest` is empty for a folder that minSAE wrote."""

    folder: Path
    shards: tuple[Shard, ...]
    d_model: int
    dtype_on_disk: str  # float32, float16, bfloat16, or float64 where minSAE's folder has it
    manifest: Mapping[str, Any]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def rows_of_shards(self) -> list[int]:
        return [shard.rows for shard in self.shards]

    @property
    def n_chunks(self) -> int:
        """Runs of at most chunk_rows rows; a shard's shorter tail is one too."""
        return self._chunk_ends[-1]

    @property
    def chunk_rows(self) -> int:
        return CHUNK_ROWS

    @cached_property
    def _chunk_ends(self) -> list[int]:
        return list(accumulate(-(-shard.rows // CHUNK_ROWS) for shard in self.shards))

    @property
    def fingerprint(self) -> str:
        """Tells stores apart: of the manifest, or of names and sizes where there is none."""
        content = self.manifest or [(s.path.name, s.rows, self.d_model) for s in self.shards]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def dtype(self) -> np.dtype:
        """Of what is read: half precision as it is on disk, everything else as float32."""
        return np.dtype(
            {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}.get(
                self.dtype_on_disk, np.float32
            )
        )

    def read(
        self, shard: int, start: int = 0, stop: int | None = None
    ) -> Float[np.ndarray, "rows d_model"]:
        """Consecutive tokens of one shard."""
        start, stop, _ = slice(start, stop).indices(self.shards[shard].rows)
        rows = np.empty((stop - start, self.d_model), self.dtype)
        self._read_into(rows, shard, start)
        return rows

    def read_chunks(self, chunks: Sequence[int], out: Float[np.ndarray, "most d_model"]) -> int:
        """The rows of some chunks, one after the other, into `out`; returns how many they are."""
        done = 0
        for chunk in chunks:
            shard = bisect.bisect_right(self._chunk_ends, chunk)
            start = (chunk - (self._chunk_ends[shard - 1] if shard else 0)) * CHUNK_ROWS
            n_rows = min(CHUNK_ROWS, self.shards[shard].rows - start)
            self._read_into(out[done : done + n_rows], shard, start)
            done += n_rows
        return done

    def _read_into(self, rows: Float[np.ndarray, "rows d_model"], shard: int, start: int) -> None:
        """The file is opened for each read: to keep every shard open would take as many file descriptors. (With the
        system's own calls, since Python's file objects take as long as the reading.)"""
        file = self.shards[shard]
        on_disk = self.dtype if self.dtype_on_disk == "bfloat16" else np.dtype(self.dtype_on_disk)
        place = rows if on_disk == rows.dtype else np.empty(rows.shape, on_disk)
        missing, offset = (
            place.view(np.uint8).data.cast("B"),
            file.offset + start * place[:1].nbytes,
        )
        descriptor = os.open(file.path, os.O_RDONLY)
        try:
            while missing:
                count = os.preadv(descriptor, [missing], offset)
                if not count:
                    raise UserError(f"{file.path} has become shorter since the store was opened")
                missing, offset = missing[count:], offset + count
        finally:
            os.close(descriptor)
        if place is not rows:
            rows[:] = place

    def verify(self) -> None:
        """Read every shard and compare its checksum. Raises UserError naming those that fail."""
        known = [s for s in self.shards if s.sha256]
        failed = []
        with (
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
            progress("verify store", len(known), "shards", delay=2.0) as bar,
        ):
            for shard, digest in zip(
                known, pool.map(sha256_of, [s.path for s in known]), strict=True
            ):
                bar.advance(1)
                if digest != shard.sha256:
                    failed.append(str(shard.path))
        if failed:
            raise UserError(f"{', '.join(failed[:5])} fails its checksum: remove it, and {AGAIN}")


AGAIN = "give the extract command again, which makes what is missing"


def sha256_of(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def shard_files(folder: Path) -> list[Path]:
    """b*.npy in the order of their numbers, of however many digits."""
    numbered = [(int(m[1]), p) for p in folder.iterdir() if (m := SHARD_NAME.fullmatch(p.name))]
    return [p for _, p in sorted(numbered)]


def open_store(path: str | Path, layer: int | None = None) -> Store:
    """The store in a folder of shards, or in the l{layer} of a folder of stores.

    Headers and sizes are checked; checksums only by `Store.verify`. Raises UserError where there is no finished, whole
    store.
    """
    folder = Path(path)
    if layer is not None and (folder / f"l{layer}").is_dir():
        folder = folder / f"l{layer}"
    if not folder.is_dir():
        raise UserError(f"there is no store {folder}: make one with `python -m minsae_jax extract`")
    files, manifest = shard_files(folder), read_manifest(folder)
    if not manifest:
        if not files:
            layers = sorted(
                p.name for p in folder.iterdir() if p.is_dir() and re.fullmatch(r"l-?\d+", p.name)
            )
            held = f"it holds {', '.join(layers)}" if layers else "it holds no b0000.npy"
            raise UserError(f"there is no store of layer {layer} in {folder}: {held}")
        return _without_manifest(folder, files)
    if not manifest["complete"]:
        raise UserError(f"the store {folder} is unfinished: {AGAIN}")
    if layer is not None and layer not in (manifest["layer"], manifest["layer_index"]):
        raise UserError(f"the store {folder} is of layer {manifest['layer']}, not {layer}")
    if problem := next(damages(folder, manifest), None):
        raise UserError(f"{problem}, and {AGAIN}")
    shards = tuple(
        Shard(folder / e["file"], e["rows"], _header(folder / e["file"]).offset, e["sha256"])
        for e in manifest["shards"]
    )
    return Store(folder, shards, manifest["d_model"], manifest["dtype"], manifest)


def damages(folder: Path, manifest: Manifest):
    """Why the files of a finished store are not those of its manifest, from names, sizes and headers: an iterator of
    sentences without an end."""
    listed = {entry["file"]: entry for entry in manifest["shards"]}
    for path in shard_files(folder):
        if path.name not in listed:
            yield f"{path} is not in the manifest of its store: remove it"
    if problem := provenance_damage(folder / PROVENANCE, manifest):
        yield problem
    for entry in listed.values():
        if problem := shard_damage(folder / entry["file"], entry, manifest):
            yield problem


def provenance_damage(path: Path, manifest: Manifest) -> str | None:
    """Why a file is not the provenance of a store's sequences."""
    if not path.is_file():
        return f"{path} is missing"
    try:
        with np.load(path, allow_pickle=False) as provenance:
            n_sequences = len(provenance["recording"])
    except Exception:
        return f"{path} is damaged: remove it"
    if n_sequences != sum(entry["shape"][0] for entry in manifest["shards"]):
        return f"{path} is of another store: remove it"
    return None


def shard_damage(path: Path, entry: Mapping[str, Any], manifest: Manifest) -> str | None:
    """Why a file is not the manifest's shard, from its size and header."""
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}: remove it"
    try:
        array = _header(path)
    except UserError as e:
        return f"{e}: remove it"
    if [*array.shape] != entry["shape"] or str(array.dtype) != ON_DISK[manifest["dtype"]]:
        return f"{path} is {array.dtype}{list(array.shape)}, not {manifest['dtype']}{entry['shape']}: remove it"
    return None


def _header(path: Path) -> np.memmap:
    """A shard's shape, dtype and offset; its numbers are not read."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as e:
        raise UserError(f"{path} is no .npy array, or a damaged one ({brief(e)})") from e
    if not isinstance(array, np.memmap) or not array.flags.c_contiguous:
        raise UserError(f"{path} is no .npy array in C order")
    return array


def _without_manifest(folder: Path, files: list[Path]) -> Store:
    shards, kinds = [], set()
    for path in files:
        array = _header(path)
        if array.ndim < 2 or array.dtype.kind != "f" or array.size == 0:
            raise UserError(
                f"{path} must hold [sequences, n_tokens, d_model] floats, but is {array.dtype}{list(array.shape)}"
            )
        shards.append(Shard(path, array.size // array.shape[-1], array.offset, None))
        kinds.add((array.shape[-1], str(array.dtype)))
    if len(kinds) > 1:
        raise UserError(
            f"the shards in {folder} do not belong together: (d_model, dtype) is {sorted(kinds)}"
        )
    d_model, dtype = kinds.pop()
    return Store(folder, tuple(shards), d_model, dtype, {})


def read_manifest(folder: Path) -> Manifest:
    """The manifest, or {} where there is none. Raises UserError where it is damaged."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text())
        if (
            isinstance(manifest["format_version"], int)
            and manifest["format_version"] > FORMAT_VERSION
        ):
            raise UserError(f"{folder} was written by a newer minsae_jax: update")
        whole = _is_whole(manifest)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged: extract the store again with --overwrite")
    return manifest


def _is_whole(manifest: Manifest) -> bool:
    """Whether everything that others rely on is there and of its type."""
    kinds = {
        "format_version": int, "complete": bool, "layer": int, "layer_index": int, "dtype": str, "n_tokens": int,
        "d_model": int, "encoder": str, "data": dict, "shards": list,
    }  # fmt: skip
    return (
        all(type(manifest[name]) is kind for name, kind in kinds.items())
        and manifest["dtype"] in ON_DISK
        and (bool(manifest["shards"]) or not manifest["complete"])
        and all(
            SHARD_NAME.fullmatch(e["file"])
            and type(e["bytes"]) is int
            and re.fullmatch("[0-9a-f]{64}", e["sha256"])
            and e["shape"][1:] == [manifest["n_tokens"], manifest["d_model"]]
            and e["rows"] == e["shape"][0] * e["shape"][1] > 0
            for e in manifest["shards"]
        )
    )
