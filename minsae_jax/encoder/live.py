"""Activations computed from recordings while training reads them: `minsae train --live`."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property

import jax
import numpy as np
from jaxtyping import Float

from minsae_jax.activations.store import Origin
from minsae_jax.activations.stream import read_chunks
from minsae_jax.eeg.recordings import OnBadRecording, Recordings, Split, open_recordings, warn_of
from minsae_jax.encoder.converted import Encoder
from minsae_jax.encoder.extract import sharded_hidden
from minsae_jax.encoder.patchtst.architecture import layer_index
from minsae_jax.errors import UserError
from minsae_jax.parallel.mesh import DATA, fetch_batch, make_local_mesh, put_batch, replicated
from minsae_jax.settings import JsonObject


class LiveStore:
    """A `Source` of tokens like the store that `extract` would write, without files.

    A chunk is one window of EEG with all its channels; a shard is `batch_size` windows. Activations
    are computed on the devices when they are read, then copied to the host to be shuffled.
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
        self.windows = recordings.windows
        self.batch_size = batch_size
        self.folder = self.windows.folder
        self.d_model = a.d_model
        self.tokens_per_chunk = a.n_vars * a.n_tokens
        self.origin = Origin(encoder.fingerprint, layer, index, recordings.skipped)
        # Hashed into the fingerprint: with other names or values here, runs cannot resume.
        self._description: JsonObject = {
            "layer": layer,
            "layer_index": index,
            "encoder": encoder.fingerprint,
            "recordings_sha256": recordings.sha256,
            "n_windows": len(self.windows),
            "batch_size": batch_size,
            "revin": a.revin or force_revin,
            "skipped": recordings.skipped,
        }
        # Every process computes the whole stream, on its own devices.
        self._mesh = make_local_mesh()
        self._params = jax.device_put(encoder.params, replicated(self._mesh))
        self._compute = sharded_hidden(self._mesh, a, (index,), force_revin)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def n_chunks(self) -> int:
        return len(self.windows)

    @property
    def tokens_per_shard(self) -> list[int]:
        starts = range(0, self.n_chunks, self.batch_size)
        windows = [min(self.batch_size, self.n_chunks - start) for start in starts]
        return [n * self.tokens_per_chunk for n in windows]

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self._description, sort_keys=True).encode()).hexdigest()

    def read(self, shard: int) -> Float[np.ndarray, "rows d_model"]:
        """Return the tokens of one shard."""
        start = shard * self.batch_size
        return self._activations(self.windows.read(start, start + self.batch_size), self.batch_size)

    def read_chunks(self, chunks: Sequence[int], out: Float[np.ndarray, "most d_model"]) -> int:
        """Write the tokens of some windows into `out` and return their number."""
        # The batch is padded to the size of `out`, which is the same for a whole epoch, so that
        # the shorter last batch needs no compilation.
        n_windows = len(out) // self.tokens_per_chunk
        rows = self._activations(self.windows.read_at(np.asarray(chunks)), n_windows)
        out[: len(rows)] = rows
        return len(rows)

    def verify(self) -> None:
        """Do nothing: `open_recordings` has checked all samples."""

    def _activations(
        self, x: Float[np.ndarray, "windows seq_len n_vars"], padded_windows: int
    ) -> Float[np.ndarray, "rows d_model"]:
        windows_per_device = -(-min(padded_windows, self.n_chunks) // self._mesh.shape[DATA])
        (z,) = self._compute(self._params, put_batch(self._mesh, x, windows_per_device))
        parts = [part.reshape(-1, self.d_model) for part in fetch_batch(z, len(x))]
        return np.concatenate(parts)


def open_live(
    encoder: Encoder,
    *,
    root_path: str,
    split: Split,
    split_seed: int,
    layer: int,
    batch_size: int,
    force_revin: bool = False,
    on_bad_recording: OnBadRecording = "error",
) -> LiveStore:
    """Open the recordings of a split as a source of activations.

    layer: may be negative. batch_size: windows per shard. Raises UserError if recordings cannot be
    used.
    """
    a = encoder.architecture
    (recordings,) = open_recordings(
        root_path,
        (split,),
        split_seed,
        (a.seq_len, a.patch_len, a.n_vars),
        on_bad_recording=on_bad_recording,
    )
    warn_of(recordings, split)
    store = LiveStore(encoder, recordings, layer, batch_size, force_revin)
    if not np.isfinite(read_chunks(store, [0])).all():
        raise UserError(
            f"the encoder returned NaN or infinity for {recordings.windows.files[0]}; "
            "check that the recordings are in SD"
        )
    return store
