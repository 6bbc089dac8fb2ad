"""The plan: the processing of every recording, from the settings of `prepare`."""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Literal

from minsae_jax.eeg.description import Position, Unit
from minsae_jax.eeg.prepare.channels import montage_positions, target_channels
from minsae_jax.eeg.prepare.config import UNITS, PrepareConfig
from minsae_jax.eeg.prepare.signals import Filters


@dataclass(frozen=True)
class Plan:
    """Resolved settings of every recording; equal keys give equal recordings of equal files."""

    channels: tuple[str, ...]
    positions: tuple[Position | None, ...]
    montage: str
    reference: tuple[str, ...]
    filters: Filters
    unit: Unit
    scale: float
    crop: float  # seconds
    min_duration: float  # seconds
    max_duration: float | None  # seconds
    on_missing: Literal["interpolate", "skip", "error"]
    max_interpolated: float  # share of the channels
    event_seconds: float
    key: str


def make_plan(config: PrepareConfig) -> Plan:
    """Return the settings of every recording. Raises UserError on unknown montages or channels."""
    resolved = config.resolved()
    channels = target_channels(resolved.channels)
    positions = montage_positions(channels, resolved.montage)
    assert resolved.sampling_rate is not None
    assert resolved.normalize is not None
    filters = Filters(
        sampling_rate=resolved.sampling_rate,
        l_freq=resolved.l_freq or None,
        h_freq=resolved.h_freq or None,
        notch=tuple(frequency for frequency in resolved.notch if frequency > 0),
    )
    identity = json.dumps([config.recorded(), versions()], sort_keys=True)
    return Plan(
        channels=channels,
        positions=positions,
        montage=resolved.montage,
        reference=resolved.reference,
        filters=filters,
        unit=UNITS[resolved.normalize],
        scale=resolved.scale,
        crop=resolved.crop,
        min_duration=resolved.min_duration,
        max_duration=resolved.max_duration,
        on_missing=resolved.on_missing,
        max_interpolated=resolved.max_interpolated,
        event_seconds=resolved.event_seconds,
        key=hashlib.sha256(identity.encode()).hexdigest(),
    )


@cache
def versions() -> dict[str, str]:
    """Return the versions of the libraries that the signals depend on."""
    return {name: version(name) for name in ("mne", "numpy", "scipy")}
