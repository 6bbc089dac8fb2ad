"""`dataset.json`: channels, sampling rate, unit and origin of a folder of recordings.

Without the file, recordings are those of the preprocessed TUH corpus: 19 channels at 100 Hz, in SD.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from minsae_jax.eeg.montage import CHANNELS, HEAD_POSITIONS_MM
from minsae_jax.errors import UserError, brief
from minsae_jax.files import atomic_write, regular_file
from minsae_jax.settings import Values

DESCRIPTION = "dataset.json"
FORMAT_VERSION = 1  # of this file

# SD: each channel minus its mean, divided by its standard deviation, both over the recording.
Unit = Literal["SD", "uV", "100 uV", "mV"]
# An SD differs between channels and recordings: it is in RecordingDescription.
UV_PER_UNIT = {"uV": 1.0, "100 uV": 100.0, "mV": 1000.0}
Position = tuple[float, float, float]  # metres, head coordinates of MNE: right, front, up


@dataclass(frozen=True)
class RecordingDescription:
    """Origin of one recording. Tuples of numbers have one for each channel."""

    source: str  # file name, with folders if other files have the same name
    mean_uv: tuple[float, ...]  # of the prepared signal before it was brought to its unit, in µV
    sd_uv: tuple[float, ...]  # population SD, likewise
    bad_channels: tuple[str, ...]  # flat, marked as bad in the source, or not EEG there
    interpolated_channels: tuple[str, ...]  # bad or missing
    original_sampling_rate: float  # Hz
    duration: float  # seconds


@dataclass(frozen=True)
class Preparation:
    """How the recordings were made: the settings of `prepare`, and versions of libraries."""

    settings: Values
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Description:
    """Channels, sampling rate and unit of all recordings of a folder."""

    sampling_rate: float  # Hz
    channels: tuple[str, ...]  # in column order
    positions: tuple[Position | None, ...]  # of each channel; None if it is not known
    unit: Unit
    preparation: Preparation | None = None  # None for the TUH corpus
    recordings: Mapping[str, RecordingDescription] = field(default_factory=dict)  # by file name

    def uv_per_unit(self, recording: str) -> Float[np.ndarray, " channels"] | None:
        """Return the factor that converts each channel of a recording to µV; None if unknown."""
        if self.unit in UV_PER_UNIT:
            return np.full(len(self.channels), UV_PER_UNIT[self.unit])
        described = self.recordings.get(recording)
        if described is None:
            return None
        return np.array(described.sd_uv)

    def origin(self, recording: str) -> tuple[str, float]:
        """Return the file that a recording was made from, and the seconds cut off at its start.

        The file is "" if it is not known.
        """
        described = self.recordings.get(recording)
        if described is None or self.preparation is None:
            return "", 0.0
        return described.source, float(self.preparation.settings.get("crop") or 0.0)


TUH = Description(
    sampling_rate=100.0,
    channels=CHANNELS,
    positions=tuple((x / 1000, y / 1000, z / 1000) for x, y, z in HEAD_POSITIONS_MM),
    unit="SD",
)


def write_description(folder: Path, description: Description) -> None:
    """Write dataset.json into a folder of recordings."""
    content = {"format_version": FORMAT_VERSION} | dataclasses.asdict(description)
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_write(folder / DESCRIPTION) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_description(folder: str | Path) -> Description:
    """Return the description of a folder of recordings; the TUH corpus's if it has none.

    Raises UserError if dataset.json is invalid.
    """
    path = Path(folder) / DESCRIPTION
    try:
        content = json.loads(regular_file(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return TUH
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read as JSON: {brief(e)}") from None
    try:
        return _description(content)
    # Of a file that was edited, or that is JSON of something else
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        reason = f"it lacks {e}" if isinstance(e, KeyError) else brief(e)
        raise UserError(f"{path} does not describe recordings: {reason}") from None


def _description(content: dict[str, Any]) -> Description:
    version = content["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version is {version!r}, but this program reads {FORMAT_VERSION}")
    channels = _texts(content["channels"], "channels")
    if not channels or len(set(channels)) < len(channels):
        raise ValueError("channels must be different names")
    positions = tuple(_position(position) for position in content["positions"])
    _check_length(positions, channels, "positions")
    rate = _number(content["sampling_rate"], "sampling_rate")
    if rate <= 0:
        raise ValueError(f"sampling_rate is {rate}")
    unit = content["unit"]
    if unit not in get_args(Unit):
        raise ValueError(f"unit must be one of {', '.join(get_args(Unit))}, got {unit!r}")
    preparation = content["preparation"]
    if preparation is not None:
        preparation = Preparation(dict(preparation["settings"]), dict(preparation["versions"]))
    recordings = {
        name: _recording(value, channels) for name, value in content["recordings"].items()
    }
    return Description(
        sampling_rate=rate,
        channels=channels,
        positions=positions,
        unit=unit,
        preparation=preparation,
        recordings=recordings,
    )


def _recording(content: dict[str, Any], channels: tuple[str, ...]) -> RecordingDescription:
    return RecordingDescription(
        source=str(content["source"]),
        mean_uv=_one_each(content["mean_uv"], channels, "mean_uv"),
        sd_uv=_one_each(content["sd_uv"], channels, "sd_uv"),
        bad_channels=_texts(content["bad_channels"], "bad_channels"),
        interpolated_channels=_texts(content["interpolated_channels"], "interpolated_channels"),
        original_sampling_rate=_number(content["original_sampling_rate"], "sampling rate"),
        duration=_number(content["duration"], "duration"),
    )


def _one_each(values: Any, channels: tuple[str, ...], what: str) -> tuple[float, ...]:
    """Return one number for each channel."""
    numbers = tuple(_number(value, what) for value in values)
    _check_length(numbers, channels, what)
    return numbers


def _check_length(values: tuple[object, ...], channels: tuple[str, ...], what: str) -> None:
    if len(values) != len(channels):
        raise ValueError(f"there are {len(values)} {what} for {len(channels)} channels")


def _texts(values: Any, what: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{what} must be a list of names")
    return tuple(values)


def _position(value: Any) -> Position | None:
    if value is None:
        return None
    x, y, z = (_number(coordinate, "positions") for coordinate in value)
    return x, y, z


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} must be numbers, got {value!r}")
    return float(value)
