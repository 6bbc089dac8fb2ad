"""Checks of recordings: all samples are finite, and those that a store was extracted from."""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from minsae_jax.activations.manifest import MANIFEST
from minsae_jax.eeg.recordings import Windows
from minsae_jax.eeg.scan import NOT_FINITE, scan_windows, sha256_of_scans
from minsae_jax.errors import UserError
from minsae_jax.evaluation.dataset import Dataset, open_recording

CHECKED_SAMPLES = 100_000  # at a time


def open_finite_recording(path: Path) -> Float[np.ndarray, "time n_vars"]:
    """Return a recording as a memory map, all samples checked.

    Raises UserError if it is damaged, or contains NaN or infinity.
    """
    eeg = open_recording(path)
    for start in range(0, len(eeg), CHECKED_SAMPLES):
        is_finite = np.isfinite(eeg[start : start + CHECKED_SAMPLES]).all(axis=1)
        if not is_finite.all():
            sample = start + int(np.argmin(is_finite))
            raise UserError(f"{path} contains NaN or infinity at sample {sample}")
    return eeg


def check_unchanged(dataset: Dataset) -> None:
    """Raise UserError if the recordings are not those that the store was extracted from.

    Their EEG would not fit the activations. All samples of the store's windows are read. Only
    shapes are compared where the store has no checksum of them, as of imported activations, or
    where that includes skipped recordings with NaN, of which the store does not say the order.
    """
    n_windows = np.zeros(len(dataset.recordings), np.int64)
    np.maximum.at(n_windows, dataset.recording, dataset.window + 1)
    n_samples = n_windows * dataset.seq_len
    advice = "restore them, choose their folder with --root_path, or extract the store again"
    for name, n_needed in zip(dataset.recordings, n_samples, strict=True):
        shape = open_recording(dataset.folder / name).shape
        if shape[0] < n_needed or shape[1] != dataset.n_vars:
            raise UserError(
                f"{dataset.folder / name} has {shape[0]:,} samples of {shape[1]} channels, but the "
                f"store {dataset.store.folder} is of {n_needed:,} of {dataset.n_vars}; {advice}"
            )
    data = dataset.store.require_manifest().data
    expected = data.get("recordings_sha256")
    has_skipped = NOT_FINITE in str(data.get("skipped"))
    # With --max_batches, other recordings have replaced them, also in the checksum.
    if expected is None or (has_skipped and data.get("max_batches") is None):
        return
    windows = Windows(
        folder=dataset.folder,
        files=dataset.recordings,
        lengths=tuple(n_samples.tolist()),
        seq_len=dataset.seq_len,
        reserved_samples=0,
        n_vars=dataset.n_vars,
        stamps={},
    )
    if sha256_of_scans(scan_windows(windows)) != expected:
        raise UserError(
            f"the recordings in {dataset.folder} are not those that the store "
            f"{dataset.store.folder} was extracted from, to which `recordings_sha256` of its "
            f"{MANIFEST} belongs; {advice}"
        )
