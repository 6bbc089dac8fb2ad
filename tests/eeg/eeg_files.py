"""EEG files that tests write, and `prepare` of them."""

from collections.abc import Sequence
from pathlib import Path

import mne
import numpy as np

from minsae_jax import PrepareConfig, prepare

NEW_NAMES = ("Fp1", "Fp2", "F7", "F3", "Fz", "F4", "F8", "T7", "C3", "Cz", "C4", "T8", "P7", "P3",
             "Pz", "P4", "P8", "O1", "O2")  # fmt: skip
SECONDS = 20


def make_raw(
    names: Sequence[str] = NEW_NAMES, rate: float = 256.0, seed: int = 0, seconds: int = SECONDS
) -> mne.io.RawArray:
    """Return EEG-like noise with drifts and offsets, in volts, and three annotations."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=(len(names), int(seconds * rate)))
    drifts = np.cumsum(steps, axis=1)
    drifts *= 30 / drifts.std()
    signals = 5 * steps + drifts + rng.normal(0, 50, (len(names), 1))
    info = mne.create_info(list(names), rate, "eeg")
    raw = mne.io.RawArray(signals * 1e-6, info, verbose="ERROR")
    onsets = [2.0, 5.5, seconds - 0.2]
    raw.set_annotations(mne.Annotations(onsets, [0.5, 0.0, 0.0], ["spike", "blink", "end"]))
    return raw


def write_file(raw: mne.io.BaseRaw, path: Path) -> Path:
    """Write an EEG file in the format of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".fif":
        raw.save(path, verbose="ERROR")
    else:
        mne.export.export_raw(path, raw, overwrite=True, verbose="ERROR")
    return path


def run(source: Path | Sequence[Path], out: Path, **settings):
    if isinstance(source, Path):
        source = [source]
    return prepare(PrepareConfig(source=tuple(map(str, source)), out=str(out), **settings))


def load(folder: Path) -> np.ndarray:
    (path,) = folder.glob("*.npy")
    return np.load(path)
