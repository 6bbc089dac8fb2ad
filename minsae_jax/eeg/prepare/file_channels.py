"""Selection of the channels of a file, and of those that cannot be used."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from minsae_jax.eeg.montage import canonical
from minsae_jax.eeg.prepare.channels import layout_hint
from minsae_jax.eeg.prepare.errors import BadRecordingError, SkippedError
from minsae_jax.eeg.prepare.plan import Plan
from minsae_jax.eeg.prepare.read import EegFile
from minsae_jax.eeg.prepare.signals import STRONGEST_UV, check_quality
from minsae_jax.errors import join_some


@dataclass(frozen=True)
class FileChannels:
    """Channels of one file by their canonical names, which are keys of `names`."""

    names: dict[str, str]  # of the target channels, in column order
    missing: tuple[str, ...]  # of the target channels
    references: tuple[str, ...]
    read: tuple[str, ...]  # target channels in the file, then references
    unused: tuple[str, ...]  # of the file
    electrodes: tuple[str, ...]  # target channels with a position, unlike HEOG
    # Known once the samples are read
    bad: tuple[str, ...] = ()  # target channels that cannot be used
    problems: dict[str, tuple[str, ...]] = field(default_factory=dict)  # problem -> of `read`

    @property
    def interpolated(self) -> tuple[str, ...]:
        return tuple(key for key in self.names if key in self.missing or key in self.bad)

    def named(self, keys: Sequence[str]) -> tuple[str, ...]:
        """Return the names as the settings spell them."""
        return tuple(self.names.get(key, key) for key in keys)


def find_channels(file: EegFile, plan: Plan) -> FileChannels:
    """Return the channels to read. Raises BadRecordingError if the file lacks a reference."""
    names = {canonical(channel): channel for channel in plan.channels}
    present = [key for key in names if key in file.names]
    references: list[str] = []
    if plan.settings.reference not in (("average",), ("none",)):
        references = [canonical(name) for name in plan.settings.reference]
    absent = [key for key in references if key not in file.names]
    if absent:
        raise BadRecordingError(
            f"has no reference channel {' '.join(absent)}; --reference takes average, none, or "
            "channels of the file"
        )
    read = dict.fromkeys([*present, *references])  # an ordered set
    # Two keys can be of one channel: C3-A2 and, where most channels have this reference, C3.
    names_read = {name for key in read for name in file.names[key]}
    unused = [key for key, same in file.names.items() if names_read.isdisjoint(same)]
    positions = zip(names, plan.positions, strict=True)
    return FileChannels(
        names=names,
        missing=tuple(key for key in names if key not in file.names),
        references=tuple(references),
        read=tuple(read),
        unused=tuple(sorted(unused)),
        electrodes=tuple(key for key, position in positions if position is not None),
    )


def check_channels(
    data: Float[np.ndarray, "channels samples"], channels: FileChannels, file: EegFile
) -> FileChannels:
    """Return the channels with those that are bad, and all problems.

    Raises BadRecordingError on NaN, a wrong unit of most channels, and unusable references.
    """
    quality = dict(zip(channels.read, check_quality(data), strict=True))
    flat = [key for key in channels.read if quality[key].is_flat]
    too_strong = [key for key in channels.read if quality[key].is_too_strong]
    marked = [key for key in channels.read if file.is_among(key, file.bad)]
    references = [key for key in channels.references if key in (*flat, *too_strong, *marked)]
    if references:
        raise BadRecordingError(f"has a flat or bad reference channel: {' '.join(references)}")
    # Types and amplitudes of EEG are expected of electrodes only.
    electrodes = [key for key in channels.read if key in channels.electrodes]
    not_eeg = [key for key in electrodes if file.is_among(key, file.not_eeg)]
    # A single channel minus itself
    is_only_reference = len(channels.references) == 1
    zero = [key for key in channels.references if is_only_reference and key in channels.names]
    bad = {*flat, *marked, *not_eeg, *(key for key in electrodes if key in too_strong)}
    problems = {
        "flat": flat,
        "marked as bad": [key for key in marked if key not in (*flat, *not_eeg)],
        "of another type than EEG": not_eeg,
        f"with an SD above {STRONGEST_UV:,.0f} µV": too_strong,
        "clipped": [key for key in channels.read if quality[key].is_clipped],
        "all zero, since they are the reference": zero,
    }
    return dataclasses.replace(
        channels,
        bad=tuple(key for key in channels.read if key in bad),
        problems={problem: tuple(keys) for problem, keys in problems.items()},
    )


def check_interpolated(channels: FileChannels, plan: Plan) -> None:
    """Raise if so many channels cannot be interpolated, or must not be."""
    settings = plan.settings
    # Without a layout of the name in --channels, it is that of a channel.
    is_listed = settings.channels == plan.channels
    hint = layout_hint(plan.channels) if channels.missing and is_listed else ""
    if channels.missing and settings.on_missing != "interpolate":
        reason = f"lacks {_some(channels.named(channels.missing))}{hint}"
        if settings.on_missing == "skip":
            raise SkippedError(reason)
        raise BadRecordingError(reason)
    names = channels.named(channels.interpolated)
    n_channels = len(plan.channels)
    if len(names) > settings.max_interpolated * n_channels:
        raise BadRecordingError(
            f"has {n_channels - len(names)} usable channels of {n_channels}, too few for "
            f"--max_interpolated {settings.max_interpolated:g}; missing, flat or bad are "
            f"{_some(names)}{hint}; other channels of the file: {_some(channels.unused) or 'none'}"
        )
    positions = dict(zip(plan.channels, plan.positions, strict=True))
    unknown = [name for name in names if positions[name] is None]
    if unknown:
        raise BadRecordingError(
            f"lacks {_some(unknown)}, which --montage {settings.montage} has no position for"
        )


def _some(names: Sequence[str]) -> str:
    # Of 94 channels that --channels standard_1020 needs, a file can lack most.
    return join_some(names, limit=10)
