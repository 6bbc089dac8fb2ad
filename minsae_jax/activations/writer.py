"""Writing a store, so that it can be cut off at any moment and goes on where it was."""

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from minsae_jax.activations.shards import (
    FORMAT_VERSION,
    MANIFEST,
    PROVENANCE,
    SHARD_NAME,
    damages,
    read_manifest,
    sha256_of,
    shard_damage,
)
from minsae_jax.config import UserError
from minsae_jax.files import locked, written_aside

_OURS = re.compile(rf"({SHARD_NAME.pattern}|{MANIFEST}|{PROVENANCE})(\.tmp)?")


def refuse_other_store(folder: Path, identity: dict[str, Any]) -> None:
    """Raise UserError where the folder holds a store that was begun with other settings, or shards of no manifest."""
    before = read_manifest(folder)
    if not before:
        refuse_foreign_files(folder)
        shards = sorted(p.name for p in folder.iterdir() if SHARD_NAME.fullmatch(p.name)) if folder.is_dir() else []
        if shards:
            raise UserError(f"{folder} holds {shards[0]} without a manifest: name another --out, or use --overwrite")
        return
    now = {k: v for k, v in identity.items() if k != "data"} | identity["data"]
    was = {k: v for k, v in before.items() if k != "data"} | before["data"]
    other = [f"{k} ({_short(was.get(k))}, now {_short(v)})" for k, v in now.items() if was.get(k) != v]
    if other:
        raise UserError(
            f"{folder} holds a store of other settings: {', '.join(other)}; name another --out, or use --overwrite"
        )


def refuse_foreign_files(folder: Path) -> None:
    """Nothing but a store's own files is ever removed."""
    foreign = sorted(p.name for p in folder.iterdir() if not _OURS.fullmatch(p.name)) if folder.is_dir() else []
    if foreign:
        raise UserError(f"{folder} holds {foreign[0]}, which is no store's: name another --out")


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text


class StoreWriter:
    """A store that is being written, from its beginning or from where it was left.

    `identity` is what makes it this store: layer, encoder, shapes, dtype, data. Use it in a `with`: the folder is
    locked. Raises UserError as `refuse_other_store` does, unless `overwrite` is asked for.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], overwrite: bool = False):
        self.folder, self.identity, self.overwrite = folder, identity, overwrite
        self._lock = ExitStack()

    def __enter__(self) -> "StoreWriter":
        if self.overwrite:
            refuse_foreign_files(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(locked(self.folder))
            if not self.overwrite:
                refuse_other_store(self.folder, self.identity)
            before = {} if self.overwrite else read_manifest(self.folder)
            self.finished = bool(before) and before["complete"] and not any(damages(self.folder, before))
            fresh = {"format_version": FORMAT_VERSION, "complete": False, **self.identity, "shards": []}
            self.manifest = before or fresh
            if not self.finished:
                self._begin()
            self._lock = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _begin(self) -> None:
        """Keep the shards that are whole, remove what else a broken run left."""
        kept = [
            e for e in self.manifest["shards"]
            if not shard_damage(self.folder / e["file"], e, self.manifest)
            and sha256_of(self.folder / e["file"]) == e["sha256"]
        ]  # fmt: skip
        self.manifest |= {"shards": kept, "complete": False}
        self._write_manifest()
        names = {e["file"] for e in kept} | {MANIFEST}
        for path in self.folder.iterdir():
            if path.name not in names and _OURS.fullmatch(path.name):
                path.unlink()

    @property
    def done(self) -> set[int]:
        """Numbers of the shards that are there."""
        return {_number(e) for e in self.manifest["shards"]}

    def write(self, number: int, activations: Shaped[np.ndarray, "sequences n_tokens d_model"]) -> None:
        """One shard; `activations` is of the store's dtype."""
        array = activations.view(np.uint16) if activations.dtype == ml_dtypes.bfloat16 else activations
        path = self.folder / f"b{number:04d}.npy"
        with written_aside(path) as aside:
            with aside.open("wb") as f:
                np.save(f, array)
            entry = {
                "file": path.name,
                "shape": list(array.shape),
                "rows": array.shape[0] * array.shape[1],
                "bytes": aside.stat().st_size,
                "sha256": sha256_of(aside),
            }
        self.manifest["shards"].append(entry)
        self._write_manifest()

    def finish(self, provenance: dict[str, np.ndarray]) -> None:
        """Write the provenance, an entry a sequence in the shards' order, and declare the store complete."""
        with written_aside(self.folder / PROVENANCE) as aside, aside.open("wb") as f:
            np.savez_compressed(f, allow_pickle=False, **provenance)
        self.manifest["shards"].sort(key=_number)
        self.manifest["complete"] = True
        self._write_manifest()

    def _write_manifest(self) -> None:
        with written_aside(self.folder / MANIFEST) as aside:
            aside.write_text(json.dumps(self.manifest, indent=1) + "\n")


def _number(entry: dict[str, Any]) -> int:
    return int(entry["file"].removeprefix("b").removesuffix(".npy"))
