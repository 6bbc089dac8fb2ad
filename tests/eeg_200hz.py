"""Described recordings for encoders other than those of the TUH corpus."""

from pathlib import Path

import numpy as np

from minsae_jax.eeg.description import Description, write_description

CHANNELS = ("FP1", "C3", "CZ", "O2")
N_SAMPLES = 1500  # two windows of 600, and a rest
N_PATIENTS = 12


def write_recordings(folder: Path, **changes) -> Path:
    """Write short recordings of four channels at 200 Hz in µV / 100, with dataset.json."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["filename,time_len"]
    for patient in range(N_PATIENTS):
        name = f"p{patient:02d}_s001_t000_preprocessed.npy"
        samples = 0.2 * rng.normal(size=(N_SAMPLES, 4)).cumsum(axis=0)
        samples -= samples.mean(0)
        np.save(folder / name, (samples / 4).astype(np.float32))
        lines.append(f"{name},{N_SAMPLES}")
    (folder / "file_lengths_map.csv").write_text("\n".join(lines) + "\n")
    settings = {
        "sampling_rate": 200.0,
        "channels": CHANNELS,
        "positions": (None,) * 4,
        "unit": "100 uV",
    }
    write_description(folder, Description(**settings | changes))
    return folder
