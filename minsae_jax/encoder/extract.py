"""Extraction: recordings through the encoder into stores of activations.

`extract` plans all stores, checks that they can be written, then runs one split after the other.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import grain
import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float

from minsae_jax.activations.manifest import StoreIdentity
from minsae_jax.activations.store import Store, open_store
from minsae_jax.activations.writer import StoreWriter
from minsae_jax.eeg.recordings import Recordings, Split, Windows, open_recordings, warn_of
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.encoder.converted import Encoder
from minsae_jax.encoder.patchtst.architecture import Architecture, layer_index
from minsae_jax.encoder.patchtst.pure import Params, Precision, bind
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
# Numbers per call of np.isfinite: its temporary array stays in the cache.
FINITE_CHECK_SIZE = 1 << 22

Result = TypeVar("Result")


@dataclass(frozen=True)
class ExtractedStore(Store):
    """A store that `extract` wrote, or that was complete already."""

    split: Split
    n_windows: int
    was_complete: bool


def extract(encoder: Encoder, config: ExtractConfig) -> list[ExtractedStore]:
    """Write the stores of all requested splits and layers, or the shards missing from them.

    Returns the stores by split, then by layer, in the order of the config. Raises UserError before
    anything is written if recordings do not fit the encoder or contain NaN, if a folder contains
    another store, or if the disk is too small.
    """
    plans = plan_extraction(encoder, config)
    _check_free_space(encoder.architecture, config, plans)
    stores = []
    # All folders are locked before the first write, since another process could start one of them.
    with ExitStack() as locks:
        for plan in plans:
            for writer in plan.writers:
                locks.enter_context(writer)
        for plan in plans:
            stores += Extraction(encoder, config, plan).run()
    return stores


@dataclass(frozen=True)
class SplitPlan:
    """The stores to write for one split, one per layer."""

    split: Split
    recordings: Recordings
    layers: tuple[int, ...]  # indices from 0
    writers: tuple[StoreWriter, ...]  # one per layer

    @property
    def windows(self) -> Windows:
        return self.recordings.windows


def plan_extraction(encoder: Encoder, config: ExtractConfig) -> list[SplitPlan]:
    """Read all recordings once and check that every store can be written."""
    a = encoder.architecture
    layers = _requested_layers(config, a.n_layers)
    max_windows = None
    if config.max_batches is not None:
        max_windows = config.max_batches * config.batch_size
    all_recordings = open_recordings(
        config.root_path,
        config.split,
        config.split_seed,
        (a.seq_len, a.patch_len, a.n_vars),
        max_windows,
        config.on_bad_recording,
    )
    plans = []
    for split, recordings in zip(config.split, all_recordings, strict=True):
        writers = []
        for index, layer in layers.items():
            identity = _store_identity(encoder, config, split, recordings, layer, index)
            writer = StoreWriter(config.store(split, layer), identity, config.overwrite)
            writers.append(writer)
        plans.append(SplitPlan(split, recordings, tuple(layers), tuple(writers)))
    return plans


def _requested_layers(config: ExtractConfig, n_layers: int) -> dict[int, int]:
    """Return index from 0 -> layer as requested. Raises UserError on duplicates."""
    if config.cache_layer == ("all",):
        return {i: i for i in range(n_layers)}
    requested = [int(layer) for layer in config.cache_layer]
    layers = {layer_index(layer, n_layers): layer for layer in requested}
    if len(layers) < len(requested):
        listed = " ".join(map(str, requested))
        raise UserError(f"--cache_layer contains duplicate layers: {listed}")
    return layers


def _store_identity(
    encoder: Encoder,
    config: ExtractConfig,
    split: Split,
    recordings: Recordings,
    layer: int,
    index: int,
) -> StoreIdentity:
    """Return what makes it this store and no other."""
    # Part of the store's format: stores with other names or values are refused.
    a = encoder.architecture
    return StoreIdentity(
        layer=layer,
        layer_index=index,
        dtype=config.dtype,
        n_tokens=a.n_tokens,
        d_model=a.d_model,
        encoder=encoder.fingerprint,
        data={
            "split": split,
            "split_seed": config.split_seed,
            "batch_size": config.batch_size,
            "max_batches": config.max_batches,
            "seq_len": a.seq_len,
            "patch_len": a.patch_len,
            "n_vars": a.n_vars,
            "revin": a.revin or config.force_revin,
            "n_windows": len(recordings.windows),
            "recordings_sha256": recordings.sha256,
            "skipped": recordings.skipped,
            "precision": config.precision,
        },
    )


def _check_free_space(a: Architecture, config: ExtractConfig, plans: list[SplitPlan]) -> None:
    """Raise UserError if a file system has less space than its stores still need."""
    window_bytes = a.n_vars * a.n_tokens * a.d_model * np.dtype(DTYPES[config.dtype]).itemsize
    # Stores on one file system share its free space, so they are added up by device number.
    needed: dict[Path, int] = {}
    folder_of_device: dict[int, Path] = {}
    for plan in plans:
        for writer in plan.writers:
            ancestors = (writer.folder, *writer.folder.absolute().parents)
            existing = next(path for path in ancestors if path.is_dir())
            place = folder_of_device.setdefault(existing.stat().st_dev, existing)
            written = sum(path.stat().st_size for path in writer.folder.glob("b*.npy"))
            missing = len(plan.windows) * window_bytes - written
            needed[place] = needed.get(place, 0) + missing
    for place, n_bytes in needed.items():
        free = shutil.disk_usage(place).free
        if n_bytes > free:
            raise UserError(
                f"the activations need {n_bytes / 1e9:.1f} GB, but {place} has {free / 1e9:.1f} GB "
                "free; free some space, choose another --out, or use --dtype bfloat16"
            )


@dataclass(frozen=True)
class RunningBatch:
    """A batch that the devices compute; `outputs` are [windows, n_vars, n_tokens, d_model]."""

    number: int
    n_windows: int
    outputs: tuple[jax.Array, ...]  # one per layer


class Extraction:
    """Extracts one split.

    Four things overlap: grain reads windows ahead, the devices compute a batch, this thread copies
    the batch before it to the host, and a background thread writes the one before that. With
    several processes each computes every n-th batch, and the stores are the same.
    """

    def __init__(self, encoder: Encoder, config: ExtractConfig, plan: SplitPlan):
        self.encoder = encoder
        self.config = config
        self.plan = plan
        self.windows = plan.windows
        self.n_batches = -(-len(self.windows) // config.batch_size)
        self.started_at = 0.0
        self.seconds_waited = 0.0  # for reading and writing, instead of computing
        self.writing: Future[None] | None = None

    def run(self) -> list[ExtractedStore]:
        """Write the missing shards and return the stores."""
        for writer in self.plan.writers:
            writer.begin()
        was_complete = [writer.finished for writer in self.plan.writers]
        if not all(was_complete):
            self._write_missing_shards()
            provenance = _provenance(self.plan.recordings)
            for writer in self._unfinished():
                writer.finish(provenance)
        return [
            self._open_extracted(writer.folder, complete)
            for writer, complete in zip(self.plan.writers, was_complete, strict=True)
        ]

    def _open_extracted(self, folder: Path, was_complete: bool) -> ExtractedStore:
        store = open_store(folder)
        # dataclasses.asdict would copy the shards into dicts.
        return ExtractedStore(
            **{field.name: getattr(store, field.name) for field in fields(store)},
            split=self.plan.split,
            n_windows=len(self.windows),
            was_complete=was_complete,
        )

    def _write_missing_shards(self) -> None:
        if process_index() == 0:
            warn_of(self.plan.recordings, self.plan.split)
        # A batch is computed if any of its layers lacks it: a store can be a shard ahead.
        missing = [number for number in range(self.n_batches) if self._writers_without(number)]
        n_missing_windows = sum(stop - start for start, stop in map(self._bounds, missing))
        with progress(f"extract {self.plan.split}", len(self.windows), "windows") as bar:
            bar.start_at(len(self.windows) - n_missing_windows)
            with barrier(f"write the shards of split {self.plan.split}"):
                self._run_batches(missing[process_index() :: process_count()], bar)

    def _run_batches(self, numbers: list[int], bar: Bar) -> None:
        config = self.config
        mesh = make_local_mesh()
        params = jax.device_put(self.encoder.params, replicated(mesh))
        compute = sharded_hidden(
            mesh,
            self.encoder.architecture,
            self.plan.layers,
            config.force_revin,
            config.dtype,
            config.precision,
        )
        # All batches are padded to one shape, so that there is one compilation.
        largest = min(config.batch_size, len(self.windows))
        windows_per_device = -(-largest // mesh.shape[DATA])
        batches = read_ahead(self.windows, [self._bounds(number) for number in numbers])
        self.started_at = time.perf_counter()
        with ThreadPoolExecutor(1) as background:
            running: RunningBatch | None = None
            for number in numbers:
                x = self._timed_wait(batches.__next__)
                # Returns at once: the devices compute while the batch before is copied.
                outputs = compute(params, put_batch(mesh, x, windows_per_device))
                if running is not None:
                    self._finish_batch(running, background, bar)
                running = RunningBatch(number, len(x), outputs)
            if running is not None:
                self._finish_batch(running, background, bar)
            self._wait_for_writing()

    def _finish_batch(self, batch: RunningBatch, background: ThreadPoolExecutor, bar: Bar) -> None:
        """Copy a batch to the host and hand it to the background thread."""
        jax.block_until_ready(batch.outputs)
        missing = self._writers_without(batch.number)
        host = [
            (writer, fetch_batch(z, batch.n_windows))
            for writer, z in zip(self.plan.writers, batch.outputs, strict=True)
            if writer in missing
        ]
        # At most one batch waits for the disk, so that memory stays bounded.
        self._wait_for_writing()
        self.writing = background.submit(self._write_batch, batch.number, host)
        bar.advance(batch.n_windows)
        waited = self.seconds_waited / (time.perf_counter() - self.started_at)
        bar.note(f"waiting {waited:.0%}")

    def _wait_for_writing(self) -> None:
        """Wait for the batch that is being written, and raise its error if it failed."""
        if self.writing is not None:
            self._timed_wait(self.writing.result)

    def _timed_wait(self, wait: Callable[[], Result]) -> Result:
        started_at = time.perf_counter()
        result = wait()
        self.seconds_waited += time.perf_counter() - started_at
        return result

    def _write_batch(self, number: int, host: list[tuple[StoreWriter, list[np.ndarray]]]) -> None:
        for writer, parts in host:
            if not all(_is_finite(part) for part in parts):
                raise UserError(
                    f"the encoder returned NaN or infinity in {self.config.dtype} for the windows "
                    f"from {number * self.config.batch_size} of split {self.plan.split}; check "
                    "that the recordings are in SD"
                )
            # [windows, n_vars, n_tokens, d_model] -> one sequence per window and channel
            writer.write(number, [part.reshape(-1, *part.shape[2:]) for part in parts])

    def _unfinished(self) -> list[StoreWriter]:
        return [writer for writer in self.plan.writers if not writer.finished]

    def _writers_without(self, number: int) -> list[StoreWriter]:
        """Return the writers that still need the shard of a batch."""
        return [writer for writer in self._unfinished() if number not in writer.done]

    def _bounds(self, number: int) -> tuple[int, int]:
        start = number * self.config.batch_size
        return start, min(start + self.config.batch_size, len(self.windows))


class _WindowBatches:
    """Windows between given bounds, as a random-access source for grain."""

    def __init__(self, windows: Windows, bounds: Sequence[tuple[int, int]]):
        self.windows = windows
        self.bounds = bounds

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> Float[np.ndarray, "windows seq_len n_vars"]:
        return self.windows.read(*self.bounds[index])


def read_ahead(windows: Windows, bounds: list[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Yield the windows [n, seq_len, n_vars] of each (start, stop), two batches read in advance."""
    if not bounds:
        return iter(())
    batches = grain.MapDataset.source(_WindowBatches(windows, bounds))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)))


@lru_cache(8)
def sharded_hidden(
    mesh: jax.sharding.Mesh,
    a: Architecture,
    layers: tuple[int, ...],
    force_revin: bool = False,
    dtype: str = "float32",
    precision: Precision = "float32",
) -> Callable[[Params, jax.Array], tuple[jax.Array, ...]]:
    """Return the compiled (params, windows) -> outputs of the layers, in `dtype`.

    Every device computes its own windows. float32 precision is full float32, without TF32. The
    cache makes all splits share one compilation.
    """
    matmul_precision = "highest" if precision == "float32" else "default"

    def on_one_device(params: Params, past_values: jax.Array) -> tuple[jax.Array, ...]:
        with jax.default_matmul_precision(matmul_precision):
            outputs = bind(a, params, precision).hidden(past_values, layers, force_revin)
        return tuple(z.astype(DTYPES[dtype]) for z in outputs)

    return jax.jit(shard_over_batch(mesh, on_one_device))


def _is_finite(array: np.ndarray) -> bool:
    flat = array.reshape(-1)
    starts = range(0, len(flat), FINITE_CHECK_SIZE)
    return all(np.isfinite(flat[i : i + FINITE_CHECK_SIZE]).all() for i in starts)


def _provenance(recordings: Recordings) -> dict[str, np.ndarray]:
    """Return the arrays of provenance.npz.

    Per file: `recordings` (names) and `shifted`. Per sequence: `recording` (index of the name),
    `window` (number within the recording) and `channel`.
    """
    windows = recordings.windows
    # A shard contains the channels of a window one after the other.
    places = windows.places(np.arange(len(windows)))
    per_sequence = np.repeat(places, windows.n_vars, axis=0).astype(np.int32)
    channels = np.arange(windows.n_vars, dtype=np.int32)
    return {
        "recordings": np.array(windows.files),
        "shifted": recordings.shifted,
        "recording": per_sequence[:, 0],
        "window": per_sequence[:, 1],
        "channel": np.tile(channels, len(windows)),
    }
