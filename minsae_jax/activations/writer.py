"""Writing a store, so that it can be cut off at any moment and goes on where it was."""

import hashlib
import io
import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from minsae_jax.activations.store import (
    FORMAT_VERSION,
    MANIFEST,
    PROVENANCE,
    SHARD_NAME,
    damages,
    read_manifest,
    sha256_of,
    shard_damage,
)
from minsae_jax.errors import UserError
from minsae_jax.files import atomic_write, lock_folder
from minsae_jax.parallel.processes import barrier, process_index

BLOCK = 1 << 20  # bytes hashed and written at a time, while they are in the cache
OTHERS = "manifest.*.json"  # what processes but the first note
_OURS = re.compile(rf"({SHARD_NAME.pattern}|{MANIFEST}|manifest\.\d+\.json|{PROVENANCE})(\.tmp)?")


def refuse_other_store(folder: Path, identity: dict[str, Any]) -> None:
    """Raise UserError where the folder holds a store that was begun with other settings, or shards of no manifest."""
    before = read_manifest(folder)
    if not before:
        refuse_foreign_files(folder)
        shards = (
            sorted(p.name for p in folder.iterdir() if SHARD_NAME.fullmatch(p.name))
            if folder.is_dir()
            else []
        )
        if shards:
            raise UserError(
                f"{folder} holds {shards[0]} without a manifest: name another --out, or use --overwrite"
            )
        return
    now = {k: v for k, v in identity.items() if k != "data"} | identity["data"]
    was = (
        {"precision": "float32", "skipped": {}}
        | {k: v for k, v in before.items() if k != "data"}
        | before["data"]
    )
    other = [
        f"{k} ({_short(was.get(k))}, now {_short(v)})" for k, v in now.items() if was.get(k) != v
    ]
    if other:
        raise UserError(
            f"{folder} holds a store of other settings: {', '.join(other)}; name another --out, or use --overwrite"
        )


def refuse_foreign_files(folder: Path) -> None:
    """Nothing but a store's own files is ever removed."""
    foreign = (
        sorted(p.name for p in folder.iterdir() if not _OURS.fullmatch(p.name))
        if folder.is_dir()
        else []
    )
    if foreign:
        raise UserError(f"{folder} holds {foreign[0]}, which is no store's: name another --out")


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text


class StoreWriter:
    """A store that is being written, from its beginning or from where it was left.

    `identity` is what makes it this store: layer, encoder, shapes, dtype, data. In a `with` the folder is locked;
    `begin` makes it this store, or raises UserError as `refuse_other_store` does, unless `overwrite` is asked for.

    Several processes may write shards of one store, all going through `begin` and `finish` together: the first keeps
    manifest.json, the n-th notes its shards in manifest.{n}.json, which are put together at the end, or at the next
    start.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], overwrite: bool = False):
        self.folder, self.identity, self.overwrite = folder, identity, overwrite
        self.process = process_index()
        self.finished, self.done, self.manifest = False, set[int](), dict[str, Any]()
        self._lock = ExitStack()

    def __enter__(self) -> "StoreWriter":
        if self.process == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(lock_folder(self.folder))
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def begin(self) -> None:
        """Find what is there: `finished`, or the numbers of the shards that are `done`."""
        with barrier(f"begin {self.folder}"):
            if self.process == 0:
                self._tidy_up()
        manifest = read_manifest(self.folder)
        self.finished = manifest["complete"]
        self.done = {_number(e) for e in manifest["shards"]}
        self.manifest = (
            manifest if self.process == 0 else {"identity": self._digest(), "shards": []}
        )

    def _tidy_up(self) -> None:
        """Make the folder a store that is finished, or one with whole shards only."""
        if self.overwrite:
            refuse_foreign_files(self.folder)
            self._forget_others()  # before there is a manifest that they might be taken to belong to
        else:
            refuse_other_store(self.folder, self.identity)
        before = {} if self.overwrite else read_manifest(self.folder)
        if before and before["complete"] and not any(damages(self.folder, before)):
            return self._forget_others()
        fresh = {"format_version": FORMAT_VERSION, "complete": False, **self.identity, "shards": []}
        self.manifest = before or fresh
        kept = [
            e for e in self._all_entries()
            if not shard_damage(self.folder / e["file"], e, self.manifest)
            and sha256_of(self.folder / e["file"]) == e["sha256"]
        ]  # fmt: skip
        self.manifest |= {"shards": kept, "complete": False}
        self._write_manifest()
        names = {e["file"] for e in kept} | {MANIFEST}
        for path in self.folder.iterdir():
            if path.name not in names and _OURS.fullmatch(path.name):
                path.unlink()

    def _all_entries(self) -> list[dict[str, Any]]:
        """The manifest's, and what other processes have noted of this very store, in order."""
        entries = {e["file"]: e for e in self.manifest["shards"]}
        for path in self.folder.glob(OTHERS):
            try:
                part = json.loads(path.read_text())
                if part["identity"] == self._digest():
                    entries = {e["file"]: e for e in part["shards"]} | entries
            except (ValueError, KeyError, TypeError):
                continue  # cut off: its shards are made again
        return sorted(entries.values(), key=_number)

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def _forget_others(self) -> None:
        for path in self.folder.glob(OTHERS):
            path.unlink()

    def write(
        self, number: int, pieces: Sequence[Shaped[np.ndarray, "sequences n_tokens d_model"]]
    ) -> None:
        """One shard, from pieces that follow one another along the first axis, of the store's dtype. Raises UserError
        where the disk does not take it."""
        path = self.folder / f"b{number:04d}.npy"
        try:
            entry = _write_shard(path, pieces)
            self.manifest["shards"].append(entry)
            self._write_manifest()
        except OSError as e:
            raise UserError(
                f"{path} could not be written ({e.strerror or e}): make room, and give the same command again, which "
                "goes on from here"
            ) from e
        self.done.add(number)

    def finish(self, provenance: dict[str, np.ndarray]) -> None:
        """Write the provenance, an entry a sequence in the shards' order, and declare the store complete."""
        with barrier(f"finish {self.folder}"):
            if self.process == 0:
                with atomic_write(self.folder / PROVENANCE) as aside, aside.open("wb") as f:
                    np.savez_compressed(f, allow_pickle=False, **provenance)
                self.manifest |= {"shards": self._all_entries(), "complete": True}
                self._write_manifest()
                self._forget_others()

    def _write_manifest(self) -> None:
        name = MANIFEST if self.process == 0 else f"manifest.{self.process}.json"
        with atomic_write(self.folder / name) as aside:
            aside.write_text(json.dumps(self.manifest, indent=1) + "\n")


def _write_shard(path: Path, pieces: Sequence[np.ndarray]) -> dict[str, Any]:
    """The shard's entry in the manifest."""
    arrays = [p.view(np.uint16) if p.dtype == ml_dtypes.bfloat16 else p for p in pieces]
    shape = (sum(len(p) for p in arrays), *arrays[0].shape[1:])
    header = io.BytesIO()
    described = {"descr": arrays[0].dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    digest = hashlib.sha256()
    with atomic_write(path) as aside:
        with aside.open("wb", buffering=0) as f:
            for content in (
                header.getbuffer(),
                *(np.ascontiguousarray(a).data.cast("B") for a in arrays),
            ):
                for start in range(0, len(content), BLOCK):
                    digest.update(content[start : start + BLOCK])
                    _write_all(f, content[start : start + BLOCK])
        size = aside.stat().st_size
    rows = shape[0] * shape[1]
    return {
        "file": path.name,
        "shape": list(shape),
        "rows": rows,
        "bytes": size,
        "sha256": digest.hexdigest(),
    }


def _write_all(file: IO[bytes], block: memoryview) -> None:
    """An unbuffered file may take less than it is given."""
    while len(block):
        block = block[file.write(block) :]


def _number(entry: dict[str, Any]) -> int:
    return int(entry["file"].removeprefix("b").removesuffix(".npy"))
