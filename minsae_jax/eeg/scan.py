"""Recordings whose samples have all been read once: checked, hashed and measured.

`extract` and `train --live` use such recordings only. The hash identifies the samples that the
encoder gets; the amplitudes show flat channels and wrong units.
"""

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float

from minsae_jax.eeg.description import TUH, UV_PER_UNIT, Description, read_description
from minsae_jax.eeg.recordings import (
    OnBadRecording,
    Windows,
    WindowShape,
    check_usable,
    find_windows,
    list_bad,
    load_recording,
    recordings_folder,
)
from minsae_jax.eeg.splits import Split
from minsae_jax.errors import UserError, join_some
from minsae_jax.monitor import progress
from minsae_jax.settings import JsonObject

SCAN_BLOCK = 100_000  # samples
# Limits of the median root mean square of the channels
PLAUSIBLE_SD = (0.1, 10.0)
PLAUSIBLE_UV = (0.01, 10_000.0)
NOT_FINITE = "contains NaN or infinity"  # in the reason of a skipped recording


@dataclass(frozen=True)
class Scan:
    """Result of reading all samples of a recording's windows once."""

    n_samples: int
    sha256: str  # as float32
    # The last channel is all zero: missing electrodes were packed to the end, so columns do not
    # correspond to the channel names.
    shifted: bool
    first_not_finite: int | None  # sample, NaN or infinite in any channel
    rms: tuple[float, ...]  # root mean square of each channel


def scan_windows(windows: Windows, known: Mapping[str, Scan] | None = None) -> dict[str, Scan]:
    """Read every sample of all windows once, file by file in parallel.

    known: scans of some of the files, which are not read again if they are of as many samples.
    """
    scans = dict(known or {})
    # Only the samples that the encoder gets.
    n_samples = dict(zip(windows.files, (windows.counts * windows.seq_len).tolist(), strict=True))
    missing = []
    for name, count in n_samples.items():
        if name not in scans or scans[name].n_samples != count:
            missing.append(name)
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        progress("check recordings", len(missing), "recordings", delay=2.0) as bar,
    ):
        counts = [n_samples[name] for name in missing]
        results = pool.map(partial(_scan_file, windows), missing, counts)
        for name, scan in zip(missing, results, strict=True):
            bar.advance(1)
            scans[name] = scan
    return {name: scans[name] for name in windows.files}


def _scan_file(windows: Windows, name: str, n_samples: int) -> Scan:
    samples = load_recording(windows.folder / name)[:n_samples]
    digest = hashlib.sha256()
    squares = np.zeros(windows.n_vars)
    for start in range(0, len(samples), SCAN_BLOCK):
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite
            block = np.ascontiguousarray(samples[start : start + SCAN_BLOCK], np.float32)
        finite = np.isfinite(block).all(1)
        if not finite.all():
            first_not_finite = start + int(np.flatnonzero(~finite)[0])
            return Scan(
                n_samples=n_samples,
                sha256="",
                shifted=False,
                first_not_finite=first_not_finite,
                rms=(),
            )
        digest.update(block.data)
        with np.errstate(over="ignore", under="ignore"):
            squares += np.einsum("tc,tc->c", block, block)
    rms = np.sqrt(squares / max(n_samples, 1))
    # Squares of tiny samples are 0 too.
    last_is_zero = windows.n_vars > 1 and n_samples > 0 and not samples[:, -1].any()
    return Scan(
        n_samples=n_samples,
        sha256=digest.hexdigest(),
        shifted=last_is_zero,
        first_not_finite=None,
        rms=tuple(rms.tolist()),
    )


def sha256_of_scans(scans: Mapping[str, Scan]) -> str:
    """Return the checksum of the samples of all windows, by the scans of their files in order."""
    digests = "".join(f"{name} {scan.sha256}" for name, scan in scans.items())
    return hashlib.sha256(digests.encode()).hexdigest()


@dataclass(frozen=True)
class Recordings:
    """Windows whose samples have all been scanned."""

    windows: Windows
    description: Description
    sha256: str  # of all windows
    shifted: np.ndarray  # [files] bool, see Scan
    skipped: dict[str, str]  # file name -> reason
    rms: Float[np.ndarray, "files n_vars"]  # of each channel, in the unit of the recordings

    def described(self) -> JsonObject:
        """Return sampling rate and channels, which are part of a store's identity.

        {} without dataset.json, as in stores from before it existed.
        """
        if self.description is TUH:
            return {}
        return {
            "sampling_rate": self.description.sampling_rate,
            "channels": list(self.description.channels),
        }


def open_recordings(
    root_path: str | Path,
    splits: Sequence[Split],
    split_seed: int,
    shape: WindowShape,
    max_windows: int | None = None,
    on_bad_recording: OnBadRecording = "error",
) -> list[Recordings]:
    """Return the scanned windows of each split.

    max_windows: limit for each split.

    Raises UserError listing all unusable recordings of all splits; with "skip" they are skipped.
    """
    skips = on_bad_recording == "skip"
    scanned = [_scan_split(root_path, s, split_seed, shape, max_windows, skips) for s in splits]
    if not skips:
        check_usable({name: reason for split in scanned for name, reason in split.bad.items()})
    # Once, since that of a whole corpus takes seconds and 200 MB.
    description = read_description(recordings_folder(Path(root_path)))
    return [
        _scanned_recordings(split, scan, description)
        for split, scan in zip(splits, scanned, strict=True)
    ]


@dataclass(frozen=True)
class _SplitScan:
    windows: Windows
    scans: Mapping[str, Scan]
    bad: dict[str, str]  # file name -> reason


def _scan_split(
    root_path: str | Path,
    split: Split,
    split_seed: int,
    shape: WindowShape,
    max_windows: int | None,
    refill: bool,
) -> _SplitScan:
    """Scan a split's windows. refill: replace those of bad files by others, up to max_windows."""
    windows, bad = find_windows(root_path, split, split_seed, shape)
    scans: dict[str, Scan] = {}
    while True:
        selected = windows
        if max_windows:
            selected = windows.first(min(max_windows, len(windows)))
        scans = scan_windows(selected, scans)
        not_finite = {
            name: f"{NOT_FINITE} at sample {scan.first_not_finite}"
            for name, scan in scans.items()
            if scan.first_not_finite is not None
        }
        bad |= not_finite
        if not (not_finite and max_windows and refill):
            return _SplitScan(selected.without(not_finite), scans, bad)
        # The replacements can be bad too, hence the loop.
        windows = windows.without(not_finite)


def _scanned_recordings(split: Split, scan: _SplitScan, description: Description) -> Recordings:
    files = scan.windows.files
    if not len(scan.windows):
        reasons = list_bad(scan.bad)
        raise UserError(f"split {split} is empty: none of its recordings can be used ({reasons})")
    sha256 = sha256_of_scans(scan.scans)
    shifted = np.zeros(len(files), bool)
    if description is TUH:
        # In described recordings a channel that is all zero is flat.
        shifted[:] = [scan.scans[name].shifted for name in files]
    rms = np.array([scan.scans[name].rms for name in files])
    return Recordings(
        windows=scan.windows,
        description=description,
        sha256=sha256,
        shifted=shifted,
        skipped=scan.bad,
        rms=rms,
    )


def warn_of(recordings: Recordings, split: Split) -> None:
    """Warn about skipped recordings, shifted or zero channels, and a unit that must be wrong."""
    files = np.array(recordings.windows.files)
    shifted = files[recordings.shifted].tolist()
    if shifted:
        warnings.warn(
            f"last channel all zero in {join_some(shifted, limit=3)}: missing electrodes shifted "
            "the columns, so channel names are wrong there; a store's provenance.npz marks these "
            "recordings",
            stacklevel=2,
        )
    if recordings.skipped:
        reasons = [f"{name} {reason}" for name, reason in recordings.skipped.items()]
        warnings.warn(
            f"left out of split {split}: {join_some(reasons, limit=3)}; the manifest names them "
            "all",
            stacklevel=2,
        )
    _warn_of_zeros(recordings)
    _warn_of_unit(recordings)


def _warn_of_zeros(recordings: Recordings) -> None:
    """Warn about channels that are all zero, other than the last one of a shifted recording."""
    files = recordings.windows.files
    is_zero = recordings.rms == 0
    is_zero[recordings.shifted, -1] = False
    # Of recordings that are shorter than a window no sample is read.
    is_zero[recordings.windows.counts == 0] = False
    if not is_zero.any():
        return
    columns = np.flatnonzero(is_zero.any(axis=0))
    names = [f"column {column + 1}" for column in columns]
    if len(recordings.description.channels) == recordings.windows.n_vars:
        names = [recordings.description.channels[column] for column in columns]
    in_files = [files[i] for i in np.flatnonzero(is_zero.any(axis=1))]
    warnings.warn(
        f"channels all zero: {join_some(names)} (in {join_some(in_files, limit=3)}); their tokens "
        "are used like all others; `minsae prepare` interpolates missing and flat channels",
        stacklevel=3,
    )


def _warn_of_unit(recordings: Recordings) -> None:
    """Warn if the amplitude of most recordings is impossible in their unit."""
    unit = recordings.description.unit
    lowest, highest = PLAUSIBLE_SD
    if unit != "SD":
        lowest, highest = (limit / UV_PER_UNIT[unit] for limit in PLAUSIBLE_UV)
    varying = recordings.rms[recordings.rms > 0]
    median = float(np.median(varying)) if varying.size else 0.0
    if varying.size and not lowest <= median <= highest:
        warnings.warn(
            f"the recordings should be in {unit}, but their median amplitude is {median:.3g} "
            f"(expected {lowest:g} to {highest:g}), so the unit is probably wrong",
            stacklevel=3,
        )
