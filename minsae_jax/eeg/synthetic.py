"""Folders of synthetic EEG with planted, labelled events: `python -m minsae_jax demo`."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import yaml
from jaxtyping import Bool, Float

from minsae_jax.checksums import SUMS, files_below, write_checksums
from minsae_jax.eeg.events import EVENTS, Event, write_events
from minsae_jax.eeg.montage import CHANNELS
from minsae_jax.eeg.recordings import LABELS, LENGTHS, SAMPLING_RATE, load_recording, read_lengths
from minsae_jax.eeg.synthetic_signals import recording
from minsae_jax.errors import UserError
from minsae_jax.files import foreign_entries, replaced_folder
from minsae_jax.settings import NonNegative, Range, check_settings, read_yaml

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
MORE_SPINDLES = 3.0  # times as many, in patients with this label
UV_PER_SD = 20.0  # in EDF files


@dataclass(frozen=True, kw_only=True)
class DemoOutput:
    """The folder of a demo, and its content."""

    heading: ClassVar[str] = "Output"

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
    """Number and length of synthetic recordings."""

    heading: ClassVar[str] = "Recordings"

    patients: Annotated[int, Range(min=10)] = 16
    """Number of patients, with one or two recordings each; at least 10, so that one is in val."""
    minutes: Annotated[float, Range(min=0.5, max=10_000)] = 6.0
    """Mean length of a recording, in minutes at 100 Hz; lengths vary by a quarter."""
    seed: Annotated[int, NonNegative] = 0
    """Seed of everything random in the recordings."""


# Bases in reverse order: dataclasses list the fields of the last base first.
@dataclass(frozen=True, kw_only=True)
class DemoConfig(DemoSize, DemoOutput):
    """Write synthetic EEG with planted, labelled events in the layout of the TUH corpus.

    `minsae demo --help` explains all settings.
    """

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class Demo:
    """A folder of demo recordings."""

    folder: Path
    n_patients: int
    n_recordings: int
    n_events: int
    hours: float  # of all recordings
    is_new: bool  # False if it was there already


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
    with (folder / EVENTS).open(newline="", encoding="utf-8") as file:
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
            # To memory first: on a full disk, NumPy's and edfio's errors would not say so.
            content = io.BytesIO()
            if settings.edf:
                _write_edf(content, eeg, planted)
            else:
                np.save(content, eeg)
            (folder / name).write_bytes(content.getbuffer())
            lengths.append((name, samples))
            events += [(name, event) for event in planted]
    with (folder / LENGTHS).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("filename", "time_len"))
        writer.writerows(lengths)
    write_events(folder / EVENTS, events)


def _write_labels(path: Path, settings: DemoConfig) -> Bool[np.ndarray, " patients"]:
    """Write the labels of patients; return which have more spindles."""
    # A separate generator, so that recordings do not depend on whether there are labels.
    rng = np.random.default_rng([settings.seed, settings.patients])
    has_more_spindles = rng.permutation(np.arange(settings.patients) % 2 == 1)
    age = rng.integers(20, 81, settings.patients)
    is_male = rng.random(settings.patients) < 0.5
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("patient", "age", "sex", "more_spindles"))
        for patient in range(settings.patients):
            sex = "m" if is_male[patient] else "f"
            more_spindles = int(has_more_spindles[patient])
            writer.writerow((f"demo{patient:04d}", age[patient], sex, more_spindles))
    return has_more_spindles


def _write_edf(
    content: io.BytesIO, eeg: Float[np.ndarray, "samples 19"], events: Sequence[Event]
) -> None:
    """Write a recording in SD as EDF in µV, with its events as annotations.

    Raises UserError if edfio is not installed.
    """
    try:
        import edfio
    except ImportError:
        raise UserError('demo --edf requires edfio: pip install "minsae_jax[eeg]"') from None
    signals = []
    for name, channel in zip(CHANNELS, eeg.T, strict=True):
        signals.append(
            edfio.EdfSignal(
                UV_PER_SD * channel.astype(np.float64),
                sampling_frequency=SAMPLING_RATE,
                label=f"EEG {name}-REF",
                physical_dimension="uV",
            )
        )
    annotations = []
    for event in events:
        onset = event.start / SAMPLING_RATE
        duration = (event.stop - event.start) / SAMPLING_RATE
        # EDF+ has no field for channels; MNE reads KIND@@CHANNEL, one for each channel.
        for channel in event.channels:
            text = f"{event.kind}@@EEG {channel}-REF"
            annotations.append(edfio.EdfAnnotation(onset, duration, text))
    edfio.Edf(signals, annotations=annotations).write(content)
