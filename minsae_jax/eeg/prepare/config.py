"""Settings of `prepare`, and the presets.

`PrepareConfig` has the flags, where None and () mean "the preset's value";
`PrepareConfig.resolved()` fills these in.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from minsae_jax.cli import Flag
from minsae_jax.eeg.description import Unit
from minsae_jax.eeg.recordings import OnBadRecording
from minsae_jax.settings import (
    AtLeastOne,
    NonNegative,
    Positive,
    Range,
    Values,
    check_no_duplicates,
    check_settings,
    require,
    to_dict,
)

Normalize = Literal["zscore", "uV", "100uV", "mV"]
UNITS: dict[Normalize, Unit] = {"zscore": "SD", "uV": "uV", "100uV": "100 uV", "mV": "mV"}
Preset = Literal["tuh", "labram", "cbramod", "eegpt", "reve"]


@dataclass(frozen=True, kw_only=True)
class PrepareSource:
    """EEG files, and the patients and labels in them."""

    heading: ClassVar[str] = "Source"

    source: Annotated[tuple[str, ...], Flag(positional=True)]
    """EEG files, folders (with all folders below), globs, or the root of a BIDS dataset."""
    patient_pattern: str | None = None
    """Regular expression with the group (?P<patient>…), and if you like (?P<session>…) and
    (?P<token>…), searched in each path (default: BIDS, then <patient>_s<session>_t<token>, then
    each file is a patient)."""
    hash_patients: bool = False
    """Replace patients and file names by hashes of them."""
    labels: str | None = None
    """CSV or TSV file with a column patient or recording (default: BIDS's participants.tsv)."""


@dataclass(frozen=True, kw_only=True)
class PrepareOutput:
    """The folder of prepared recordings."""

    heading: ClassVar[str] = "Output"

    out: str
    """Folder to write: recordings, file_lengths_map.csv, dataset.json, events.csv, labels.csv."""
    overwrite: bool = False
    """Discard recordings that were prepared with other settings or from other sources."""


@dataclass(frozen=True, kw_only=True)
class SignalFlags:
    """Processing of the signals; None and () mean the value of the preset."""

    heading: ClassVar[str] = "Signals"

    preset: Preset = "tuh"
    """Preprocessing of the data on which an encoder was pretrained (see docs/prepare.md); the flags
    below override it. tuh: of the preprocessed TUH corpus, for gPatchTST."""
    channels: tuple[str, ...] = ()
    """Channels in column order, or the name of one of MNE's montages (presets: 19 of 10-20)."""
    sampling_rate: Annotated[float | None, Range(min=1, max=100_000)] = None
    """Sampling rate in Hz (tuh: 100; eegpt: 256; others: 200)."""
    l_freq: Annotated[float | None, NonNegative] = None
    """Lower edge of the band-pass in Hz; 0 for none (labram: 0.1; cbramod: 0.3; reve: 0.5)."""
    h_freq: Annotated[float | None, NonNegative] = None
    """Upper edge of the band-pass in Hz; 0 for none (labram, cbramod: 75; reve: 99.5)."""
    notch: Annotated[tuple[float, ...], NonNegative] = ()
    """Frequencies of notch filters in Hz; 0 for none (labram: 50; cbramod: 60)."""
    reference: tuple[str, ...] = ()
    """average, none, or the channels whose mean is subtracted (tuh, eegpt: average; others: no
    change)."""
    normalize: Normalize | None = None
    """zscore of each channel over the recording, µV, 100 µV or mV (tuh, reve: zscore; labram,
    cbramod: 100uV; eegpt: mV)."""
    scale: Annotated[float, Positive] = 1.0
    """Factor for all signals, for files with a wrong unit."""
    montage: str = "standard_1005"
    """MNE's montage with the positions of the channels."""


@dataclass(frozen=True, kw_only=True)
class SelectionFlags:
    """Recordings and channels that are accepted."""

    heading: ClassVar[str] = "Selection"

    crop: Annotated[float, NonNegative] = 0.0
    """Seconds to leave out at both ends; 300 in the TUH corpus."""
    min_duration: Annotated[float, Positive] = 10.0
    """Shortest recording in seconds, after cropping; 600 in the TUH corpus."""
    max_duration: Annotated[float | None, Positive] = None
    """Longest recording in seconds, after cropping; 3600 in the TUH corpus."""
    on_missing: Literal["interpolate", "skip", "error"] = "interpolate"
    """Channels that a file lacks: interpolate them, skip the recording, or treat it as bad."""
    max_interpolated: Annotated[float, Range(min=0, below=1)] = 0.2
    """Largest share of the channels that may be interpolated."""
    on_bad_recording: OnBadRecording = "error"
    """Recordings that cannot be used: stop and name the first ones (error), or leave them out and
    list them all (skip)."""
    event_seconds: Annotated[float, Positive] = 1.0
    """Length of events whose annotation has none."""


@dataclass(frozen=True, kw_only=True)
class ComputeFlags:
    """Processes that prepare recordings."""

    heading: ClassVar[str] = "Compute"

    jobs: Annotated[int, AtLeastOne] = 1
    """Processes; each has one recording in memory."""


# Bases in reverse order: dataclasses list the fields of the last base first.
@dataclass(frozen=True, kw_only=True)
class PrepareConfig(ComputeFlags, SelectionFlags, SignalFlags, PrepareOutput, PrepareSource):
    """Convert EEG files into recordings for `extract`.

    `minsae prepare --help` explains all settings.
    """

    def __post_init__(self) -> None:
        check_settings(self)
        check_no_duplicates(self, "channels", "notch", "reference")
        require(len(self.source) > 0, "prepare requires SOURCE")
        require(self.out != "", "--out must be the name of a folder")
        require(all(name.strip() for name in self.channels), "--channels contains an empty name")
        for word in ("average", "none"):
            is_alone = word not in self.reference or len(self.reference) == 1
            require(is_alone, f"--reference {word} cannot be combined with channels")
        _check_pattern(self.patient_pattern)
        r = self.resolved()
        nyquist = (r.sampling_rate or 0) / 2
        l_freq = r.l_freq or 0
        h_freq = r.h_freq or 0
        require(
            l_freq < (h_freq or nyquist),
            f"--l_freq must be below --h_freq and half the sampling rate, got {l_freq:g}",
        )
        require(
            h_freq <= nyquist,
            f"--h_freq must be at most half of --sampling_rate, {nyquist:g}, got {h_freq:g}",
        )

    def resolved(self) -> "PrepareConfig":
        """Return these settings with the preset's values where none were given."""
        defaults = _PRESETS[self.preset]
        missing = {k: v for k, v in defaults.items() if getattr(self, k) in (None, ())}
        if not missing:
            return self
        return dataclasses.replace(self, **missing)

    def recorded(self) -> Values:
        """Return the resolved settings that recordings depend on, without paths."""
        values = to_dict(self.resolved())
        for name in ("source", "out", "labels", "overwrite", "on_bad_recording", "jobs"):
            del values[name]
        return values


# The order in which CBraMod's pretraining reads the channels; its positions depend on it.
CBRAMOD_CHANNELS = (
    "FP1", "FP2", "F3", "F4", "C3", "C4", "P3", "P4", "O1", "O2",
    "F7", "F8", "T3", "T4", "T5", "T6", "FZ", "CZ", "PZ",
)  # fmt: skip

# Sources are listed in docs/prepare.md.
_PRESETS: dict[Preset, Values] = {
    "tuh": {
        "channels": ("tuh",),
        "sampling_rate": 100.0,
        "l_freq": 0.0,
        "h_freq": 0.0,
        "notch": (0.0,),
        "reference": ("average",),
        "normalize": "zscore",
    },
    "labram": {
        "channels": ("tuh",),
        "sampling_rate": 200.0,
        "l_freq": 0.1,
        "h_freq": 75.0,
        "notch": (50.0,),
        "reference": ("none",),
        "normalize": "100uV",
    },
    "cbramod": {
        "channels": CBRAMOD_CHANNELS,
        "sampling_rate": 200.0,
        "l_freq": 0.3,
        "h_freq": 75.0,
        "notch": (60.0,),
        "reference": ("none",),
        "normalize": "100uV",
    },
    "eegpt": {
        "channels": ("tuh",),
        "sampling_rate": 256.0,
        "l_freq": 0.0,
        "h_freq": 0.0,
        "notch": (0.0,),
        "reference": ("average",),
        "normalize": "mV",
    },
    "reve": {
        "channels": ("tuh",),
        "sampling_rate": 200.0,
        "l_freq": 0.5,
        "h_freq": 99.5,
        "notch": (0.0,),
        "reference": ("none",),
        "normalize": "zscore",
    },
}


def _check_pattern(pattern: str | None) -> None:
    if pattern is None:
        return
    try:
        groups = re.compile(pattern).groupindex
    except (re.error, OverflowError, RecursionError) as e:
        require(False, f"--patient_pattern is not a regular expression: {e}")
    require("patient" in groups, "--patient_pattern must contain the group (?P<patient>…)")
