"""Large runs and stores: seconds to start, open files, memory, and bytes of metrics on the disk.

    python -m benchmarks.sizes members     200 SAEs in one sweep
    python -m benchmarks.sizes shards      a store of 20,000 shards
    python -m benchmarks.sizes features    an SAE of 131,072 features with 10,000 log intervals

Everything is written to a temporary folder. All three can run under `ulimit -n 64`.
"""

import os
import resource
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np

from minsae_jax.activations.manifest import StoreIdentity
from minsae_jax.activations.store import open_store
from minsae_jax.activations.tokens import TokenGrid
from minsae_jax.activations.writer import StoreWriter
from minsae_jax.monitor import frequencies
from minsae_jax.parallel.processes import start_jax
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.trainer import train

N_SHARDS = 20_000
N_FEATURES = 131_072
N_INTERVALS = 10_000
D_MODEL = 128  # of the demo's encoder
STEPS = 4  # until a run is stopped


class Enough(Exception):
    """Raised to stop a run."""


class OpenFiles:
    """The largest number of open files, looked up every few milliseconds by a thread."""

    def __init__(self) -> None:
        self.most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "OpenFiles":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            # One of them is this listing.
            self.most = max(self.most, len(os.listdir("/proc/self/fd")) - 1)


def report_line(what: str, started: tuple[float, float], files: OpenFiles) -> None:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    wall = time.perf_counter() - started[0]
    cpu = time.process_time() - started[1]
    print(
        f"{what}: {wall:.1f} s wall, {cpu:.1f} s CPU; at most {files.most} open files, "
        f"{memory:.2f} GB",
        flush=True,
    )


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def write_store(folder: Path, n_shards: int, n_sequences: int, d_model: int) -> Path:
    """Write a store as `extract` does, except that nothing is flushed to the disk."""
    x = np.random.default_rng(0).normal(size=(n_sequences, 4, d_model)).astype(np.float32)
    identity = StoreIdentity(
        layer=-1,
        layer_index=0,
        dtype="float32",
        n_tokens=4,
        d_model=d_model,
        encoder="0" * 64,
        data={"split": "train"},
    )
    with mock.patch("os.fsync"), StoreWriter(folder / "l-1", identity) as writer:
        writer.begin()
        for number in range(n_shards):
            writer.write(number, [x])
        places = np.zeros(n_shards * n_sequences, np.int32)
        provenance = {"recordings": np.array(["r"]), "shifted": np.zeros(1, bool)}
        provenance |= dict.fromkeys(("recording", "window", "channel"), places)
        writer.finish(provenance, TokenGrid.patches(4, 4))
    return folder


def run_until_stopped(settings: TrainConfig) -> None:
    """Train for STEPS steps, and print seconds and open files of the first and of all."""

    def on_step(step: int) -> None:
        if step == 1:
            report_line("first step", started, files)
        if step == STEPS:
            raise Enough

    with OpenFiles() as files:
        started = clocks()
        try:
            train(settings, on_step=on_step)
        except Enough:
            report_line(f"{STEPS} steps", started, files)


def measure_members(folder: Path) -> None:
    store = write_store(folder / "store", n_shards=4, n_sequences=1000, d_model=16)
    settings = TrainConfig(
        store=str(store),
        run_dir=str(folder / "run"),
        lambda_sparsity=tuple(range(1, 21)),
        seed=tuple(range(10)),
        feature_dim_factor=(2.0,),
        num_steps=40,
        batch_size=256,
        eval_window=1,
        checkpoint_every=2,
    )
    run_until_stopped(settings)


def measure_shards(folder: Path) -> None:
    store = write_store(folder / "store", N_SHARDS, n_sequences=1, d_model=16)
    with OpenFiles() as files:
        started = clocks()
        opened = open_store(store, -1)
        report_line(f"open {N_SHARDS:,} shards", started, files)
        started = clocks()
        opened.verify()
        report_line("compare their checksums", started, files)
    settings = TrainConfig(
        store=str(store),
        run_dir=str(folder / "run"),
        num_steps=40,
        batch_size=256,
        eval_window=1,
    )
    run_until_stopped(settings)


def measure_features(folder: Path) -> None:
    store = write_store(folder / "store", n_shards=4, n_sequences=500, d_model=D_MODEL)
    settings = TrainConfig(
        store=str(store),
        feature_dim_factor=(N_FEATURES / D_MODEL,),
        num_steps=N_INTERVALS,
        batch_size=512,
        eval_window=1,
        checkpoint_every=N_INTERVALS,
    )
    stride = frequencies.interval_stride(N_FEATURES, N_INTERVALS)
    for name, max_csv in (("act_freqs.npy", frequencies.MAX_CSV_NUMBERS), ("act_freqs.csv", 2**62)):
        run = folder / name
        with mock.patch.object(frequencies, "MAX_CSV_NUMBERS", max_csv):
            run_until_stopped(replace(settings, run_dir=str(run)))
        member = next((run / "members").iterdir())
        with (member / name).open("rb") as file:
            n_header = len(file.readline())
            size = file.seek(0, os.SEEK_END)
        # Metrics are fetched one step late.
        n_rows, n_all_rows = STEPS - 1, N_INTERVALS
        if name == "act_freqs.npy":
            # Of the first intervals, only one has a row.
            n_rows, n_all_rows = 1, -(-N_INTERVALS // stride)
        per_row = (size - n_header) / n_rows
        total = (n_header + n_all_rows * per_row) / 1e9
        print(
            f"{name}: {size:,} bytes after {STEPS - 1} log intervals, {per_row:,.0f} per row, "
            f"{n_all_rows:,} rows or {total:.2f} GB after {N_INTERVALS:,}"
        )


MEASUREMENTS = {
    "members": measure_members,
    "shards": measure_shards,
    "features": measure_features,
}


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in MEASUREMENTS:
        sys.exit(__doc__)
    start_jax()
    with tempfile.TemporaryDirectory() as folder:
        MEASUREMENTS[sys.argv[1]](Path(folder))


if __name__ == "__main__":
    main()
