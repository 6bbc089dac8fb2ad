"""Recordings with a dataset.json: 30 channels at 200 Hz, with planted bursts on known channels."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minsae_jax.eeg.description import (
    Description,
    RecordingDescription,
    read_description,
    write_description,
)

RATE = 200
HZ = 12.0
N_CHANNELS = 30
N_PATIENTS = 10
SECONDS = 40
BURST = 200  # samples
# Rings around the vertex, at these angles from it, with these numbers of channels
RINGS = ((30.0, 8), (60.0, 10), (90.0, 12))
HEAD_RADIUS = 0.09  # m
HEAD_CENTRE = 0.04  # m above the point between the ears


@dataclass(frozen=True)
class Described:
    """Recordings and what was planted in them."""

    folder: Path
    names: tuple[str, ...]
    # The channels of the bursts, at the back of the head
    planted: tuple[str, ...]
    # First sample of each burst, by recording
    bursts: dict[str, list[int]]


def positions() -> list[tuple[float, float, float]]:
    """Return a point on a sphere for each channel; the first of a ring is at the front."""
    points = []
    for degrees, count in RINGS:
        angle = np.deg2rad(degrees)
        for azimuth in 2 * np.pi * np.arange(count) / count:
            x = np.sin(angle) * np.sin(azimuth)
            y = np.sin(angle) * np.cos(azimuth)
            point = HEAD_RADIUS * np.array([x, y, np.cos(angle)]) + [0, 0, HEAD_CENTRE]
            points.append(tuple(map(float, point)))
    return points


def read_described(folder: Path) -> Described:
    """Return what `write_described` planted in a folder."""
    bursts: dict[str, list[int]] = {}
    with (folder / "events.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            bursts.setdefault(row["recording"], []).append(int(row["start"]))
            planted = tuple(row["channels"].split())
    return Described(folder, read_description(folder).channels, planted, bursts)


def write_described(folder: Path) -> None:
    """Write recordings of white noise, of unit SD, with a burst every eight seconds."""
    names = tuple(f"E{i}" for i in range(1, N_CHANNELS + 1))
    places = np.array(positions())
    is_planted = places[:, 1] < -0.07
    planted = " ".join(np.array(names)[is_planted])
    rng = np.random.default_rng(0)
    recordings = {}
    rows = ["recording,event,start,stop,channels"]
    lengths = ["filename,time_len"]
    for patient in range(N_PATIENTS):
        name = f"p{patient:03d}_s001_t000_preprocessed.npy"
        n_samples = SECONDS * RATE
        eeg = rng.normal(size=(n_samples, N_CHANNELS))
        # Not on the grid of patches or windows, and seven seconds apart.
        starts = 1600 * np.arange(SECONDS * RATE // 1600) + rng.integers(200, 1200)
        t = np.arange(BURST) / RATE
        for start in starts:
            wave = 2.5 * np.hanning(BURST) * np.sin(2 * np.pi * HZ * t + rng.uniform(0, 6))
            eeg[start : start + BURST, is_planted] += wave[:, None]
            rows.append(f"{name},burst,{start},{start + BURST},{planted}")
        sd = eeg.std(axis=0)
        np.save(folder / name, (eeg / sd).astype(np.float32))
        lengths.append(f"{name},{n_samples}")
        recordings[name] = RecordingDescription(
            source=name,
            mean_uv=(0.0,) * N_CHANNELS,
            sd_uv=tuple((10 * sd).tolist()),
            bad_channels=(),
            interpolated_channels=(),
            original_sampling_rate=float(RATE),
            duration=float(SECONDS),
        )
    (folder / "events.csv").write_text("\n".join(rows) + "\n")
    (folder / "file_lengths_map.csv").write_text("\n".join(lengths) + "\n")
    description = Description(float(RATE), names, tuple(positions()), "SD", None, recordings)
    write_description(folder, description)
