"""Preparing EDF files against MNE's own functions, called one after the other.

    python -m benchmarks.prepare [--quick | NUMBER_OF_FILES]

The files have 19 channels at 256 Hz for 30 minutes (--quick: two of one minute). MNE reads a file,
filters, references, resamples and z-scores it as a whole; `prepare` does the same and also checks
the signals. The last two columns are of the command line, with the start of its processes. Prints
Markdown.
"""

import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import mne
import numpy as np

from benchmarks.timing import alternate, machine
from minsae_jax import PrepareConfig, prepare
from minsae_jax.eeg.montage import CHANNELS

N_FILES = 16
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


def run_prepare(source: Path, has_filters: bool) -> None:
    out = source.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    settings = FILTERS if has_filters else {}
    prepare(PrepareConfig(source=(str(source),), out=str(out), **settings))


def run_command(source: Path, has_filters: bool, jobs: int) -> None:
    """Run the command line, so that processes do not import this module and JAX."""
    out = source.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    words = ["prepare", str(source), "--out", str(out), "--jobs", str(jobs)]
    if has_filters:
        words += ["--l_freq", "0.5", "--h_freq", "45", "--notch", "60"]
    command = [sys.executable, "-m", "minsae_jax", *words]
    subprocess.run(command, check=True, capture_output=True)


def main(n_files: int, quick: bool) -> None:
    seconds = 60 if quick else 1800
    rounds = 1 if quick else 3
    print(f"{machine()}, mne {mne.__version__}: {n_files} files of {seconds} s\n")
    print("| | MNE, s | prepare, s | command --jobs 1, s | command --jobs 2, s |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        for seed in range(n_files):
            write_file(source / f"p{seed}.edf", seconds, seed)
        for name, has_filters in (("resampling", False), ("band-pass, notch, resampling", True)):
            contestants = {
                "mne": partial(run_mne, source, has_filters),
                "prepare": partial(run_prepare, source, has_filters),
                "one job": partial(run_command, source, has_filters, 1),
                "two jobs": partial(run_command, source, has_filters, 2),
            }
            times = alternate(contestants, rounds)
            print(f"| {name} | " + " | ".join(f"{time:.2f}" for time in times.values()) + " |")


if __name__ == "__main__":
    quick = "--quick" in sys.argv
    numbers = [int(word) for word in sys.argv[1:] if word.isdecimal()]
    main(*(numbers or [2 if quick else N_FILES]), quick)
