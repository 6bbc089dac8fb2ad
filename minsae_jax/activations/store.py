"""The store: activations of one encoder layer on disk, one file per batch of windows.

`b0000.npy`, `b0001.npy`, … have the shape [sequences, n_tokens, d_model]; bfloat16 is saved as its
uint16 bits, since .npy has no such type. `manifest.json` lists the files, `provenance.npz` the
recording, window and channel of each sequence. Folders without a manifest, as minSAE writes them,
can be read too.
"""

import bisect
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from warnings import warn

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped

from minsae_jax.activations.manifest import Manifest, read_manifest
from minsae_jax.activations.shards import (
    PROVENANCE,
    find_damage,
    read_bytes,
    read_header,
    shard_files,
)
from minsae_jax.checksums import read_npz
from minsae_jax.eeg.splits import patient_of
from minsae_jax.errors import UserError
from minsae_jax.files import sha256_of
from minsae_jax.monitor import progress
from minsae_jax.parallel.processes import WHOLE, Share

CHUNK_TOKENS = 256  # consecutive tokens per read; single tokens are a hundred times slower
LAYER_FOLDER = re.compile(r"l-?\d+")
RERUN = "rerun `extract` to write the missing files"


def store_folder(out: str | Path, split: str, layer: int) -> Path:
    """Return the folder for the shards of a split and layer; train has no suffix.

    >>> store_folder("embeddings/store/", "val", -1).as_posix()
    'embeddings/store_val/l-1'
    """
    # A path has no / at its end.
    base = Path(out)
    if split != "train":
        base = Path(f"{base}_{split}")
    return base / f"l{layer}"


def sibling_store(store: Path, split: str = "val") -> Path | None:
    """Return the absolute path of another split's store, or None for the root folder.

    `store` may be the folder of one layer or the folder of all layers. Links are not followed.

    >>> sibling_store(Path("/embeddings/store/l-1")).as_posix()
    '/embeddings/store_val/l-1'
    """
    store = store.absolute()
    base = store
    if LAYER_FOLDER.fullmatch(store.name):
        base = store.parent
    if not base.name:
        return None
    return base.with_name(f"{base.name}_{split}") / store.relative_to(base)


@dataclass(frozen=True)
class Origin:
    """Encoder and layer of activations; a field is None if a folder without a manifest lacks it."""

    encoder: str | None = None  # fingerprint
    layer: int | None = None  # as requested
    layer_index: int | None = None  # from 0
    revin: bool | None = None  # whether the encoder's input was normalized by RevIN
    # Skipped recordings and why, if no manifest on disk lists them.
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Shard:
    path: Path
    total_tokens: int  # sequences * n_tokens
    offset: int  # bytes before the first number in the file
    sha256: str | None  # None without a manifest


@dataclass(frozen=True)
class Store:
    """An open store."""

    folder: Path
    shards: tuple[Shard, ...] = field(repr=False)
    d_model: int
    dtype_on_disk: str  # float32, float16, bfloat16, or any float without a manifest
    # None for a folder that minSAE wrote
    manifest: Manifest | None = field(repr=False)

    def require_manifest(self) -> Manifest:
        """Return the manifest. Raises UserError for a folder that minSAE wrote."""
        if self.manifest is None:
            raise UserError(
                f"the store {self.folder} has no manifest with the source of its tokens; write it "
                "with `minsae extract`"
            )
        return self.manifest

    @property
    def origin(self) -> Origin:
        if self.manifest is None:
            return Origin()
        return Origin(
            encoder=self.manifest.encoder,
            layer=self.manifest.layer,
            layer_index=self.manifest.layer_index,
            revin=self.manifest.data.get("revin"),
        )

    @property
    def total_tokens(self) -> int:
        return sum(self.tokens_per_shard)

    @property
    def tokens_per_shard(self) -> list[int]:
        return [shard.total_tokens for shard in self.shards]

    @property
    def tokens_per_chunk(self) -> int:
        return CHUNK_TOKENS

    @property
    def n_chunks(self) -> int:
        """Number of chunks; the last chunk of a shard can be shorter."""
        return self._chunk_starts[-1]

    @cached_property
    def _chunk_starts(self) -> list[int]:
        """The number of the first chunk of each shard, and that after the last chunk."""
        chunks_per_shard = [-(-tokens // CHUNK_TOKENS) for tokens in self.tokens_per_shard]
        return list(accumulate(chunks_per_shard, initial=0))

    @cached_property
    def shard_starts(self) -> list[int]:
        """The number of the first token of each shard, and that after the last token."""
        return list(accumulate(self.tokens_per_shard, initial=0))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, or of shard names and sizes without a manifest."""
        if self.manifest is not None:
            return self.manifest.fingerprint
        shards = [(shard.path.name, shard.total_tokens, self.d_model) for shard in self.shards]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()

    @property
    def dtype(self) -> np.dtype:
        """Dtype after reading: half precision is preserved, any other becomes float32."""
        # Half precision is converted on the device: the host moves half the bytes.
        half = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
        return np.dtype(half.get(self.dtype_on_disk, np.float32))

    @cached_property
    def _file_dtype(self) -> np.dtype:
        if self.dtype_on_disk == "bfloat16":
            return np.dtype(ml_dtypes.bfloat16)
        return np.dtype(self.dtype_on_disk)

    def read(
        self, shard: int, start: int = 0, stop: int | None = None
    ) -> Shaped[np.ndarray, "tokens d_model"]:
        """Return consecutive tokens of one shard."""
        start, stop, _ = slice(start, stop).indices(self.shards[shard].total_tokens)
        tokens = np.empty((stop - start, self.d_model), self.dtype)
        self.read_into(tokens, shard, start)
        return tokens

    def read_chunks(
        self, chunks: Sequence[int], out: Shaped[np.ndarray, "capacity d_model"]
    ) -> int:
        """Read chunks one after the other into `out` and return the number of tokens."""
        total = 0
        for chunk in chunks:
            shard, start, stop = self._place_of_chunk(chunk)
            self.read_into(out[total : total + stop - start], shard, start)
            total += stop - start
        return total

    def tokens_in_chunk(self, chunk: int) -> int:
        _, start, stop = self._place_of_chunk(chunk)
        return stop - start

    def _place_of_chunk(self, chunk: int) -> tuple[int, int, int]:
        """Return the shard of a chunk, and its first token there and the one after its last."""
        shard = bisect.bisect_right(self._chunk_starts, chunk) - 1
        start = (chunk - self._chunk_starts[shard]) * CHUNK_TOKENS
        return shard, start, min(start + CHUNK_TOKENS, self.shards[shard].total_tokens)

    def read_rows(self, start: int, stop: int) -> Float[np.ndarray, "tokens d_model"]:
        """Return consecutive tokens by their numbers in the store, across shards."""
        tokens = np.empty((stop - start, self.d_model), self.dtype)
        shard = bisect.bisect_right(self.shard_starts, start) - 1
        while start < stop:
            n_read = len(tokens) - (stop - start)
            end = min(stop, self.shard_starts[shard + 1])
            part = tokens[n_read : n_read + end - start]
            self.read_into(part, shard, start - self.shard_starts[shard])
            start = end
            shard += 1
        return tokens

    def read_into(self, out: Shaped[np.ndarray, "tokens d_model"], shard: int, start: int) -> None:
        """Read consecutive tokens of one shard, from number `start` there, into `out`."""
        if not len(out):
            return  # a memoryview cannot be empty
        target = out
        if self._file_dtype != out.dtype:
            target = np.empty(out.shape, self._file_dtype)
        offset = self.shards[shard].offset + start * self.d_model * self._file_dtype.itemsize
        # As bytes, since a memoryview cannot have the dtype bfloat16.
        read_bytes(self.shards[shard].path, target.view(np.uint8).data.cast("B"), offset)
        if target is not out:
            # The assignment converts the dtype.
            out[:] = target

    def recordings(self) -> set[str]:
        """Return the file names of the recordings; none for a folder that minSAE wrote."""
        if self.manifest is None:
            return set()
        return set(read_npz(self.folder / PROVENANCE)["recordings"].tolist())

    def verify(self, share: Share = WHOLE) -> None:
        """Read a share of the shards and compare their checksums.

        Raises UserError listing those that differ.
        """
        start, stop = share.bounds(len(self.shards))
        shards = [shard for shard in self.shards[start:stop] if shard.sha256]
        paths = [shard.path for shard in shards]
        failed = []
        with (
            # Threads run in parallel here: hashlib releases the GIL.
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
            progress("verify store", len(shards), "shards", delay=2.0) as bar,
        ):
            for shard, digest in zip(shards, pool.map(sha256_of, paths), strict=True):
                bar.advance(1)
                if digest != shard.sha256:
                    failed.append(str(shard.path))
        if failed:
            raise UserError(f"{', '.join(failed[:5])} fails its checksum: remove it, then {RERUN}")


def open_store(path: str | Path, layer: int | None = None) -> Store:
    """Open the store in a folder of shards, or in l{layer} of a folder of stores.

    layer: needed if there are several. Headers and sizes are checked; checksums only by
    `Store.verify`. Raises UserError if the store is missing, incomplete or damaged, or of another
    layer.
    """
    folder = Path(path)
    layers = _layer_folders(folder)
    if layer is None and len(layers) == 1:
        folder = folder / layers[0]
    elif layer is not None:
        name = _folder_of_layer(folder, layers, layer)
        folder = folder if name is None else folder / name
    if not folder.is_dir():
        raise UserError(f"there is no store {folder}; write one with `minsae extract`")
    manifest = read_manifest(folder)
    if manifest is None:
        return _open_without_manifest(folder, layer)
    if not manifest.complete:
        raise UserError(f"the store {folder} is incomplete; {RERUN}")
    if layer is not None and not manifest.is_layer(layer):
        raise UserError(f"the store {folder} is of layer {manifest.layer}, not {layer}")
    problem = next(find_damage(folder, manifest), None)
    if problem:
        raise UserError(f"{problem}, then {RERUN}")
    shards = []
    for entry in manifest.shards:
        file = folder / entry.file
        shards.append(Shard(file, entry.total_tokens, read_header(file).offset, entry.sha256))
    return Store(
        folder=folder,
        shards=tuple(shards),
        d_model=manifest.d_model,
        dtype_on_disk=manifest.dtype,
        manifest=manifest,
    )


def _layer_folders(folder: Path) -> list[str]:
    """Return the names of the folders of layers, such as l-1, in a folder of stores."""
    names = sorted(path.name for path in folder.glob("l*") if path.is_dir())
    return [name for name in names if LAYER_FOLDER.fullmatch(name)]


def _folder_of_layer(folder: Path, layers: Sequence[str], layer: int) -> str | None:
    """Return the one of a store's folders of layers with this layer, or None."""
    if f"l{layer}" in layers:
        return f"l{layer}"
    # A layer that was extracted as -1 may be requested by its number from 0, and vice versa.
    for name in layers:
        manifest = read_manifest(folder / name)
        if manifest is not None and manifest.is_layer(layer):
            return name
    return None


def _open_without_manifest(folder: Path, layer: int | None) -> Store:
    files = shard_files(folder)
    if not files:
        layers = _layer_folders(folder)
        content = ", ".join(layers) or "no b0000.npy"
        missing = "no store" if layer is None else f"no store of layer {layer}"
        advice = ""
        if layers and layer is not None:
            advice = (
                "; choose one of these with `train --cache_layer`, or write it with "
                f"`extract --cache_layer {layer}`"
            )
        raise UserError(f"there is {missing} in {folder}: it contains {content}{advice}")
    shards: list[Shard] = []
    for path in files:
        shape, dtype, offset = read_header(path)
        if len(shape) < 2 or dtype.kind != "f" or 0 in shape:
            raise UserError(
                f"{path} must be [sequences, n_tokens, d_model] floats, but is {dtype}{list(shape)}"
            )
        # All shards must be like the first.
        if not shards:
            d_model = shape[-1]
            dtype_name = str(dtype)
        if (shape[-1], str(dtype)) != (d_model, dtype_name):
            raise UserError(
                f"{path} has d_model {shape[-1]} and dtype {dtype}, but {files[0].name} has "
                f"d_model {d_model} and dtype {dtype_name}; remove the shards of another store"
            )
        shards.append(Shard(path, math.prod(shape[:-1]), offset, None))
    return Store(
        folder=folder,
        shards=tuple(shards),
        d_model=d_model,
        dtype_on_disk=dtype_name,
        manifest=None,
    )


def warn_of_common_patients(held_out: Store, train_recordings: set[str]) -> None:
    """Warn if patients are in both stores, as after `extract` with two --split_seed.

    train_recordings: file names of the recordings that members are trained on.
    """
    patients = set(map(patient_of, held_out.recordings()))
    common = patients & set(map(patient_of, train_recordings))
    if common:
        warn(
            f"{len(common)} of the {len(patients)} patients in {held_out.folder} have names of "
            f"patients in the train store (such as {min(common)}); if they are the same people, "
            "measures on them are too good: extract all splits with the same --split_seed",
            stacklevel=3,
        )
