"""The store: activations of one encoder layer on disk, one file a batch of windows.

`b0000.npy`, `b0001.npy`, … hold [sequences, n_tokens, d_model]; bfloat16 is kept as its uint16 bits, since .npy has no
such type. `manifest.json` says what belongs, `provenance.npz` where each sequence came from. A folder without a
manifest, as minSAE writes it, is read too. Every file is written aside and renamed.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped

from minsae_jax.config import UserError
from minsae_jax.monitor import progress

FORMAT_VERSION = 1
MANIFEST, PROVENANCE = "manifest.json", "provenance.npz"
_NAME = re.compile(r"b(\d+)\.npy")
_OURS = re.compile(rf"({_NAME.pattern}|{MANIFEST}|{PROVENANCE})(\.tmp)?")


@dataclass(frozen=True)
class Shard:
    path: Path
    rows: int  # tokens: sequences * n_tokens
    sha256: str | None  # None where there is no manifest


@dataclass(frozen=True)
class Store:
    """An opened store. `manifest` is empty for a folder that minSAE wrote."""

    folder: Path
    shards: tuple[Shard, ...]
    d_model: int
    dtype: str  # of the numbers on disk: float32, float16, float64 or bfloat16
    manifest: Mapping[str, Any]
    _maps: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Tells stores apart: of the manifest, or of names and sizes where there is none."""
        content = self.manifest or [(s.path.name, s.rows, self.d_model) for s in self.shards]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def read(self, shard: int, start: int = 0, stop: int | None = None) -> Float[np.ndarray, "rows d_model"]:
        """Consecutive tokens of one shard as float32, whatever the store's dtype."""
        if shard not in self._maps:
            mapped = np.load(self.shards[shard].path, mmap_mode="r", allow_pickle=False)
            self._maps[shard] = mapped.view(np.ndarray).reshape(-1, self.d_model)
        rows = self._maps[shard][start:stop]
        return (rows.view(ml_dtypes.bfloat16) if self.dtype == "bfloat16" else rows).astype(np.float32)

    def verify(self) -> None:
        """Read every shard and compare its checksum. Raises UserError naming those that fail."""
        known = [s for s in self.shards if s.sha256]
        failed = []
        with (
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
            progress("verify store", len(known), "shards", delay=2.0) as bar,
        ):
            for shard, digest in zip(known, pool.map(_sha256, [s.path for s in known]), strict=True):
                bar.advance(1)
                if digest != shard.sha256:
                    failed.append(str(shard.path))
        if failed:
            raise UserError(f"{', '.join(failed[:5])} fails its checksum: extract the store again")


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _shard_files(folder: Path) -> list[Path]:
    """b*.npy in the order of their numbers, of however many digits."""
    numbered = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [p for _, p in sorted(numbered)]


def open_store(path: str | Path, layer: int | None = None) -> Store:
    """The store in a folder of shards, or in the l{layer} of a folder of stores.

    Sizes are checked; checksums only by `Store.verify`. Raises UserError where there is no finished, whole store.
    """
    folder = Path(path)
    if layer is not None and (folder / f"l{layer}").is_dir():
        folder = folder / f"l{layer}"
    if not folder.is_dir():
        raise UserError(f"there is no store {folder}: make one with `python -m minsae_jax extract`")
    files = _shard_files(folder)
    manifest = read_manifest(folder)
    if not manifest:
        if not files:
            layers = sorted(p.name for p in folder.iterdir() if p.is_dir() and re.fullmatch(r"l-?\d+", p.name))
            held = f"it holds {', '.join(layers)}" if layers else "it holds no b0000.npy"
            raise UserError(f"there is no store of layer {layer} in {folder}: {held}")
        return _without_manifest(folder, files)
    if not manifest["complete"]:
        raise UserError(f"the store {folder} is unfinished: run the extract command that began it again")
    if layer is not None and layer not in (manifest["layer"], manifest["layer_index"]):
        raise UserError(f"the store {folder} is of layer {manifest['layer']}, not {layer}")
    listed = {entry["file"]: entry for entry in manifest["shards"]}
    strange = [p for p in files if p.name not in listed]
    if strange:
        raise UserError(f"{strange[0]} is not in the manifest of its store: remove it, or extract the store again")
    shards = tuple(Shard(folder / name, e["rows"], e["sha256"]) for name, e in listed.items())
    for shard, entry in zip(shards, listed.values(), strict=True):
        if problem := _damage(shard.path, entry):
            raise UserError(f"{problem}: extract the store again")
    return Store(folder, shards, manifest["d_model"], manifest["dtype"], manifest)


def _damage(path: Path, entry: Mapping[str, Any]) -> str | None:
    """Why a shard cannot be the one in the manifest, from its size and header."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path} is missing"
    if size != entry["bytes"]:
        return f"{path} has {size} bytes instead of {entry['bytes']}"
    return None


def _without_manifest(folder: Path, files: list[Path]) -> Store:
    shards, kinds = [], set()
    for path in files:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as e:
            raise UserError(f"{path} is no .npy array, or a damaged one ({' '.join(str(e).split())})") from e
        if array.ndim < 2 or array.dtype.kind != "f" or array.size == 0:
            raise UserError(
                f"{path} must hold [sequences, n_tokens, d_model] floats, but is {array.dtype}{list(array.shape)}"
            )
        shards.append(Shard(path, array.size // array.shape[-1], None))
        kinds.add((array.shape[-1], str(array.dtype)))
    if len(kinds) > 1:
        raise UserError(f"the shards in {folder} do not belong together: (d_model, dtype) is {sorted(kinds)}")
    d_model, dtype = kinds.pop()
    return Store(folder, tuple(shards), d_model, dtype, {})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, or {} where there is none."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format_version"]
        known = manifest.keys() >= {"complete", "layer", "layer_index", "dtype", "d_model", "encoder", "data", "shards"}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged ({type(e).__name__}): extract the store again with --overwrite") from e
    if version > FORMAT_VERSION:
        raise UserError(f"{folder} was written by a newer minsae_jax (format {version}): update")
    if not known:
        raise UserError(f"{path} lacks entries: extract the store again with --overwrite")
    return manifest


class StoreWriter:
    """Writes a store, or goes on with one that was begun with the same settings.

    `identity` is what makes it this store: layer, encoder, shapes, dtype, data. Raises UserError where another store,
    or files without a manifest, are in the folder and `overwrite` is not asked for.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], overwrite: bool = False):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._refuse_foreign_files(overwrite)
        before = {} if overwrite else read_manifest(folder)
        if before:
            self._refuse_other(before, identity)
        self.finished = bool(before) and before["complete"] and not any(self._damages(before))
        self.manifest = before or {"format_version": FORMAT_VERSION, "complete": False, **identity, "shards": []}
        if not self.finished:
            self._begin()

    def _refuse_foreign_files(self, overwrite: bool) -> None:
        """Nothing but a store's own files is ever removed, and shards without a manifest only when asked for."""
        names = {path.name for path in self.folder.iterdir()}
        foreign = sorted(name for name in names if not _OURS.fullmatch(name))
        if foreign:
            raise UserError(f"{self.folder} holds {foreign[0]}, which is no store's: name another --out")
        if names and MANIFEST not in names and not overwrite:
            raise UserError(
                f"{self.folder} holds {min(names)} without a manifest: name another --out, or use --overwrite"
            )

    def _refuse_other(self, before: dict[str, Any], identity: dict[str, Any]) -> None:
        flat = {k: v for k, v in identity.items() if k != "data"} | identity["data"]
        was = {k: v for k, v in before.items() if k != "data"} | before["data"]
        other = [f"{k} ({_short(was.get(k))}, now {_short(v)})" for k, v in flat.items() if was.get(k) != v]
        if other:
            raise UserError(
                f"{self.folder} holds a store of other settings: {', '.join(other)}; "
                "name another --out, or use --overwrite"
            )

    def _damages(self, manifest: Mapping[str, Any]) -> Iterable[str | None]:
        return (_damage(self.folder / e["file"], e) for e in manifest["shards"])

    def _begin(self) -> None:
        """Keep the shards that are whole, remove what else a broken run left."""
        kept = [
            e for e in self.manifest["shards"]
            if not _damage(self.folder / e["file"], e) and _sha256(self.folder / e["file"]) == e["sha256"]
        ]  # fmt: skip
        self.manifest |= {"shards": kept, "complete": False}
        self._write_manifest()
        names = {e["file"] for e in kept} | {MANIFEST}
        for path in self.folder.iterdir():
            if path.name not in names:
                path.unlink()

    @property
    def done(self) -> set[int]:
        """Numbers of the shards that are there."""
        return {int(_NAME.fullmatch(e["file"])[1]) for e in self.manifest["shards"]}  # type: ignore[index]

    def write(self, number: int, activations: Shaped[np.ndarray, "sequences n_tokens d_model"]) -> None:
        """One shard; `activations` is of the store's dtype."""
        array = activations.view(np.uint16) if activations.dtype == ml_dtypes.bfloat16 else activations
        path = self.folder / f"b{number:04d}.npy"
        aside = path.with_name(path.name + ".tmp")
        with aside.open("wb") as f:
            np.save(f, array)
        entry = {
            "file": path.name,
            "shape": list(array.shape),
            "rows": array.shape[0] * array.shape[1],
            "bytes": aside.stat().st_size,
            "sha256": _sha256(aside),
        }
        aside.rename(path)
        self.manifest["shards"].append(entry)
        self._write_manifest()

    def finish(self, provenance: dict[str, np.ndarray]) -> None:
        """Write the provenance, an entry a sequence in the shards' order, and declare the store complete."""
        aside = self.folder / (PROVENANCE + ".tmp")
        with aside.open("wb") as f:
            np.savez_compressed(f, allow_pickle=False, **provenance)
        aside.rename(self.folder / PROVENANCE)
        self.manifest["shards"].sort(key=lambda e: int(_NAME.fullmatch(e["file"])[1]))  # type: ignore[index]
        self.manifest["complete"] = True
        self._write_manifest()

    def _write_manifest(self) -> None:
        aside = self.folder / (MANIFEST + ".tmp")
        aside.write_text(json.dumps(self.manifest, indent=1) + "\n")
        aside.rename(self.folder / MANIFEST)


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text
