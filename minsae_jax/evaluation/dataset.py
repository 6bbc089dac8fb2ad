"""A store with the recording, window and channel of its tokens, and the EEG behind them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from minsae_jax.activations.store import PROVENANCE, Store, open_store
from minsae_jax.eeg.recordings import (
    SAMPLING_RATE,
    load_recording,
    patient_of,
    recordings_folder,
)
from minsae_jax.encoder.patchtst.architecture import Architecture
from minsae_jax.errors import UserError

MAX_OPEN_RECORDINGS = 64


@dataclass(frozen=True)
class Dataset:
    """Sequences of tokens, each of one channel of one window, sorted by recording.

    `recording`, `window` and `channel` say where each sequence is from. The columns of a shifted
    recording may not be the channels of their names, since electrodes were missing.
    """

    store: Store
    architecture: Architecture
    # Folder of the recordings
    folder: Path
    # File names of the recordings
    recordings: tuple[str, ...]
    shifted: Bool[np.ndarray, " recordings"]
    # Of every sequence: index into `recordings`, window within it, channel
    recording: Int[np.ndarray, " sequences"]
    window: Int[np.ndarray, " sequences"]
    channel: Int[np.ndarray, " sequences"]

    @property
    def n_tokens(self) -> int:
        """Tokens per sequence."""
        return self.architecture.n_tokens

    @property
    def patch_tokens(self) -> Int[np.ndarray, " n_patches"]:
        """Positions in a sequence of all tokens but the CLS token."""
        return np.arange(int(self.architecture.use_cls_token), self.n_tokens)

    @property
    def patients(self) -> list[str]:
        """The patient of every recording."""
        return [patient_of(name) for name in self.recordings]

    def sequences_of(self, recording: int) -> tuple[int, int]:
        """Return the first sequence of a recording and the one after its last."""
        start, stop = np.searchsorted(self.recording, [recording, recording + 1])
        return int(start), int(stop)

    @cached_property
    def _shard_ends(self) -> list[int]:
        """The sequence after the last of each shard."""
        return list(accumulate(rows // self.n_tokens for rows in self.store.tokens_per_shard))

    def read(self, start: int, stop: int) -> Float[np.ndarray, "sequences n_tokens d_model"]:
        """Return the activations of sequences start:stop, float32."""
        pieces = []
        begin = 0
        for shard, end in enumerate(self._shard_ends):
            first = max(start, begin)
            last = min(stop, end)
            if first < last:
                first_row = (first - begin) * self.n_tokens
                last_row = (last - begin) * self.n_tokens
                rows = self.store.read(shard, first_row, last_row)
                pieces.append(rows.astype(np.float32, copy=False))
            begin = end
        return np.concatenate(pieces).reshape(-1, self.n_tokens, self.store.d_model)

    def batches(
        self, sequences: int
    ) -> Iterator[tuple[int, Float[np.ndarray, "sequences n_tokens d_model"]]]:
        """Yield (first sequence, activations) of up to `sequences` sequences at a time, in order.

        A batch is never of two recordings.
        """
        for recording in range(len(self.recordings)):
            start, stop = self.sequences_of(recording)
            for first in range(start, stop, sequences):
                yield first, self.read(first, min(first + sequences, stop))

    def first_samples(
        self,
        sequence: Int[np.ndarray, "*n"],
        token: Int[np.ndarray, "*n"],
    ) -> Int[np.ndarray, "*n"]:
        """Return the sample of the recording at which each token's patch begins.

        For a CLS token this is the first sample of its window.
        """
        a = self.architecture
        patch = token - int(a.use_cls_token)
        sample_in_window = np.where(patch < 0, 0, a.first_sample + a.stride * patch)
        return self.window[sequence].astype(np.int64) * a.seq_len + sample_in_window

    @cached_property
    def _load_recording(self) -> Callable[[int], np.ndarray]:
        @lru_cache(MAX_OPEN_RECORDINGS)
        def load(recording: int) -> np.ndarray:
            return load_recording(self.folder / self.recordings[recording])

        return load

    def window_of(self, recording: int, window: int) -> Float[np.ndarray, "seq_len n_vars"]:
        """Return all channels of a window in SD, memory-mapped."""
        seq_len = self.architecture.seq_len
        return self._load_recording(recording)[window * seq_len : (window + 1) * seq_len]


def seconds(samples: int | float) -> float:
    return float(samples) / SAMPLING_RATE


def open_dataset(
    path: str | Path, layer: int | None, architecture: Architecture, root_path: str | Path
) -> Dataset:
    """Open a store with its recordings; `layer` is needed if the folder contains several layers.

    Raises UserError if the store has no provenance or was extracted with an encoder of another
    architecture, or if recordings are missing.
    """
    store = open_store(path, layer)
    if not store.manifest:
        raise UserError(
            f"{store.folder} does not record where its tokens are from; extract it with minsae"
        )
    shape = (store.manifest.n_tokens, store.d_model)
    if shape != (architecture.n_tokens, architecture.d_model):
        raise UserError(
            f"{store.folder} was extracted with an encoder of another architecture; "
            "extract it again"
        )
    with np.load(store.folder / PROVENANCE, allow_pickle=False) as provenance:
        arrays = dict(provenance)
    names = tuple(str(name) for name in arrays["recordings"])
    folder = recordings_folder(Path(root_path))
    for name in names:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} does not contain {name}, which the store {store.folder} was extracted "
                "from; choose the recordings' folder with --root_path"
            )
    return Dataset(
        store=store,
        architecture=architecture,
        folder=folder,
        recordings=names,
        shifted=arrays["shifted"],
        recording=arrays["recording"],
        window=arrays["window"],
        channel=arrays["channel"],
    )
