"""The edit of a layer's activations, and the encoder from that layer on.

The activations of some features are multiplied by scales, and the difference is added to x:

    x' = x + Σ_i (scale_i - 1) f_i(x) W_dec,i

This is x̂' + (x - x̂): the reconstruction from the scaled features, with the SAE's error added back.
Scale 1 is therefore the model itself, bit for bit, and scale 0 removes the features' contribution.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from minsae_jax.encoder.base import BaseEncoder, ComputeOptions, Downstream
from minsae_jax.errors import UserError
from minsae_jax.evaluation.dataset import Dataset, open_recording
from minsae_jax.monitor import progress
from minsae_jax.parallel.mesh import (
    fetch_batch,
    make_local_mesh,
    put_batch,
    replicated,
    shard_over_batch,
)
from minsae_jax.sae.member import SparseAutoencoder

BATCH_WINDOWS = 16


@dataclass(frozen=True)
class Place:
    """A window of a recording."""

    recording: str
    window: int


class Edit(NamedTuple):
    """The features of an SAE that are scaled."""

    # Of the SAE
    params: Any
    # Indices of the features [n]
    features: Any
    # Of every feature in every variant [variants, n]
    scales: Any


class SteeredWindows(NamedTuple):
    """Some of the windows of a run; the first variant is scale 1."""

    # Number of the first window
    start: int
    # Output of the steered layer, before it is changed
    hidden: Float[np.ndarray, "windows sequences n_tokens d_model"]
    # Output of the last layer
    last: Float[np.ndarray, "windows variants sequences n_tokens d_model"]
    # Reconstruction of each token with samples; None without a head that reconstructs
    patches: Float[np.ndarray, "windows variants sequences n_located patch_len"] | None


def can_steer(encoder: BaseEncoder, layer: int) -> bool:
    """Return whether the encoder can run from a layer on."""
    return encoder.function_from(layer, lambda _, x: x[None]) is not None


class SteeredEncoder:
    """The encoder with scaled features of one SAE at one layer, compiled once for each shape.

    Raises UserError if the encoder cannot run from a layer on.
    """

    def __init__(self, encoder: BaseEncoder, dataset: Dataset, layer: int, sae: SparseAutoencoder):
        self.dataset = dataset
        self.sae = sae
        kind = sae.kind

        def scaled(edit: Edit, x: Float[Array, "T d_model"]) -> Float[Array, "variants T d_model"]:
            activations = kind.encode_features(edit.params, x, edit.features)
            changes = (edit.scales - 1)[:, None] * activations[None]
            return x[None] + changes @ edit.params["W_dec"][edit.features]

        options = ComputeOptions(force_revin=dataset.store.require_manifest().data["revin"])
        function = encoder.function_from(layer, scaled, options)
        if function is None:
            raise UserError(
                "features cannot be steered in this encoder, since it cannot run from a layer on; "
                "PatchTST and CBraMod can"
            )

        def on_one_device(params: Any, x: Array) -> Downstream:
            encoder_params, edit = params
            with jax.default_matmul_precision("highest"):
                return function(encoder_params, edit, x)

        self._mesh = make_local_mesh()
        self._run = jax.jit(shard_over_batch(self._mesh, on_one_device))
        self._params = jax.device_put((encoder.params, sae.params), replicated(self._mesh))

    def run(
        self,
        places: Sequence[Place],
        features: Sequence[int],
        scales: Float[np.ndarray, "variants features"],
        folder: Path | None = None,
    ) -> Iterator[SteeredWindows]:
        """Yield some windows at a time; the variants are scale 1 everywhere, then `scales`.

        folder: of the recordings, by default that of the dataset.
        """
        encoder_params, sae_params = self._params
        ones = np.ones((1, len(features)))
        all_scales = np.concatenate([ones, scales]).astype(np.float32)
        edit = Edit(sae_params, np.asarray(features), all_scales)
        # All batches have one size, so that there is one compilation.
        per_device = -(-min(BATCH_WINDOWS, len(places)) // self._mesh.size)
        with progress("steer", len(places), "windows", delay=2.0) as bar:
            for start in range(0, len(places), BATCH_WINDOWS):
                batch = places[start : start + BATCH_WINDOWS]
                windows = [self.read_window(place, folder) for place in batch]
                x = put_batch(self._mesh, np.stack(windows), per_device)
                downstream = self._run((encoder_params, edit), x)
                n = len(windows)
                hidden = _fetch(downstream.hidden, n)
                last = _fetch(downstream.last, n)
                patches = None
                if downstream.patches is not None:
                    patches = _fetch(downstream.patches, n)
                yield SteeredWindows(start, hidden, last, patches)
                bar.advance(n)

    def strength(
        self, x: Float[np.ndarray, "*tokens d_model"], features: Sequence[int]
    ) -> Float[np.ndarray, "*tokens"]:
        """Return Σ_i f_i(x) ‖W_dec,i‖ over some features: how much they write into each token."""
        norms = np.linalg.norm(self.sae.decoder_directions[list(features)], axis=1)
        return self.sae.encode_features(x, features) @ norms

    def read_window(
        self, place: Place, folder: Path | None = None
    ) -> Float[np.ndarray, "seq_len n_vars"]:
        """Return the EEG of a window in the recording's unit, float32."""
        seq_len = self.dataset.seq_len
        recording = open_recording((folder or self.dataset.folder) / place.recording)
        start = place.window * seq_len
        return np.asarray(recording[start : start + seq_len], np.float32)


def _fetch(array: jax.Array, n_windows: int) -> np.ndarray:
    shards = fetch_batch(array, n_windows)
    # The windows of a single device are not copied.
    return shards[0] if len(shards) == 1 else np.concatenate(shards)
