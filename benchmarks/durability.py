"""The cost of flushing to the disk in extraction and training: `python -m benchmarks.durability`.

Both run as they are and with `os.fsync` that does nothing, in alternation. TensorStore's own
flushes of a checkpoint's arrays, which Orbax asks for in any case, remain in both. Training has a
checkpoint every 250 steps, twice as often as the demo. Prints Markdown; --quick runs everything
once, small.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from benchmarks.extract import CHECKPOINT, write_recordings
from benchmarks.timing import machine
from convert.encoder import convert_encoder
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.encoder.extract import extract
from minsae_jax.parallel.processes import start_jax
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.trainer import train


@dataclass
class Cost:
    """Seconds of the wall clock and of all cores, and calls of fsync with their seconds."""

    wall: float
    cpu: float
    calls: int
    seconds: float  # summed over threads, so that they may overlap with the work


@contextmanager
def counted(flushes: bool) -> Iterator[list[float]]:
    """Yield a list to which each flush adds its seconds; without `flushes` they do nothing."""
    fsync = os.fsync
    seconds: list[float] = []

    def run(descriptor: int) -> None:
        started = time.perf_counter()
        if flushes:
            fsync(descriptor)
        seconds.append(time.perf_counter() - started)

    with patch("os.fsync", run):
        yield seconds


def measure(run: Callable[[], object], flushes: bool) -> Cost:
    # What earlier runs have written must not be flushed in this one.
    os.sync()
    with counted(flushes) as seconds:
        wall = time.perf_counter()
        cpu = time.process_time()
        run()
        cpu = time.process_time() - cpu
        wall = time.perf_counter() - wall
    return Cost(wall, cpu, len(seconds), sum(seconds))


def compare(name: str, run: Callable[[], object], rounds: int) -> None:
    """Print the medians with and without flushes as a row of the table."""
    run()  # compiles
    with_flushes = []
    without = []
    for _ in range(rounds):
        with_flushes.append(measure(run, True))
        without.append(measure(run, False))
    wall = median_of("wall", with_flushes)
    cpu = median_of("cpu", with_flushes)
    wall_without = median_of("wall", without)
    cpu_without = median_of("cpu", without)
    calls = with_flushes[0].calls
    seconds = median_of("seconds", with_flushes)
    print(
        f"| {name} | {wall:.2f} | {wall_without:.2f} | {cpu:.2f} | {cpu_without:.2f} "
        f"| {cpu / cpu_without - 1:+.1%} | {calls} | {seconds:.3f} | {seconds / wall:.1%} |",
        flush=True,
    )


def median_of(field: str, costs: list[Cost]) -> float:
    return statistics.median(getattr(cost, field) for cost in costs)


def main() -> None:
    quick = "--quick" in sys.argv
    rounds = 1 if quick else 3
    start_jax()
    encoder, _ = convert_encoder(CHECKPOINT, CHECKPOINT.with_suffix(".yaml"))
    print(f"{machine()}; medians of {rounds} rounds\n")
    print("| | wall, s | without | CPU, s | without | CPU | flushes | their s | of wall |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "recordings"
        write_recordings(root, encoder.architecture, 64 if quick else 256)
        extraction = ExtractConfig(
            root_path=str(root),
            checkpoint_path=str(CHECKPOINT),
            out=f"{folder}/store",
            batch_size=32,
            split=("all",),
            overwrite=True,
        )
        compare("extraction", lambda: extract(encoder, extraction), rounds)
        training = TrainConfig(
            store=f"{folder}/store",
            run_dir=f"{folder}/run",
            lambda_sparsity=(0.5, 1.0, 2.0, 5.0),
            feature_dim_factor=(8.0,),
            num_steps=40 if quick else 500,
            batch_size=1024,
            checkpoint_every=20 if quick else 250,
            overwrite=True,
        )
        compare("training", lambda: train(training), rounds)


if __name__ == "__main__":
    main()
