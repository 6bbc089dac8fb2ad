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


def target_channels(names: Sequence[str]) -> tuple[str, ...]:
    """Return the channels that --channels names: a list, `tuh`, or one of MNE's montages.

    Raises UserError if two names are of one electrode.
    """
    channels = tuple(names)
    layout = _montage(names[0]) if len(names) == 1 else None
    if names == ("tuh",):
        channels = CHANNELS
    elif layout is not None:
        in_montage: dict[str, str] = {}
        for name in layout.ch_names:
            # Some have an electrode by two names, such as T7 and T3.
            in_montage.setdefault(canonical(name), name)
        channels = tuple(in_montage.values())
    first_of: dict[str, str] = {}
    for channel in channels:
        same = first_of.setdefault(canonical(channel), channel)
        if same is not channel:
            raise UserError(f"--channels contains one electrode twice: {same} and {channel}")
    return channels


def layout_hint(names: Sequence[str]) -> str:
    """Return a hint at a layout if --channels is one word that is similar, such as `tuhh`."""
    return did_you_mean(names[0], ["tuh", *_montage_names()]) if len(names) == 1 else ""


@lru_cache
def montage_positions(channels: tuple[str, ...], montage: str) -> tuple[Position | None, ...]:
    """Return the positions in one of MNE's montages, in head coordinates; None if it has none.

    Raises UserError if there is no such montage.
    """
    if _montage(montage) is None:
        hint = did_you_mean(montage, _montage_names())
        raise UserError(f"--montage: MNE has no montage {montage!r}{hint}")
    positions: list[Position | None] = []
    for channel in _info(channels, montage)["chs"]:
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
    # Columns of bad and missing channels are zero, so that their samples have no effect.
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
    for row, channel in enumerate(channels):
        if canonical(channel) in interpolated:
            info["bads"].append(info.ch_names[row])
            identity[row, row] = 0
    raw = mne.io.RawArray(identity, info, verbose="ERROR")
    raw.interpolate_bads(verbose="ERROR")
    return raw.get_data()


def _montage_names() -> list[str]:
    """Return the names that `_montage` knows."""
    names = mne.channels.get_builtin_montages()
    return names + [name.replace("colin27_", "standard_") for name in names if "colin27_" in name]


def _montage(name: str) -> mne.channels.DigMontage | None:
    """Return one of MNE's montages, None if it has none of this name."""
    # MNE 1.13 has renamed standard_1005 to colin27_1005, and its relatives likewise.
    name = name.replace("standard_", "colin27_")
    if name in mne.channels.get_builtin_montages():
        return mne.channels.make_standard_montage(name)
    return None


def _info(channels: tuple[str, ...], montage: str) -> mne.Info:
    """Return MNE's info of the channels with their positions in an existing montage."""
    layout = _montage(montage)
    assert layout is not None
    name_of = {canonical(name): name for name in layout.ch_names}
    names = [name_of.get(canonical(channel), channel) for channel in channels]
    info = mne.create_info(names, sfreq=1.0, ch_types="eeg", verbose="ERROR")
    info.set_montage(layout, on_missing="ignore", verbose="ERROR")
    return info
