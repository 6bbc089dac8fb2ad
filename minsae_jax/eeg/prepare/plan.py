"""The plan: the processing of every recording, from the settings of `prepare`."""

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version

from minsae_jax.eeg.description import Position, Preparation, Unit
from minsae_jax.eeg.prepare.channels import montage_positions, target_channels
from minsae_jax.eeg.prepare.config import UNITS, PrepareConfig
from minsae_jax.eeg.prepare.signals import Filters

# Raised when `prepare` makes other recordings or events of the same files, so that those of an
# earlier version are refused.
VERSION = 3


@dataclass(frozen=True)
class Plan:
    """How every recording is made; equal keys give equal recordings of equal files."""

    settings: PrepareConfig  # with the values of the preset
    channels: tuple[str, ...]  # in column order
    positions: tuple[Position | None, ...]
    filters: Filters
    unit: Unit
    preparation: Preparation
    key: str


def make_plan(config: PrepareConfig) -> Plan:
    """Return the plan of some settings. Raises UserError on unknown montages or channels."""
    settings = config.resolved()
    channels = target_channels(settings.channels)
    assert settings.sampling_rate is not None
    assert settings.normalize is not None
    filters = Filters(
        sampling_rate=settings.sampling_rate,
        l_freq=settings.l_freq or None,
        h_freq=settings.h_freq or None,
        notch=tuple(frequency for frequency in settings.notch if frequency > 0),
    )
    versions = {name: version(name) for name in ("mne", "numpy", "scipy")}
    preparation = Preparation(config.recorded(), versions)
    identity = json.dumps([VERSION, preparation.settings, versions], sort_keys=True)
    return Plan(
        settings=settings,
        channels=channels,
        positions=montage_positions(channels, settings.montage),
        filters=filters,
        unit=UNITS[settings.normalize],
        preparation=preparation,
        key=hashlib.sha256(identity.encode()).hexdigest(),
    )
