"""Extraction: recordings through the encoder into stores of activations.

`extract` checks that all stores can be written (`plan.py`), then runs one split after the other.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path

import grain
import jax
import numpy as np
from jaxtyping import Float

from minsae_jax.activations.store import Store, open_store
from minsae_jax.activations.writer import StoreWriter
from minsae_jax.eeg.recordings import Windows, recordings_folder
from minsae_jax.eeg.scan import Recordings, warn_of
from minsae_jax.eeg.splits import Split, patient_of
from minsae_jax.encoder.base import BaseEncoder, ComputeOptions, EncoderSpec, differs
from minsae_jax.encoder.compute import Activations, Output
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.encoder.plan import SplitPlan, check_free_space, plan_extraction
from minsae_jax.errors import UserError
from minsae_jax.locks import lock_folder
from minsae_jax.monitor import Bar, Throughput, progress
from minsae_jax.parallel.processes import barrier

# Numbers per call of np.isfinite: its temporary array stays in the cache.
FINITE_CHECK_SIZE = 1 << 22


@dataclass(frozen=True)
class ExtractedStore(Store):
    """A store that `extract` wrote, or that was complete already."""

    split: Split
    n_windows: int
    n_recordings: int
    n_patients: int
    was_complete: bool


def extract(encoder: BaseEncoder, config: ExtractConfig) -> list[ExtractedStore]:
    """Write the stores of all requested splits and layers, or the shards missing from them.

    Returns the stores by split, then by layer, in the order of the config. Raises UserError before
    anything is written if recordings do not fit the encoder or contain NaN, if a folder contains
    another store, or if the disk is too small.
    """
    options = ComputeOptions(config.precision, config.force_revin)
    encoder.check_options(options)
    stores = []
    with ExitStack() as locks:
        recordings = recordings_folder(Path(config.root_path))
        locks.enter_context(lock_folder(recordings, shared=True))
        plans = plan_extraction(encoder, config, options)
        check_free_space(encoder.spec, config, plans)
        compute = Activations(encoder, plans[0].layers, config.dtype, options)
        # All are locked before the first write, since another process could start one of them.
        for plan in plans:
            for writer in plan.writers:
                locks.enter_context(writer)
        for plan in plans:
            stores += Extraction(compute, config, plan, encoder.is_named).run()
    return stores


@dataclass(frozen=True)
class RunningBatch:
    """A batch that the devices compute."""

    number: int
    n_windows: int
    outputs: tuple[Output, ...]  # one per layer


class Extraction:
    """Extracts one split.

    Four things overlap: grain reads windows ahead, the devices compute a batch, this thread copies
    the batch before it to the host, and a background thread writes the one before that. With
    several processes each computes every n-th batch, and the stores are the same.
    """

    def __init__(
        self, compute: Activations, config: ExtractConfig, plan: SplitPlan, is_named: bool
    ):
        self.compute = compute
        self.is_named = is_named
        self.config = config
        self.plan = plan
        self.windows = plan.windows
        self.n_batches = -(-len(self.windows) // config.batch_size)
        self.throughput = Throughput(0)
        self.writing: Future[None] | None = None

    def run(self) -> list[ExtractedStore]:
        """Write the missing shards and return the stores."""
        for writer in self.plan.writers:
            writer.begin()
        if self.is_named:
            with barrier(f"compare the encoder with split {self.plan.split}"):
                if jax.process_index() == 0:
                    self._compare_with_written()
        was_complete = [writer.finished for writer in self.plan.writers]
        if not all(was_complete):
            self._write_missing_shards()
            provenance = _provenance(self.plan.recordings, self.compute.spec)
            for writer in self._unfinished():
                writer.finish(provenance, self.compute.spec.tokens)
        return [
            self._open_extracted(writer.folder, complete)
            for writer, complete in zip(self.plan.writers, was_complete, strict=True)
        ]

    def _open_extracted(self, folder: Path, was_complete: bool) -> ExtractedStore:
        store = open_store(folder)
        windows = self.windows
        # Others are shorter than a window.
        used = [file for file, n in zip(windows.files, windows.counts, strict=True) if n]
        # dataclasses.asdict would copy the shards into dicts.
        return ExtractedStore(
            **{field.name: getattr(store, field.name) for field in fields(store)},
            split=self.plan.split,
            n_windows=len(windows),
            n_recordings=len(used),
            n_patients=len({patient_of(file) for file in used}),
            was_complete=was_complete,
        )

    def _compare_with_written(self) -> None:
        """Raise UserError if the encoder returns other activations than a shard in each store.

        It is for encoders whose fingerprint is the same after their weights have changed.
        """
        largest = min(self.config.batch_size, len(self.windows))
        for i, writer in enumerate(self.plan.writers):
            if not writer.done:
                continue
            number = min(writer.done)
            # The whole batch, since the function may depend on the other windows.
            x = self.windows.read(*self._bounds(number))
            output = self.compute.start(x, largest)[i]
            actual = np.concatenate(self.compute.fetch(output, len(x))).astype(np.float32)
            if differs(actual, writer.read(number)):
                raise UserError(
                    f"{writer.folder} contains other activations than the function returns now, "
                    "under the same name; if its weights or settings have changed, choose another "
                    "name and --out, or use --overwrite"
                )

    def _write_missing_shards(self) -> None:
        if jax.process_index() == 0:
            warn_of(self.plan.recordings, self.plan.split)
        # A batch is computed if any of its layers lacks it: a store can be a shard ahead.
        missing = [number for number in range(self.n_batches) if self._writers_without(number)]
        n_missing_windows = sum(stop - start for start, stop in map(self._bounds, missing))
        with progress(f"extract {self.plan.split}", len(self.windows), "windows") as bar:
            bar.start_at(len(self.windows) - n_missing_windows)
            with barrier(f"write the shards of split {self.plan.split}"):
                self._run_batches(missing[jax.process_index() :: jax.process_count()], bar)

    def _run_batches(self, numbers: list[int], bar: Bar) -> None:
        largest = min(self.config.batch_size, len(self.windows))
        batches = read_ahead(self.windows, [self._bounds(number) for number in numbers])
        with ThreadPoolExecutor(1) as background:
            running: RunningBatch | None = None
            for number in numbers:
                with self.throughput.waiting():
                    x = next(batches)
                # Returns at once: the devices compute while the batch before is copied.
                outputs = self.compute.start(x, largest)
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
            (writer, self.compute.fetch(z, batch.n_windows))
            for writer, z in zip(self.plan.writers, batch.outputs, strict=True)
            if writer in missing
        ]
        # At most one batch waits for the disk, so that memory stays bounded.
        self._wait_for_writing()
        self.writing = background.submit(self._write_batch, batch.number, host)
        bar.advance(batch.n_windows)
        # For reading and writing, instead of computing
        waited = self.throughput.recent(0)["waiting"]
        bar.note(f"waiting {waited:.0%}")

    def _wait_for_writing(self) -> None:
        """Wait for the batch that is being written, and raise its error if it failed."""
        if self.writing is not None:
            with self.throughput.waiting():
                self.writing.result()

    def _write_batch(self, number: int, host: list[tuple[StoreWriter, list[np.ndarray]]]) -> None:
        for writer, parts in host:
            if not all(_is_finite(part) for part in parts):
                raise UserError(
                    f"the encoder returned NaN or infinity in {self.config.dtype} for the windows "
                    f"from {number * self.config.batch_size} of split {self.plan.split}; check "
                    "that the recordings are in SD"
                )
            writer.write(number, parts)

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


def _is_finite(array: np.ndarray) -> bool:
    flat = array.reshape(-1)
    starts = range(0, len(flat), FINITE_CHECK_SIZE)
    return all(np.isfinite(flat[i : i + FINITE_CHECK_SIZE]).all() for i in starts)


def _provenance(recordings: Recordings, spec: EncoderSpec) -> dict[str, np.ndarray]:
    """Return the arrays of provenance.npz.

    Per file: `recordings` (names) and `shifted`. Per sequence: `recording` (index of the name),
    `window` (number within the recording) and `channel`, -1 if a sequence is a whole window.
    """
    windows = recordings.windows
    places = windows.places(np.arange(len(windows))).astype(np.int32)
    per_sequence = np.repeat(places, spec.n_sequences, axis=0)
    channels = np.array([-1], np.int32)
    if spec.per_channel:
        # A shard contains the channels of a window one after the other.
        channels = np.arange(spec.n_vars, dtype=np.int32)
    return {
        "recordings": np.array(windows.files),
        "shifted": recordings.shifted,
        "recording": per_sequence[:, 0],
        "window": per_sequence[:, 1],
        "channel": np.tile(channels, len(windows)),
    }
