"""Encoders with random weights: the control for what an encoder has learned.

SAEs find features that detect events also in a transformer that was never trained, since its
activations still contain its input (Heap et al. 2025, arXiv 2501.17727). Only what exceeds this
control is evidence of learning.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from minsae_jax.eeg.description import read_description
from minsae_jax.eeg.recordings import open_windows, recordings_folder
from minsae_jax.encoder.base import check_recordings
from minsae_jax.encoder.native import NativeEncoder, bind
from minsae_jax.encoder.patchtst.encoder import PatchTSTEncoder
from minsae_jax.encoder.patchtst.model import PatchTST, patches
from minsae_jax.errors import UserError

MAX_WINDOWS = 64
MAX_SCORES = 2**26  # attention scores of a layer, which are in memory at once


def has_batch_norm(encoder: NativeEncoder) -> bool:
    """Return whether the encoder normalises by averages over its training data."""
    return isinstance(encoder, PatchTSTEncoder) and encoder.architecture.norm == "BatchNorm"


def with_random_weights(
    encoder: NativeEncoder,
    windows: Float[np.ndarray, "windows seq_len n_vars"] | None = None,
    seed: int = 0,
) -> NativeEncoder:
    """Return an encoder of the same architecture in which every parameter is permuted.

    The entries of each tensor keep their distribution, and nothing else. windows: EEG whose means
    and variances become the averages of BatchNorm, without which the scale of the layers would be
    arbitrary; encoders with other norms do not need any. The head is left out. The result depends
    on the seed and, in the last digits of the averages, on the machine.

    Raises UserError without windows for an encoder with BatchNorm.
    """
    rng = np.random.default_rng(seed)
    architecture = encoder.without_head()
    abstract = encoder.abstract_params(architecture)

    def permuted(parameter: jax.Array | np.ndarray) -> jax.Array:
        flat = np.asarray(parameter).reshape(-1)
        return jnp.asarray(rng.permutation(flat).reshape(parameter.shape))

    params = jax.tree.map(permuted, {name: encoder.params[name] for name in abstract})
    if has_batch_norm(encoder):
        if windows is None:
            raise UserError("an encoder with BatchNorm requires windows of EEG for its averages")
        model = bind(PatchTST, architecture, params)
        params = nnx.to_pure_dict(nnx.state(_with_averages_of(windows, model)))
    return type(encoder)(architecture, params)


def _with_averages_of(windows: np.ndarray, model: PatchTST) -> PatchTST:
    """Set the averages of each BatchNorm to the mean and variance of its inputs."""
    # Flax's fast variance, E[x²] - E[x]², loses digits in float32.
    model.set_attributes(
        nnx.BatchNorm, use_running_average=False, momentum=0.0, use_fast_variance=False
    )
    with jax.default_matmul_precision("highest"):
        # Not `hidden`, which on CPU runs the sequences one by one.
        x = model.embed(patches(model.architecture, model.normalized(jnp.asarray(windows))))
        model.run_layers(x.reshape(-1, *x.shape[2:]), (model.architecture.n_layers - 1,))
    return model


def windows_for_averages(
    root_path: str | Path, encoder: NativeEncoder
) -> Float[np.ndarray, "windows seq_len n_vars"]:
    """Return up to MAX_WINDOWS windows from all over the recordings of the train patients.

    Raises UserError if the recordings do not have the encoder's channels or cannot be used.
    """
    spec = encoder.spec
    n_heads = encoder.architecture.n_heads
    description = read_description(recordings_folder(Path(root_path)))
    check_recordings(spec, description, allow_mismatch=True)
    windows = open_windows(root_path, "train", 42, spec.seq_len, spec.reserved_samples, spec.n_vars)
    scores = spec.n_vars * n_heads * spec.tokens.n_tokens**2
    count = min(max(MAX_SCORES // scores, 1), MAX_WINDOWS, len(windows))
    if count == 0:
        raise UserError(f"no recording in {root_path} is as long as a window of the encoder")
    x = windows.read_at(np.linspace(0, len(windows) - 1, count).astype(np.int64))
    if not np.isfinite(x).all():
        raise UserError(f"recordings in {root_path} contain NaN or infinity")
    return x
