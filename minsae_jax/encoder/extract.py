"""Recordings through the encoder into stores of activations: `python -m minsae_jax extract`."""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import grain
import jax
import ml_dtypes
import numpy as np
from flax import nnx

from minsae_jax.activations.manifest import StoreIdentity
from minsae_jax.activations.writer import StoreWriter
from minsae_jax.eeg.recordings import Recordings, Split, Windows, open_recordings, warn_of
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.encoder.converted import Encoder, Precision, split_model
from minsae_jax.encoder.patchtst.model import Architecture, layer_index
from minsae_jax.errors import UserError
from minsae_jax.monitor import Bar, progress
from minsae_jax.parallel.mesh import (
    DATA,
    fetch_batch,
    make_local_mesh,
    put_batch,
    replicated,
    shard_over_batch,
)
from minsae_jax.parallel.processes import barrier, process_count, process_index

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CHECKED = 1 << 22  # numbers looked at for NaN at a time


@dataclass(frozen=True)
class Plan:
    """The stores to be written of one split, one a layer."""

    split: Split
    recordings: Recordings
    layers: tuple[int, ...]  # from 0
    writers: tuple[StoreWriter, ...]  # a layer each

    @property
    def windows(self) -> Windows:
        return self.recordings.windows


def extract(encoder: Encoder, settings: ExtractConfig) -> Iterator[str]:
    """Write the stores of every split and layer asked for, or what is missing of them; yields what to tell of each
    split.

    Raises UserError, before anything is written, on recordings that do not fit the encoder or hold NaN, on another
    store in a folder, and where the disk has no room.
    """
    plans = make_plans(encoder, settings)
    _refuse_full_disk(encoder.architecture, settings, plans)
    with ExitStack() as stack:
        for plan in plans:
            for writer in plan.writers:
                stack.enter_context(writer)
        for plan in plans:
            yield Extraction(encoder, settings, plan).run()


def make_plans(encoder: Encoder, settings: ExtractConfig) -> list[Plan]:
    """What is to be written, after a look at all recordings."""
    a = encoder.architecture
    layers = {layer_index(layer, a.n_layers): layer for layer in _layers(settings, a)}
    if len(layers) < len(_layers(settings, a)):
        raise UserError(
            f"--cache_layer names a layer twice: {' '.join(map(str, settings.cache_layer))}"
        )
    found = open_recordings(
        str(settings.root_path), settings.split, settings.split_seed, (a.seq_len, a.patch_len, a.n_vars),
        settings.max_batches and settings.max_batches * settings.batch_size, settings.on_bad_recording,
    )  # fmt: skip
    plans = []
    for split, recordings in zip(settings.split, found, strict=True):
        writers = tuple(
            StoreWriter(
                settings.store(split, layer),
                _identity(encoder, settings, split, recordings, layer, index),
                settings.overwrite,
            )
            for index, layer in layers.items()
        )
        plans.append(Plan(split, recordings, tuple(layers), writers))
    return plans


def _layers(settings: ExtractConfig, a: Architecture) -> list[int]:
    return (
        list(range(a.n_layers))
        if settings.cache_layer == ("all",)
        else [int(i) for i in settings.cache_layer]
    )


def _identity(
    encoder: Encoder,
    settings: ExtractConfig,
    split: Split,
    recordings: Recordings,
    layer: int,
    index: int,
) -> StoreIdentity:
    a = encoder.architecture
    return StoreIdentity(
        layer=layer,
        layer_index=index,
        dtype=settings.dtype,
        n_tokens=a.n_tokens,
        d_model=a.d_model,
        encoder=encoder.fingerprint,
        data={
            "split": split,
            "split_seed": settings.split_seed,
            "batch_size": settings.batch_size,
            "max_batches": settings.max_batches,
            "seq_len": a.seq_len,
            "patch_len": a.patch_len,
            "n_vars": a.n_vars,
            "revin": a.revin or settings.force_revin,
            "n_windows": len(recordings.windows),
            "recordings_sha256": recordings.sha256,
            "skipped": recordings.skipped,
            "precision": settings.precision,
        },
    )


def _refuse_full_disk(a: Architecture, settings: ExtractConfig, plans: list[Plan]) -> None:
    """Compare what is needed with what is free on each file system, before the start."""
    window_bytes = a.n_vars * a.n_tokens * a.d_model * np.dtype(DTYPES[settings.dtype]).itemsize
    needed: dict[int, tuple[Path, int]] = {}
    for plan in plans:
        for folder in (writer.folder for writer in plan.writers):
            there = sum(p.stat().st_size for p in folder.glob("b*.npy")) if folder.is_dir() else 0
            parent = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
            wanted = (
                needed.get(parent.stat().st_dev, (parent, 0))[1]
                + len(plan.windows) * window_bytes
                - there
            )
            needed[parent.stat().st_dev] = (parent, wanted)
    for parent, wanted in needed.values():
        free = shutil.disk_usage(parent).free
        if wanted > free:
            raise UserError(
                f"the activations need {wanted / 1e9:.1f} GB, but {parent} has {free / 1e9:.1f} GB free: make room, "
                "name another --out, or take --dtype bfloat16"
            )


class Extraction:
    """One split on its way into its stores.

    Windows are read ahead and shards written in the background, so that the devices always have a batch to work on.
    With several processes each does every n-th batch, and the stores are the same.
    """

    def __init__(self, encoder: Encoder, settings: ExtractConfig, plan: Plan):
        self.encoder, self.settings, self.plan, self.windows = encoder, settings, plan, plan.windows
        self.lost, self.began = (
            0.0,
            0.0,
        )  # seconds that this thread waited for reading or writing; when it began

    def run(self) -> str:
        """Returns what to tell."""
        writers, a = self.plan.writers, self.encoder.architecture
        for writer in writers:
            writer.begin()
        folders = " and ".join(str(writer.folder) for writer in writers)
        if all(w.finished for w in writers):
            return f"the store {folders} is finished already: {len(self.windows):,} windows of split {self.plan.split}"
        self._write(writers)
        return (
            f"{len(self.windows):,} windows of split {self.plan.split}, "
            f"{len(self.windows) * a.n_vars * a.n_tokens:,} tokens of d_model {a.d_model}, written to {folders}"
        )

    def _write(self, writers: tuple[StoreWriter, ...]) -> None:
        if process_index() == 0:
            warn_of(self.plan.recordings, self.plan.split)
        n_batches = -(-len(self.windows) // self.settings.batch_size)
        missing = [
            i for i in range(n_batches) if any(i not in w.done for w in writers if not w.finished)
        ]
        todo = missing[process_index() :: process_count()]
        with progress(f"extract {self.plan.split}", len(self.windows), "windows") as bar:
            bar.start_at(
                len(self.windows) - sum(stop - start for start, stop in map(self._bounds, missing))
            )
            with barrier(f"write the shards of split {self.plan.split}"):
                self._run_batches(todo, writers, bar)
        provenance = _provenance(self.plan.recordings)
        for writer in writers:
            if not writer.finished:
                writer.finish(provenance)

    def _run_batches(self, todo: list[int], writers: tuple[StoreWriter, ...], bar: Bar) -> None:
        settings, mesh = self.settings, make_local_mesh()
        params = jax.device_put(self.encoder.params, replicated(mesh))
        run = sharded_hidden(
            mesh, self.encoder.architecture, self.plan.layers, settings.force_revin, settings.dtype,
            settings.precision,
        )  # fmt: skip
        # All batches are padded to one shape, so that there is one compilation.
        rows_per_device = -(-min(settings.batch_size, len(self.windows)) // mesh.shape[DATA])
        self.began = time.perf_counter()
        batches = read_ahead(self.windows, [self._bounds(i) for i in todo])
        running: tuple[int, int, tuple[jax.Array, ...]] | None = None
        with ThreadPoolExecutor(1) as background:
            writing: Future[None] | None = None
            for number in [*todo, None]:
                started = None
                if number is not None:
                    x = self._waited_for(batches.__next__)
                    started = (number, len(x), run(params, put_batch(mesh, x, rows_per_device)))
                if running is not None:
                    jax.block_until_ready(running[2])
                    if writing:
                        self._waited_for(writing.result)
                    writing = background.submit(self._write_batch, *running, writers)
                    bar.advance(running[1])
                    bar.note(f"waiting {self.lost / (time.perf_counter() - self.began):.0%}")
                running = started
            if writing:
                self._waited_for(writing.result)

    def _write_batch(
        self,
        number: int,
        n_windows: int,
        outputs: tuple[jax.Array, ...],
        writers: tuple[StoreWriter, ...],
    ) -> None:
        for z, writer in zip(outputs, writers, strict=True):
            if writer.finished or number in writer.done:
                continue
            pieces = [p.reshape(-1, *p.shape[2:]) for p in fetch_batch(z, n_windows)]
            if not all(_is_finite(p) for p in pieces):
                raise UserError(
                    f"the encoder gives NaN or infinity in {self.settings.dtype} for windows from "
                    f"{number * self.settings.batch_size} on of split {self.plan.split}: see whether the recordings "
                    "are in SD"
                )
            writer.write(number, pieces)

    def _waited_for(self, get: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        got = get()
        self.lost += time.perf_counter() - began
        return got

    def _bounds(self, number: int) -> tuple[int, int]:
        start = number * self.settings.batch_size
        return start, min(start + self.settings.batch_size, len(self.windows))


class _Batches:
    """Windows between given bounds, for grain."""

    def __init__(self, windows: Windows, bounds: list[tuple[int, int]]):
        self.windows, self.bounds = windows, bounds

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.windows.read(*self.bounds[index])


def read_ahead(windows: Windows, bounds: list[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Windows [n, seq_len, n_vars] of each (start, stop), two at a time read by grain before they are asked for."""
    if not bounds:
        return iter(())
    batches = grain.MapDataset.source(_Batches(windows, bounds))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)))


@lru_cache(8)
def sharded_hidden(
    mesh: jax.sharding.Mesh, a: Architecture, layers: tuple[int, ...], force_revin: bool = False,
    dtype: str = "float32", precision: Precision = "float32",
) -> Callable[[Any, jax.Array], tuple[jax.Array, ...]]:  # fmt: skip
    """(params, windows) -> outputs of the layers as dtype, every device working on its own windows; compiled once
    for all splits. float32 precision is full float32, without TF32."""
    graph, _ = split_model(a, precision)

    def on_one_device(params, past_values):
        with jax.default_matmul_precision("highest" if precision == "float32" else "default"):
            outputs = nnx.merge(graph, params).hidden(past_values, layers, force_revin)
        return tuple(z.astype(DTYPES[dtype]) for z in outputs)

    return jax.jit(shard_over_batch(mesh, on_one_device))


def _is_finite(array: np.ndarray) -> bool:
    flat = array.reshape(-1)
    return all(np.isfinite(flat[i : i + CHECKED]).all() for i in range(0, len(flat), CHECKED))


def _provenance(recordings: Recordings) -> dict[str, np.ndarray]:
    """recordings [files] names; shifted [files]; of each sequence its recording (index of the name), window (number
    within the recording) and channel."""
    windows = recordings.windows
    places = np.repeat(windows.places(np.arange(len(windows))), windows.n_vars, axis=0).astype(
        np.int32
    )
    return {
        "recordings": np.array(windows.files),
        "shifted": recordings.shifted,
        "recording": places[:, 0],
        "window": places[:, 1],
        "channel": np.tile(np.arange(windows.n_vars, dtype=np.int32), len(windows)),
    }
