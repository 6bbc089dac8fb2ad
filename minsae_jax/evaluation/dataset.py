"""A store whose tokens are known by recording, channel and time, and the EEG that they came from."""

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


@dataclass(frozen=True)
class Dataset:
    """Sequences of tokens, each of one channel of one window; recordings lie one after the other."""

    store: Store
    architecture: Architecture
    folder: Path  # of the recordings
    recordings: tuple[str, ...]  # file names
    shifted: Bool[
        np.ndarray, " recordings"
    ]  # columns no longer stand for the channels of their names
    recording: Int[np.ndarray, " sequences"]
    window: Int[np.ndarray, " sequences"]  # within the recording
    channel: Int[np.ndarray, " sequences"]

    @property
    def n_tokens(self) -> int:
        return self.architecture.n_tokens

    @property
    def patients(self) -> list[str]:
        """Of every recording."""
        return [patient_of(name) for name in self.recordings]

    def sequences_of(self, recording: int) -> tuple[int, int]:
        """First sequence of a recording, and the one after its last."""
        start, stop = np.searchsorted(self.recording, [recording, recording + 1])
        return int(start), int(stop)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(rows // self.n_tokens for rows in self.store.tokens_per_shard))

    def read(self, start: int, stop: int) -> Float[np.ndarray, "sequences n_tokens d_model"]:
        """Activations of consecutive sequences, float32."""
        pieces, begin = [], 0
        for shard, end in enumerate(self._ends):
            first, last = max(start, begin), min(stop, end)
            if first < last:
                rows = self.store.read(
                    shard, (first - begin) * self.n_tokens, (last - begin) * self.n_tokens
                )
                pieces.append(rows.astype(np.float32, copy=False))
            begin = end
        return np.concatenate(pieces).reshape(-1, self.n_tokens, self.store.d_model)

    def batches(
        self, sequences: int
    ) -> Iterator[tuple[int, Float[np.ndarray, "sequences n_tokens d_model"]]]:
        """The number of the first sequence, and the activations of so many, all of one recording, in order."""
        for recording in range(len(self.recordings)):
            start, stop = self.sequences_of(recording)
            for first in range(start, stop, sequences):
                yield first, self.read(first, min(first + sequences, stop))

    def first_samples(
        self, sequence: Int[np.ndarray, "*n"], token: Int[np.ndarray, "*n"]
    ) -> Int[np.ndarray, "*n"]:
        """Where in its recording a token's patch begins; a CLS token's is where its window begins."""
        a = self.architecture
        patch = token - int(a.use_cls_token)
        within = np.where(patch < 0, 0, a.first_sample + a.stride * patch)
        return self.window[sequence].astype(np.int64) * a.seq_len + within

    @cached_property
    def _mapped(self) -> Callable[[int], np.ndarray]:
        return lru_cache(64)(
            lambda recording: load_recording(self.folder / self.recordings[recording])
        )

    def window_of(self, recording: int, window: int) -> Float[np.ndarray, "seq_len n_vars"]:
        """EEG in SD, all channels; mapped, and read where it is looked at."""
        size = self.architecture.seq_len
        return self._mapped(recording)[window * size : (window + 1) * size]


def seconds(samples: int | float) -> float:
    return float(samples) / SAMPLING_RATE


def open_dataset(
    path: str | Path, layer: int | None, architecture: Architecture, root_path: str | Path
) -> Dataset:
    """Raises UserError where the store has no provenance, or is of another encoder, or the recordings are missing."""
    store = open_store(path, layer)
    manifest = store.require_manifest()
    if (manifest.n_tokens, store.d_model) != (architecture.n_tokens, architecture.d_model):
        raise UserError(
            f"the store {store.folder} is of another architecture than the encoder: extract it again"
        )
    with np.load(store.folder / PROVENANCE, allow_pickle=False) as provenance:
        keys = ("recordings", "shifted", "recording", "window", "channel")
        recordings, shifted, recording, window, channel = (provenance[key] for key in keys)
    folder = recordings_folder(Path(root_path))
    missing = [str(name) for name in recordings if not (folder / str(name)).is_file()]
    if missing:
        raise UserError(
            f"{folder} does not hold {missing[0]}, of which the store {store.folder} is: name the recordings' folder "
            "with --root_path"
        )
    names = tuple(str(name) for name in recordings)
    return Dataset(store, architecture, folder, names, shifted, recording, window, channel)
