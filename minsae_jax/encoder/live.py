"""Activations made from recordings as they are read, with the interface of a store: `minsae train --live`."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float

from minsae_jax.activations.store import Origin
from minsae_jax.activations.stream import chunks_per_buffer, read_chunks
from minsae_jax.eeg.recordings import OnBadRecording, Recordings, Split, open_recordings, warn_of
from minsae_jax.encoder.converted import Encoder
from minsae_jax.encoder.extract import sharded_hidden
from minsae_jax.encoder.patchtst.model import layer_index
from minsae_jax.errors import UserError
from minsae_jax.parallel.mesh import DATA, fetch_batch, make_local_mesh, put_batch, replicated


@runtime_checkable
class LiveSettings(Protocol):
    """The settings of training that say where live activations come from."""

    @property
    def root_path(self) -> str | None: ...
    @property
    def split(self) -> Split: ...
    @property
    def split_seed(self) -> int: ...
    @property
    def cache_layer(self) -> int: ...
    @property
    def live_batch_size(self) -> int: ...
    @property
    def force_revin(self) -> bool: ...
    @property
    def on_bad_recording(self) -> OnBadRecording: ...


class LiveStore:
    """The store that `extract` would write, of which nothing is written.

    A chunk is a window of EEG with all its channels; a shard is `batch_size` windows. What is read is computed on the
    devices, and comes to the host to be shuffled.
    """

    def __init__(
        self,
        encoder: Encoder,
        recordings: Recordings,
        layer: int,
        batch_size: int,
        force_revin: bool = False,
    ):
        a = encoder.architecture
        index = layer_index(layer, a.n_layers)
        self.windows, self.batch_size = recordings.windows, batch_size
        self.folder, self.d_model = self.windows.folder, a.d_model
        self.tokens_per_chunk = a.n_vars * a.n_tokens
        self.origin = Origin(encoder.fingerprint, layer, index, recordings.skipped)
        self._description: dict[str, Any] = {
            "layer": layer,
            "layer_index": index,
            "encoder": encoder.fingerprint,
            "recordings_sha256": recordings.sha256,
            "n_windows": len(self.windows),
            "batch_size": batch_size,
            "revin": a.revin or force_revin,
            "skipped": recordings.skipped,
        }
        self._mesh = make_local_mesh()
        self._params = jax.device_put(encoder.params, replicated(self._mesh))
        self._run = sharded_hidden(self._mesh, a, (index,), force_revin)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def n_chunks(self) -> int:
        return len(self.windows)

    @property
    def tokens_per_shard(self) -> list[int]:
        starts = range(0, len(self.windows), self.batch_size)
        return [
            min(self.batch_size, len(self.windows) - start) * self.tokens_per_chunk
            for start in starts
        ]

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self._description, sort_keys=True).encode()).hexdigest()

    def read(self, shard: int) -> Float[np.ndarray, "rows d_model"]:
        start = shard * self.batch_size
        return self._activations(self.windows.read(start, start + self.batch_size), self.batch_size)

    def read_chunks(self, chunks: Sequence[int], out: Float[np.ndarray, "capacity d_model"]) -> int:
        # Padded to a full shuffle buffer, so that there is one compilation.
        windows = self.windows.read_at(np.asarray(chunks))
        rows = self._activations(windows, chunks_per_buffer(self))
        out[: len(rows)] = rows
        return len(rows)

    def verify(self) -> None:
        """All samples have been looked at already."""

    def _activations(self, x: np.ndarray, size: int) -> Float[np.ndarray, "rows d_model"]:
        rows_per_device = -(-min(size, len(self.windows)) // self._mesh.shape[DATA])
        (z,) = self._run(self._params, put_batch(self._mesh, x, rows_per_device))
        pieces = [piece.reshape(-1, self.d_model) for piece in fetch_batch(z, len(x))]
        return np.concatenate(pieces)


def open_live(encoder: Encoder, settings: LiveSettings) -> LiveStore:
    """The split's recordings as a store. Raises UserError where they cannot be used."""
    a = encoder.architecture
    (recordings,) = open_recordings(
        str(settings.root_path), (settings.split,), settings.split_seed, (a.seq_len, a.patch_len, a.n_vars),
        on_bad_recording=settings.on_bad_recording,
    )  # fmt: skip
    warn_of(recordings, settings.split)
    store = LiveStore(
        encoder, recordings, settings.cache_layer, settings.live_batch_size, settings.force_revin
    )
    if not np.isfinite(read_chunks(store, [0])).all():
        raise UserError(
            f"the encoder gives NaN or infinity for {recordings.windows.files[0]}: see whether the recordings are in SD"
        )
    return store
