"""Synthetic scalp EEG with planted, labelled events: `python -m minsae_jax demo`.

A recording is a background of spatially mixed pink-noise sources plus events with known times and
channels, so features of an autoencoder can be compared with them. The demo encoder was pretrained
on recordings of this generator.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import yaml
from jaxtyping import Bool, Float

from minsae_jax.checksums import SUMS, files_below, write_checksums
from minsae_jax.eeg.events import EVENTS, Event, write_events
from minsae_jax.eeg.montage import CHANNELS, POSITIONS
from minsae_jax.eeg.recordings import LABELS, LENGTHS, SAMPLING_RATE, load_recording, read_lengths
from minsae_jax.eeg.synthetic_edf import write_edf
from minsae_jax.errors import UserError
from minsae_jax.files import foreign_entries, replaced_folder
from minsae_jax.settings import NonNegative, Range, check_ranges, read_yaml

SETTINGS = "demo.yaml"
OWNED_FILES = (
    "demo[0-9]*_s[0-9]*_t[0-9]*_preprocessed.npy",
    "demo[0-9]*_s[0-9]*_t[0-9]*.edf",
    LENGTHS,
    EVENTS,
    LABELS,
    SETTINGS,
    SUMS,
    "tuh_patient_splits_*",
)
MIN_SAMPLES = 400  # longer than every event
EVENTS_PER_MINUTE = 6.0  # of each kind
MORE_SPINDLES = 3.0  # times as many, in patients with this label


@dataclass(frozen=True, kw_only=True)
class DemoOutput:
    """Output"""

    root_path: str = "data/demo/tuhab_preprocessed"
    """Folder to write: recordings, file_lengths_map.csv and events.csv."""
    edf: bool = False
    """Write EDF files with annotations, for `prepare`, instead of preprocessed recordings."""
    labels: bool = False
    """Plant a label: half of the patients get three times as many spindles. Writes labels.csv with
    it (more_spindles) and with age and sex, which have no effect."""
    overwrite: bool = False
    """Replace a demo that was written with other settings."""


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """Recordings"""

    patients: Annotated[int, Range(min=10)] = 16
    """Number of patients, with one or two recordings each; with fewer than 10, val is empty."""
    minutes: Annotated[float, Range(min=0.5, max=10_000)] = 6.0
    """Mean length of a recording, in minutes at 100 Hz; lengths vary by a quarter."""
    seed: Annotated[int, NonNegative] = 0
    """Seed of everything random in the recordings."""


# Bases in reverse order: dataclasses list the fields of the last base first.
@dataclass(frozen=True, kw_only=True)
class DemoConfig(DemoSize, DemoOutput):
    """Write synthetic EEG with planted, labelled events in the layout of the TUH corpus."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Demo:
    """A folder of demo recordings."""

    folder: Path
    n_patients: int
    n_recordings: int
    n_events: int
    hours: float  # of all recordings
    is_new: bool  # False if it was there already


class EventKind(NamedTuple):
    """How one kind of event is planted."""

    name: str
    length: int  # samples
    weights: Float[np.ndarray, "19"]  # amplitude on each channel
    wave: Callable[[int, np.random.Generator], np.ndarray]  # (length, rng) -> course in time


def field(x: float, y: float, width: float) -> Float[np.ndarray, "19"]:
    """Return a Gaussian scalp field centred at (x, y): one weight per channel."""
    squared_distance = (POSITIONS[:, 0] - x) ** 2 + (POSITIONS[:, 1] - y) ** 2
    return np.exp(-squared_distance / (2 * width * width))


def pink(
    rng: np.random.Generator, channels: int, samples: int
) -> Float[np.ndarray, "channels samples"]:
    """Return noise of SD 1 whose amplitude is proportional to frequency ** -0.9."""
    hz = np.fft.rfftfreq(samples, 1 / SAMPLING_RATE)
    spectrum = rng.normal(size=(channels, hz.size)) + 1j * rng.normal(size=(channels, hz.size))
    # Flat below 0.5 Hz, or slow drifts would outweigh everything else.
    spectrum /= np.maximum(hz, 0.5) ** 0.9
    spectrum[:, 0] = 0
    noise = np.fft.irfft(spectrum, samples, axis=1)
    return noise / noise.std(1, keepdims=True)


def _sine(hz: float, samples: int, phase: float = 0.0) -> np.ndarray:
    angle = 2 * np.pi * hz * np.arange(samples) / SAMPLING_RATE + phase
    return np.hanning(samples) * np.sin(angle)


def _event_kinds(alpha_hz: float, spindle_hz: float) -> list[EventKind]:
    def alpha(n: int, rng: np.random.Generator) -> np.ndarray:
        return 3 * _sine(alpha_hz, n, rng.uniform(0, 6))

    def spindle(n: int, rng: np.random.Generator) -> np.ndarray:
        return 2.5 * _sine(spindle_hz, n)

    def slow_wave(n: int, rng: np.random.Generator) -> np.ndarray:
        # One period over the whole length, the trough first.
        return -4 * _sine(SAMPLING_RATE / n, n)

    def blink(n: int, rng: np.random.Generator) -> np.ndarray:
        return 7 * np.hanning(n)

    def spike(n: int, rng: np.random.Generator) -> np.ndarray:
        # 80 ms of one sign, then a slower wave of the other, as after an epileptic spike.
        return 7 * np.concatenate([np.hanning(8), -0.45 * np.hanning(n - 8)])

    def muscle(n: int, rng: np.random.Generator) -> np.ndarray:
        return 2.2 * rng.normal(size=n) * np.hanning(n)

    return [
        EventKind("alpha", 250, field(0.0, -0.95, 0.5), alpha),
        EventKind("spindle", 100, field(0.0, 0.2, 0.5), spindle),
        EventKind("slow_wave", 120, field(0.0, 0.5, 0.6), slow_wave),
        EventKind("blink", 35, field(0.0, 1.05, 0.35), blink),
        EventKind("spike", 30, field(-1.0, 0.05, 0.35), spike),
        EventKind("muscle", 80, field(1.0, 0.1, 0.4), muscle),
    ]


def recording(
    seed: int | list[int], samples: int, spindle_factor: float = 1.0
) -> tuple[Float[np.ndarray, "samples 19"], list[Event]]:
    """Return a recording, z-scored per channel, and its events in order of time.

    spindle_factor: times the usual number of spindles. The others are added after the z-score, so
    that nothing else differs from the recording without them: with a z-score over everything,
    more spindles would make all other waves of the recording smaller. The same seed gives the same
    recording: the order of the random draws must not change.
    """
    rng = np.random.default_rng(seed)
    # Short recordings are cut out of a longer one, which every event fits into.
    n = max(samples, MIN_SAMPLES)
    fields = []
    for _ in range(10):
        x_position = rng.uniform(-1, 1)
        y_position = rng.uniform(-1, 1)
        fields.append(field(x_position, y_position, rng.uniform(0.3, 0.8)))
    # Ten sources mixed over the scalp, and independent noise at every channel.
    x = np.stack(fields, axis=1) @ pink(rng, 10, n) + 0.3 * pink(rng, 19, n)  # [19, n]

    alpha_hz = rng.uniform(8.5, 11.5)
    spindle_hz = rng.uniform(12, 14)
    kinds = _event_kinds(alpha_hz, spindle_hz)
    events = []
    for kind in kinds:
        events += _plant(x, kind, 1.0, rng)
    mean = x[:, :samples].mean(1, keepdims=True)
    sd = x[:, :samples].std(1, keepdims=True)
    if spindle_factor > 1:
        spindles = next(kind for kind in kinds if kind.name == "spindle")
        events += _plant(x, spindles, spindle_factor - 1, rng)

    x = (x[:, :samples] - mean) / sd
    inside = [event for event in events if event.start < samples]
    cut = [replace(event, stop=min(event.stop, samples)) for event in inside]
    return x.T.astype(np.float32), sorted(cut, key=lambda event: event.start)


def _plant(
    x: Float[np.ndarray, "19 n"], kind: EventKind, rate: float, rng: np.random.Generator
) -> list[Event]:
    """Add events of a kind to x, `rate` times the usual number, and return them."""
    is_strong = kind.weights >= kind.weights.max() / 2
    # Those with at least half of the largest amplitude
    channels = tuple(np.array(CHANNELS)[is_strong].tolist())
    n = x.shape[1]
    count = rng.poisson(rate * EVENTS_PER_MINUTE * n / SAMPLING_RATE / 60)
    events = []
    for start in rng.integers(0, n - kind.length, count).tolist():
        stop = start + kind.length
        x[:, start:stop] += np.outer(kind.weights, kind.wave(kind.length, rng))
        events.append(Event(kind.name, start, stop, channels))
    return events


def write_demo(settings: DemoConfig) -> Demo:
    """Write the demo recordings, unless the folder contains them already.

    Raises UserError if the folder contains anything else.
    """
    folder = Path(settings.root_path)
    record = {
        "patients": settings.patients,
        "minutes": settings.minutes,
        "seed": settings.seed,
    }
    if settings.edf:
        record["edf"] = True
    if settings.labels:
        record["labels"] = True
    if folder.exists():
        _check_replaceable(folder, record, settings.overwrite)
        if not settings.overwrite and _is_complete(folder, settings.labels):
            return _open_demo(folder, settings.patients, is_new=False)
    with replaced_folder(folder) as temporary:
        _write_recordings(temporary, settings)
        (temporary / SETTINGS).write_text(yaml.safe_dump(record))
        write_checksums(temporary, files_below(temporary))
    return _open_demo(folder, settings.patients, is_new=True)


def _check_replaceable(folder: Path, record: dict[str, int | float], overwrite: bool) -> None:
    foreign = foreign_entries(folder, OWNED_FILES)
    if foreign:
        raise UserError(
            f"{folder} contains {foreign[0]}, which is not part of a demo; choose another "
            "--root_path"
        )
    if not (folder / SETTINGS).is_file():
        raise UserError(f"{folder} is not a demo: it has no {SETTINGS}; choose another --root_path")
    if overwrite:
        return
    before = read_yaml(folder / SETTINGS)
    if before != record:
        raise UserError(
            f"{folder} contains a demo with other settings ({before}); use --overwrite to replace "
            "it"
        )


def _is_complete(folder: Path, has_labels: bool) -> bool:
    """Return whether all files exist and all recordings have the listed lengths."""
    if not (folder / EVENTS).is_file():
        return False
    if has_labels and not (folder / LABELS).is_file():
        return False
    try:
        for name, length in read_lengths(folder / LENGTHS).items():
            path = folder / name
            if path.suffix == ".edf":
                is_complete = path.is_file()
            else:
                is_complete = len(load_recording(path)) == length
            if not is_complete:
                return False
    except Exception:  # NumPy raises many types on damaged files
        return False
    return True


def _open_demo(folder: Path, n_patients: int, is_new: bool) -> Demo:
    lengths = read_lengths(folder / LENGTHS)
    with (folder / EVENTS).open(newline="") as file:
        n_events = sum(1 for _ in csv.DictReader(file))
    hours = sum(lengths.values()) / SAMPLING_RATE / 3600
    return Demo(folder, n_patients, len(lengths), n_events, hours, is_new)


def _write_recordings(folder: Path, settings: DemoConfig) -> None:
    rng = np.random.default_rng(settings.seed)
    ending = ".edf" if settings.edf else "_preprocessed.npy"
    lengths = []
    events = []
    has_more_spindles = np.zeros(settings.patients, bool)
    if settings.labels:
        has_more_spindles = _write_labels(folder / LABELS, settings)
    for patient in range(settings.patients):
        spindle_factor = MORE_SPINDLES if has_more_spindles[patient] else 1.0
        for token in range(1 + patient % 2):
            name = f"demo{patient:04d}_s001_t{token:03d}{ending}"
            samples = int(settings.minutes * 60 * SAMPLING_RATE * rng.uniform(0.75, 1.25))
            if settings.edf:
                # EDF stores whole records of one second.
                samples -= samples % SAMPLING_RATE
            seed = [settings.seed, patient, token]
            eeg, planted = recording(seed, samples, spindle_factor)
            if settings.edf:
                write_edf(folder / name, eeg, planted)
            else:
                np.save(folder / name, eeg)
            lengths.append((name, samples))
            events += [(name, event) for event in planted]
    with (folder / LENGTHS).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("filename", "time_len"))
        writer.writerows(lengths)
    write_events(folder / EVENTS, events)


def _write_labels(path: Path, settings: DemoConfig) -> Bool[np.ndarray, " patients"]:
    """Write the labels of patients; return which have more spindles."""
    # A generator of its own, so that recordings do not depend on whether there are labels.
    rng = np.random.default_rng([settings.seed, settings.patients])
    has_more_spindles = rng.permutation(np.arange(settings.patients) % 2 == 1)
    age = rng.integers(20, 81, settings.patients)
    is_male = rng.random(settings.patients) < 0.5
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("patient", "age", "sex", "more_spindles"))
        for patient in range(settings.patients):
            sex = "m" if is_male[patient] else "f"
            more_spindles = int(has_more_spindles[patient])
            writer.writerow((f"demo{patient:04d}", age[patient], sex, more_spindles))
    return has_more_spindles
