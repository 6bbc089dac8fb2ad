"""Preparing EDF files against MNE's own functions, called one after the other.

    python -m benchmarks.prepare [--quick]

The files have 19 channels at 256 Hz for 30 minutes (--quick: one minute). MNE reads a file, and
filters, references, resamples and z-scores it as a whole; `prepare` does the same and also checks
the signals. Prints Markdown.
"""

import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import mne
import numpy as np

from benchmarks.timing import alternate, machine
from minsae_jax import PrepareConfig, prepare
from minsae_jax.eeg.montage import CHANNELS

FILES = 8
RATE = 256.0
FILTERS = {"l_freq": 0.5, "h_freq": 45.0, "notch": (60.0,)}


def write_file(path: Path, seconds: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    signals = rng.normal(0, 2e-5, size=(len(CHANNELS), int(seconds * RATE)))
    raw = mne.io.RawArray(signals, mne.create_info(list(CHANNELS), RATE, "eeg"), verbose="ERROR")
    mne.export.export_raw(path, raw, verbose="ERROR")


def run_mne(source: Path, has_filters: bool) -> None:
    for path in sorted(source.iterdir()):
        raw = mne.io.read_raw(path, preload=True, verbose="ERROR")
        if has_filters:
            raw.filter(FILTERS["l_freq"], FILTERS["h_freq"], verbose="ERROR")
            raw.notch_filter(FILTERS["notch"], verbose="ERROR")
        raw.set_eeg_reference("average", verbose="ERROR").resample(100, verbose="ERROR")
        x = raw.get_data()
        x = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)
        np.save(path.parent.with_name("mne.npy"), x.T.astype(np.float32))


def run_prepare(source: Path, has_filters: bool, jobs: int) -> None:
    out = source.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    settings = FILTERS if has_filters else {}
    prepare(PrepareConfig(source=(str(source),), out=str(out), jobs=jobs, **settings))


def main(quick: bool) -> None:
    seconds = 60 if quick else 1800
    rounds = 1 if quick else 3
    print(f"{machine()}, mne {mne.__version__}: {FILES} files of {seconds} s\n")
    print("| | MNE, s | prepare, s | prepare --jobs 2, s |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        for seed in range(FILES):
            write_file(source / f"p{seed}.edf", seconds, seed)
        for name, has_filters in (("resampling", False), ("band-pass, notch, resampling", True)):
            contestants = {"mne": partial(run_mne, source, has_filters)}
            for jobs in (1, 2):
                contestants[str(jobs)] = partial(run_prepare, source, has_filters, jobs)
            times = alternate(contestants, rounds)
            print(f"| {name} | " + " | ".join(f"{time:.2f}" for time in times.values()) + " |")


if __name__ == "__main__":
    main("--quick" in sys.argv)
