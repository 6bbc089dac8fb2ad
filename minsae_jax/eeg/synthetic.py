"""Synthetic scalp EEG with planted, labelled events: `python -m minsae_jax demo`.

A recording is a background of spatially mixed pink-noise sources, plus events whose time and channels are known, so
that what an autoencoder finds can be held against what was planted. The demo encoder was pretrained on this law.
"""

import csv
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from jaxtyping import Float

from minsae_jax.eeg.montage import CHANNELS, POSITIONS
from minsae_jax.eeg.recordings import read_lengths
from minsae_jax.errors import UserError
from minsae_jax.settings import read_yaml, require, to_dict

SAMPLING_RATE = 100  # Hz
_OURS = re.compile(
    r"demo\d+_s\d+_t\d+_preprocessed\.npy|(file_lengths_map|events)\.csv|demo\.yaml|tuh_patient_splits_.*"
)
Wave = Callable[[int, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class DemoConfig:
    """Write synthetic EEG with planted, labelled events in the layout of the TUH corpus."""

    root_path: str = "data/demo/tuhab_preprocessed"
    """Folder to write: recordings, file_lengths_map.csv and events.csv."""
    patients: int = 16
    """Number of patients, with one or two recordings each."""
    minutes: float = 6.0
    """Mean length of a recording, in minutes at 100 Hz; lengths vary by a quarter."""
    seed: int = 0
    """Seed of everything random in the recordings."""
    overwrite: bool = False
    """Replace a folder written before with other settings."""

    def __post_init__(self) -> None:
        require(
            self.patients >= 10,
            f"--patients must be 10 or more, so that no split is empty, but is {self.patients}",
        )
        require(
            0.5 <= self.minutes <= 10_000,
            f"--minutes must be from 0.5 to 10,000, but is {self.minutes}",
        )
        require(self.seed >= 0, f"--seed must be 0 or more, but is {self.seed}")


@dataclass(frozen=True)
class Event:
    """One planted event; start and stop in samples, channels those that get at least half of its amplitude."""

    kind: str
    start: int
    stop: int
    channels: tuple[str, ...]


def field(x: float, y: float, width: float) -> Float[np.ndarray, "19"]:
    """Gaussian scalp field centred at (x, y): one weight a channel."""
    return np.exp(-((POSITIONS[:, 0] - x) ** 2 + (POSITIONS[:, 1] - y) ** 2) / (2 * width * width))


def pink(
    rng: np.random.Generator, channels: int, samples: int
) -> Float[np.ndarray, "channels samples"]:
    """Noise whose amplitude falls with frequency to the power 0.9, of SD 1."""
    f = np.fft.rfftfreq(samples, 1 / SAMPLING_RATE)
    spectrum = rng.normal(size=(channels, f.size)) + 1j * rng.normal(size=(channels, f.size))
    spectrum /= np.maximum(f, 0.5) ** 0.9
    spectrum[:, 0] = 0
    noise = np.fft.irfft(spectrum, samples, axis=1)
    return noise / noise.std(1, keepdims=True)


def _sine(hz: float, samples: int, phase: float = 0.0) -> np.ndarray:
    return np.hanning(samples) * np.sin(2 * np.pi * hz * np.arange(samples) / SAMPLING_RATE + phase)


def recording(
    seed: int | list[int], samples: int, rate_per_minute: float = 6.0
) -> tuple[Float[np.ndarray, "samples 19"], list[Event]]:
    """One recording, z-scored per channel, and its events in order of time."""
    rng = np.random.default_rng(seed)
    n = max(samples, 400)
    mix = np.stack(
        [field(rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0.3, 0.8)) for _ in range(10)],
        axis=1,
    )
    x = mix @ pink(rng, 10, n) + 0.3 * pink(rng, 19, n)
    alpha_hz, spindle_hz = rng.uniform(8.5, 11.5), rng.uniform(12, 14)
    kinds: list[tuple[str, int, Wave, np.ndarray]] = [  # name, samples, course, scalp field
        (
            "alpha",
            250,
            lambda k, r: 3 * _sine(alpha_hz, k, r.uniform(0, 6)),
            field(0.0, -0.95, 0.5),
        ),
        ("spindle", 100, lambda k, r: 2.5 * _sine(spindle_hz, k), field(0.0, 0.2, 0.5)),
        ("slow_wave", 120, lambda k, r: -4 * _sine(SAMPLING_RATE / k, k), field(0.0, 0.5, 0.6)),
        ("blink", 35, lambda k, r: 7 * np.hanning(k), field(0.0, 1.05, 0.35)),
        (
            "spike",
            30,
            lambda k, r: 7 * np.r_[np.hanning(8), -0.45 * np.hanning(k - 8)],
            field(-1.0, 0.05, 0.35),
        ),
        ("muscle", 80, lambda k, r: 2.2 * r.normal(size=k) * np.hanning(k), field(1.0, 0.1, 0.4)),
    ]
    events = []
    for kind, length, wave, weights in kinds:
        channels = tuple(np.array(CHANNELS)[weights >= weights.max() / 2].tolist())
        for start in rng.integers(
            0, n - length, rng.poisson(rate_per_minute * n / SAMPLING_RATE / 60)
        ):
            x[:, start : start + length] += np.outer(weights, wave(length, rng))
            events.append(Event(kind, int(start), min(int(start) + length, samples), channels))
    x = x[:, :samples]
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    return x.T.astype(np.float32), sorted(
        (e for e in events if e.start < samples), key=lambda e: e.start
    )


def write_demo(settings: DemoConfig) -> str:
    """Write the folder; returns what to tell. Raises UserError where another one is in its place."""
    folder = Path(settings.root_path)
    record = {k: v for k, v in to_dict(settings).items() if k not in ("root_path", "overwrite")}
    if folder.exists():
        foreign = sorted(p.name for p in folder.iterdir() if not _OURS.fullmatch(p.name))
        if foreign or not (folder / "demo.yaml").is_file():
            raise UserError(
                f"{folder} holds {foreign[0] if foreign else 'no demo.yaml'}, and so no demo: name another folder with "
                "--root_path"
            )
        if not settings.overwrite:
            before = read_yaml(folder / "demo.yaml")
            if before != record:
                raise UserError(
                    f"{folder} holds a demo of other settings ({before}): use --overwrite to replace it"
                )
            if _is_whole(folder):
                return f"the demo recordings are in {folder} already"
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        count, events = _write_recordings(aside, settings)
        (aside / "demo.yaml").write_text(yaml.safe_dump(record))
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return f"{count} recordings of {settings.patients} patients with {events} planted events written to {folder}"


def _is_whole(folder: Path) -> bool:
    """Whether every file is there, and of the length that is listed."""
    try:
        lengths = read_lengths(folder / "file_lengths_map.csv")
        return (folder / "events.csv").is_file() and all(
            len(np.load(folder / name, mmap_mode="r")) == length for name, length in lengths.items()
        )
    except (UserError, OSError, ValueError):
        return False


def _write_recordings(folder: Path, settings: DemoConfig) -> tuple[int, int]:
    rng = np.random.default_rng(settings.seed)
    lengths, rows = [], []
    for patient in range(settings.patients):
        for token in range(1 + patient % 2):
            name = f"demo{patient:04d}_s001_t{token:03d}_preprocessed.npy"
            samples = int(settings.minutes * 60 * SAMPLING_RATE * rng.uniform(0.75, 1.25))
            eeg, events = recording([settings.seed, patient, token], samples)
            np.save(folder / name, eeg)
            lengths.append((name, samples))
            rows += [(name, e.kind, e.start, e.stop, " ".join(e.channels)) for e in events]
    _write_csv(folder / "file_lengths_map.csv", ("filename", "time_len"), lengths)
    _write_csv(folder / "events.csv", ("recording", "event", "start", "stop", "channels"), rows)
    return len(lengths), len(rows)


def _write_csv(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    with path.open("w", newline="") as f:
        csv.writer(f).writerows([header, *rows])
