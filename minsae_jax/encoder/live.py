"""Activations computed from recordings while training reads them: `minsae train --live`."""

from collections.abc import Sequence
from functools import cached_property

import jax
import numpy as np
from jaxtyping import Float

from minsae_jax.activations.manifest import sha256_of_json
from minsae_jax.activations.store import Origin
from minsae_jax.eeg.scan import Recordings, warn_of
from minsae_jax.encoder.base import BaseEncoder, ComputeOptions
from minsae_jax.encoder.compute import Activations
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.encoder.plan import open_fitting_recordings, requested_layers
from minsae_jax.errors import UserError
from minsae_jax.parallel.processes import WHOLE, Share
from minsae_jax.settings import JsonObject


class LiveStore:
    """A `Source` of tokens like the store that `extract` would write, without files.

    A chunk is one window of EEG with all its channels; a shard is `batch_size` windows. Activations
    are computed on the devices when they are read, then copied to the host to be shuffled. config:
    of one split and layer.
    """

    def __init__(self, encoder: BaseEncoder, recordings: Recordings, config: ExtractConfig):
        spec = encoder.spec
        options = ComputeOptions(config.precision, config.force_revin)
        ((index, layer),) = requested_layers(config, spec).items()
        self.windows = recordings.windows
        self.batch_size = config.batch_size
        self.folder = self.windows.folder
        self.d_model = spec.d_model
        self.tokens_per_chunk = spec.n_sequences * spec.tokens.n_tokens
        revin = encoder.applies_revin(options)
        self.origin = Origin(encoder.fingerprint, layer, index, revin, recordings.skipped)
        # Hashed into the fingerprint: with other names or values here, runs cannot resume.
        self._description: JsonObject = {
            "layer": layer,
            "layer_index": index,
            "encoder": encoder.fingerprint,
            "recordings_sha256": recordings.sha256,
            "n_windows": len(self.windows),
            "batch_size": config.batch_size,
            "revin": revin,
            "skipped": recordings.skipped,
            **recordings.described(),
        }
        # Every process computes its share of the stream, on its own devices.
        self._compute = Activations(encoder, (index,), options=options)

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
        return sha256_of_json(self._description)

    def read(
        self, shard: int, start: int = 0, stop: int | None = None
    ) -> Float[np.ndarray, "tokens d_model"]:
        """Return consecutive tokens of one shard."""
        start, stop, _ = slice(start, stop).indices(self.tokens_per_shard[shard])
        # The windows that contain the tokens.
        first = start // self.tokens_per_chunk
        end = -(-stop // self.tokens_per_chunk)
        n_padded = end - first
        # A shorter last shard needs no compilation.
        if start == 0 and stop == self.tokens_per_shard[shard]:
            n_padded = self.batch_size
        base = shard * self.batch_size
        windows = self.windows.read(base + first, base + end)
        tokens = self._activations(windows, n_padded)
        n_before = first * self.tokens_per_chunk
        return tokens[start - n_before : stop - n_before]

    def tokens_in_chunk(self, chunk: int) -> int:
        """Return the number of tokens of a window, which all windows share."""
        return self.tokens_per_chunk

    def read_chunks(self, chunks: Sequence[int], out: Float[np.ndarray, "capacity d_model"]) -> int:
        """Write the tokens of some windows into `out` and return their number."""
        # The batch is padded to the size of `out`, which is the same for a whole epoch, so that
        # the shorter last batch needs no compilation.
        n_windows = len(out) // self.tokens_per_chunk
        tokens = self._activations(self.windows.read_at(np.asarray(chunks)), n_windows)
        out[: len(tokens)] = tokens
        return len(tokens)

    def recordings(self) -> set[str]:
        """Return the file names of the recordings."""
        return set(self.windows.files)

    def verify(self, share: Share = WHOLE) -> None:
        """Do nothing: `open_recordings` has checked all samples."""

    def _activations(
        self, x: Float[np.ndarray, "windows seq_len n_vars"], padded_windows: int
    ) -> Float[np.ndarray, "tokens d_model"]:
        """Return the activations of windows, padded to one size so that they share a program."""
        (z,) = self._compute.start(x, min(padded_windows, self.n_chunks))
        parts = self._compute.fetch(z, len(x))
        return np.concatenate([part.reshape(-1, self.d_model) for part in parts])


def open_live(encoder: BaseEncoder, config: ExtractConfig) -> LiveStore:
    """Open the recordings of a split as a source of activations.

    config: of one split and layer. Raises UserError if recordings cannot be used, or do not fit the
    encoder.
    """
    (recordings,) = open_fitting_recordings(config, encoder.spec)
    if jax.process_index() == 0:
        warn_of(recordings, config.split[0])
    store = LiveStore(encoder, recordings, config)
    first_window = store.read(0, stop=store.tokens_per_chunk)
    if not np.isfinite(first_window).all():
        raise UserError(
            f"the encoder returned NaN or infinity for {recordings.windows.files[0]}; "
            "check that the recordings are in SD"
        )
    return store
