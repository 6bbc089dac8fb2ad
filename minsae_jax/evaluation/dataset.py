"""A store with the recording, time and channel of its tokens, and the EEG behind them."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from minsae_jax.activations.manifest import MANIFEST, Manifest
from minsae_jax.activations.shards import PROVENANCE
from minsae_jax.activations.store import Store, open_store
from minsae_jax.activations.tokens import TokenGrid, read_tokens
from minsae_jax.checksums import read_npz
from minsae_jax.eeg.description import TUH, Description, read_description
from minsae_jax.eeg.montage import POSITIONS, scalp_positions
from minsae_jax.eeg.recordings import load_recording, patient_of, recordings_folder
from minsae_jax.encoder.base import BaseEncoder
from minsae_jax.errors import UserError, reading

MAX_OPEN_RECORDINGS = 64


@dataclass(frozen=True, kw_only=True)
class TokenPlaces:
    """Sequences of tokens, each of one window or of one channel of it, sorted by recording.

    `recording`, `window` and `channel` locate each sequence. In a shifted recording, columns may
    not correspond to the channel names, since electrodes were missing.
    """

    # Places of the tokens of a sequence
    tokens: TokenGrid
    # Samples per window, and channels
    seq_len: int
    n_vars: int
    description: Description
    # Folder of the recordings
    folder: Path
    # File names of the recordings
    recordings: tuple[str, ...]
    shifted: Bool[np.ndarray, " recordings"]
    # Of every sequence: index into `recordings`, window within it, channel or -1
    recording: Int[np.ndarray, " sequences"]
    window: Int[np.ndarray, " sequences"]
    channel: Int[np.ndarray, " sequences"]

    @property
    def n_tokens(self) -> int:
        """Tokens per sequence."""
        return self.tokens.n_tokens

    @property
    def sampling_rate(self) -> float:
        """In Hz."""
        return self.description.sampling_rate

    def seconds(self, samples: int) -> float:
        """Return a number of samples as a time."""
        return float(samples) / self.sampling_rate

    @property
    def channel_names(self) -> tuple[str, ...] | None:
        """Names of the channels, or None if they are unknown."""
        names = self.description.channels
        return names if len(names) == self.n_vars else None

    @property
    def positions(self) -> Float[np.ndarray, "n_vars 2"] | None:
        """Places of the channels on a unit head seen from above, NaN where one is unknown.

        None if no channel has a known place.
        """
        if self.channel_names is None:
            return None
        if self.description is TUH:
            return POSITIONS
        positions = scalp_positions(self.description.positions)
        return None if np.isnan(positions).all() else positions

    def places_sha256(self) -> str:
        """Return a checksum of everything that says where tokens lie, for measures that are saved.

        A store's own fingerprint is of its activations.
        """
        grid = self.tokens
        names = [self.recordings, self.description.channels, self.seq_len]
        digest = hashlib.sha256(json.dumps(names).encode())
        per_sequence = (self.recording, self.window, self.channel)
        for places in (grid.channel, grid.first, grid.last, *per_sequence):
            digest.update(places.astype("<i4").tobytes())
        return digest.hexdigest()

    @cached_property
    def has_channels(self) -> bool:
        """Whether there are tokens of single channels."""
        return bool((self.channel >= 0).any() or (self.tokens.channel >= 0).any())

    @cached_property
    def patients(self) -> list[str]:
        """The patient of every recording."""
        return [patient_of(name) for name in self.recordings]

    def sequences_of(self, recording: int) -> tuple[int, int]:
        """Return the first sequence of a recording and the one after its last."""
        return int(self._bounds[recording]), int(self._bounds[recording + 1])

    @property
    def windows(self) -> Int[np.ndarray, "windows 2"]:
        """Recording and window of all windows, in order."""
        # A store has one sequence per channel, so each window is in it several times. Single
        # numbers are sorted faster than pairs.
        n_windows = int(self.window.max()) + 1
        number = np.unique(self.recording.astype(np.int64) * n_windows + self.window)
        return np.stack(np.divmod(number, n_windows), axis=1)

    @cached_property
    def _bounds(self) -> Int[np.ndarray, " bounds"]:
        """First sequence of each recording, and the number of sequences."""
        return np.searchsorted(self.recording, np.arange(len(self.recordings) + 1))

    def first_samples(
        self,
        sequence: Int[np.ndarray, "*n"],
        token: Int[np.ndarray, "*n"],
    ) -> Int[np.ndarray, "*n"]:
        """Return the sample of the recording at which each token's samples begin.

        For a CLS token this is the first sample of its window.
        """
        sample_in_window = np.maximum(self.tokens.first[token], 0)
        return self.window[sequence].astype(np.int64) * self.seq_len + sample_in_window

    def lengths(self, token: Int[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
        """Return the number of samples of each token; that of a CLS token is meaningless.

        Samples that a padded patch has after its window are not those of the recording there.
        """
        last = np.minimum(self.tokens.last[token], self.seq_len - 1)
        return last - self.tokens.first[token] + 1

    def channels_of(
        self,
        sequence: Int[np.ndarray, "*n"],
        token: Int[np.ndarray, "*n"],
    ) -> Int[np.ndarray, "*n"]:
        """Return the channel of each token: its own, else its sequence's, else -1 for all."""
        channel_of_token = self.tokens.channel[token]
        return np.where(channel_of_token >= 0, channel_of_token, self.channel[sequence])

    @cached_property
    def _load_recording(self) -> Callable[[int], np.ndarray]:
        @lru_cache(MAX_OPEN_RECORDINGS)
        def load(recording: int) -> np.ndarray:
            return open_recording(self.folder / self.recordings[recording])

        return load

    def window_of(self, recording: int, window: int) -> Float[np.ndarray, "seq_len n_vars"]:
        """Return all channels of a window in the recording's unit, memory-mapped."""
        seq_len = self.seq_len
        return self._load_recording(recording)[window * seq_len : (window + 1) * seq_len]

    def eeg_of(self, sequence: int) -> Float[np.ndarray, "seq_len n_vars"]:
        """Return all channels of a sequence's window, in SD of the recording's channels."""
        begin = int(self.window[sequence]) * self.seq_len
        return self.eeg_between(int(self.recording[sequence]), begin, begin + self.seq_len)

    def eeg_between(
        self, recording: int, begin: int, stop: int
    ) -> Float[np.ndarray, "samples n_vars"]:
        """Return samples begin:stop of a recording, in SD of its channels."""
        eeg = self._load_recording(recording)[begin:stop]
        if self.description.unit == "SD":
            return eeg
        mean, sd = self._moments(recording)
        return ((eeg - mean) / sd).astype(np.float32)

    def recording_length(self, recording: int) -> int:
        """Return the number of samples of a recording."""
        return len(self._load_recording(recording))

    def uv_per_sd(self, recording: int) -> Float[np.ndarray, " n_vars"] | None:
        """Return the SD of each channel of a recording in µV, or None if it is unknown."""
        if self.channel_names is None:
            return None
        uv_per_unit = self.description.uv_per_unit(self.recordings[recording])
        if uv_per_unit is None or self.description.unit == "SD":
            return uv_per_unit
        _, sd = self._moments(recording)
        return uv_per_unit * sd

    @cached_property
    def _moments(self) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        # Of all recordings: two small arrays each, from a pass over the recording.
        @cache
        def moments(recording: int) -> tuple[np.ndarray, np.ndarray]:
            """Return mean and SD of each channel in the recording's unit; SD 1 if it is flat."""
            eeg = self._load_recording(recording)
            sd = eeg.std(axis=0, dtype=np.float64)
            return eeg.mean(axis=0, dtype=np.float64), np.where(sd > 0, sd, 1)

        return moments


@dataclass(frozen=True, kw_only=True)
class Dataset(TokenPlaces):
    """A store with the recording, time and channel of its tokens."""

    store: Store

    def read(self, start: int, stop: int) -> Float[np.ndarray, "sequences n_tokens d_model"]:
        """Return the activations of sequences start:stop, float32; like a slice, up to the last."""
        stop = min(stop, len(self.recording))
        rows = self.store.read_rows(start * self.n_tokens, stop * self.n_tokens)
        x = rows.astype(np.float32, copy=False)
        return x.reshape(-1, self.n_tokens, self.store.d_model)

    def batches(
        self, sequences: int
    ) -> Iterator[tuple[int, Float[np.ndarray, "sequences n_tokens d_model"]]]:
        """Yield (first sequence, activations) of up to `sequences` sequences at a time, in order.

        A batch never spans two recordings.
        """
        for recording in range(len(self.recordings)):
            start, stop = self.sequences_of(recording)
            for first in range(start, stop, sequences):
                yield first, self.read(first, min(first + sequences, stop))


def open_dataset(
    path: str | Path, layer: int | None, encoder: BaseEncoder | None, root_path: str | Path
) -> Dataset:
    """Open a store with its recordings; `layer` is needed if the folder contains several layers.

    encoder: needed for stores without tokens.npz. Raises UserError if the store has no provenance,
    or was extracted with an encoder of another architecture or from recordings of another sampling
    rate or other channels, or if recordings are missing.
    """
    store = open_store(path, layer)
    manifest = store.require_manifest()
    missing = [name for name in ("seq_len", "revin") if name not in manifest.data]
    if missing:
        raise UserError(
            f"{store.folder / MANIFEST} lacks {' and '.join(missing)}; extract it again"
        )
    tokens = _tokens_of(store, manifest, encoder)
    arrays = _read_provenance(store.folder / PROVENANCE, manifest.n_sequences)
    names = tuple(str(name) for name in arrays["recordings"])
    folder = recordings_folder(Path(root_path))
    for name in names:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} does not contain {name}, which the store {store.folder} was extracted "
                "from; choose the recordings' folder with --root_path (that of a val store with "
                "--val_root_path)"
            )
    description = read_description(folder)
    _check_description(store, manifest, description)
    return Dataset(
        store=store,
        tokens=tokens,
        seq_len=manifest.data["seq_len"],
        n_vars=open_recording(folder / names[0]).shape[1],
        description=description,
        folder=folder,
        recordings=names,
        shifted=arrays["shifted"],
        recording=arrays["recording"],
        window=arrays["window"],
        channel=arrays["channel"],
    )


def open_recording(path: Path) -> Float[np.ndarray, "time n_vars"]:
    """Return a recording as a memory map. Raises UserError if it is damaged."""
    with reading(f"{path} cannot be read"):
        recording = load_recording(path)
    if recording.ndim != 2 or recording.dtype.kind != "f":
        raise UserError(f"{path} must be floats [time, channels], but is {recording.dtype}")
    return recording


def _read_provenance(path: Path, n_sequences: int) -> dict[str, np.ndarray]:
    """Return the arrays of a provenance.npz. Raises UserError if it is damaged."""
    with reading(f"{path} is damaged", remedy="; extract the store again"):
        arrays = read_npz(path)
        recording = arrays["recording"]
        n_recordings = len(arrays["recordings"])
        are_valid = len(arrays["shifted"]) == n_recordings > 0
        for name in ("recording", "window", "channel"):
            is_integer = arrays[name].dtype.kind == "i"
            are_valid &= is_integer and arrays[name].shape == (n_sequences,)
        are_valid &= 0 <= recording.min() <= recording.max() < n_recordings
    if not are_valid:
        raise UserError(f"{path} is damaged; extract the store again")
    return arrays


def _tokens_of(store: Store, manifest: Manifest, encoder: BaseEncoder | None) -> TokenGrid:
    """Return the places of a sequence's tokens, from the store or else from the encoder."""
    if encoder is not None:
        expected = (encoder.spec.tokens.n_tokens, encoder.spec.d_model)
        if (manifest.n_tokens, store.d_model) != expected:
            raise UserError(
                f"{store.folder} was extracted with an encoder of another architecture; "
                "extract it again"
            )
    tokens = read_tokens(store.folder)
    if tokens is None:
        if encoder is None:
            raise UserError(
                f"{store.folder} has no tokens.npz, as stores of earlier versions; it can only be "
                "used with its encoder (--checkpoint_path)"
            )
        return encoder.spec.tokens
    if tokens.n_tokens != manifest.n_tokens:
        raise UserError(f"tokens.npz of {store.folder} is of another store; extract it again")
    return tokens


def _check_description(store: Store, manifest: Manifest, description: Description) -> None:
    """Raise UserError if the store's recordings had another description."""
    rate = manifest.data.get("sampling_rate", TUH.sampling_rate)
    channels = manifest.data.get("channels")
    if rate != description.sampling_rate:
        raise UserError(
            f"{store.folder} is of recordings at {rate:g} Hz, but those of --root_path are at "
            f"{description.sampling_rate:g} Hz"
        )
    if channels is not None and tuple(channels) != description.channels:
        raise UserError(
            f"{store.folder} is of recordings with the channels {' '.join(channels)}, but those of "
            f"--root_path have {' '.join(description.channels)}"
        )
