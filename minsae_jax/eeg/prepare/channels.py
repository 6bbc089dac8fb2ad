"""Target channels, their positions, and the matrix from a file's channels to them."""

from collections.abc import Collection, Sequence
from functools import lru_cache

import mne
import numpy as np
from jaxtyping import Float

from minsae_jax.eeg.description import Position
from minsae_jax.eeg.montage import CHANNELS, canonical
from minsae_jax.errors import UserError
from minsae_jax.settings import did_you_mean

# MNE 1.13 has renamed these.
NEW_NAMES = {
    "standard_1005": "colin27_1005",
    "standard_1020": "colin27_1020",
}


def target_channels(names: Sequence[str]) -> tuple[str, ...]:
    """Return the channels that --channels names: a list, `tuh`, or one of MNE's montages.

    Raises UserError if two names are of one electrode.
    """
    channels = tuple(names)
    if names == ("tuh",):
        channels = CHANNELS
    elif len(names) == 1 and _is_montage(names[0]):
        in_montage: dict[str, str] = {}
        for name in _montage(names[0]).ch_names:
            # Some have an electrode by two names, such as T7 and T3.
            in_montage.setdefault(canonical(name), name)
        channels = tuple(in_montage.values())
    first_of: dict[str, str] = {}
    for channel in channels:
        same = first_of.setdefault(canonical(channel), channel)
        if same is not channel:
            raise UserError(f"--channels contains one electrode twice: {same} and {channel}")
    return channels


@lru_cache
def montage_positions(channels: tuple[str, ...], montage: str) -> tuple[Position | None, ...]:
    """Return the positions in one of MNE's montages, in head coordinates; None if it has none.

    Raises UserError if there is no such montage.
    """
    if not _is_montage(montage):
        known = mne.channels.get_builtin_montages()
        raise UserError(f"--montage: MNE has no montage {montage!r}{did_you_mean(montage, known)}")
    info = _info(channels, montage)
    positions: list[Position | None] = []
    for channel in info["chs"]:
        x, y, z = (float(value) for value in channel["loc"][:3])
        is_known = bool(np.isfinite([x, y, z]).all())
        positions.append((x, y, z) if is_known else None)
    return tuple(positions)


def mixing_matrix(
    channels: tuple[str, ...],
    montage: str,
    sources: Sequence[str],
    interpolated: Collection[str],
    reference: Sequence[str],
) -> Float[np.ndarray, "channels sources"]:
    """Return the matrix that interpolates channels and then subtracts the reference.

    sources: canonical names of the channels that are read. interpolated: those of target channels.
    reference: average (of all target channels), none, or canonical names among `sources`.
    """
    keys = [canonical(channel) for channel in channels]
    # The columns of bad and missing channels are zero.
    weights = _interpolation(channels, montage, frozenset(interpolated))
    matrix = np.zeros((len(channels), len(sources)))
    for column, source in enumerate(sources):
        if source in keys:
            matrix[:, column] = weights[:, keys.index(source)]
    if list(reference) == ["average"]:
        matrix -= matrix.mean(axis=0)
    elif list(reference) != ["none"]:
        for name in reference:
            matrix[:, sources.index(name)] -= 1 / len(reference)
    return matrix


@lru_cache
def _interpolation(
    channels: tuple[str, ...], montage: str, interpolated: frozenset[str]
) -> Float[np.ndarray, "channels channels"]:
    """Return the matrix of MNE's spherical splines from target channels to target channels.

    Interpolation is linear, so that its matrix is the result for the identity.
    """
    identity = np.eye(len(channels))
    if not interpolated:
        return identity
    info = _info(channels, montage)
    bads = [
        name
        for name, key in zip(info.ch_names, map(canonical, channels), strict=True)
        if key in interpolated
    ]
    for channel in bads:
        row = info.ch_names.index(channel)
        identity[row, row] = 0
    raw = mne.io.RawArray(identity, info, verbose="ERROR")
    raw.info["bads"] = bads
    raw.interpolate_bads(verbose="ERROR")
    return raw.get_data()


def _is_montage(name: str) -> bool:
    return NEW_NAMES.get(name, name) in [*mne.channels.get_builtin_montages(), *NEW_NAMES]


def _montage(name: str) -> mne.channels.DigMontage:
    known = mne.channels.get_builtin_montages()
    if NEW_NAMES.get(name) in known:
        name = NEW_NAMES[name]
    return mne.channels.make_standard_montage(name)


def _info(channels: tuple[str, ...], montage: str) -> mne.Info:
    """Return MNE's info of the channels with their positions."""
    layout = _montage(montage)
    name_of = {canonical(name): name for name in layout.ch_names}
    names = [name_of.get(canonical(channel), channel) for channel in channels]
    info = mne.create_info(names, sfreq=1.0, ch_types="eeg", verbose="ERROR")
    info.set_montage(layout, on_missing="ignore", verbose="ERROR")
    return info
