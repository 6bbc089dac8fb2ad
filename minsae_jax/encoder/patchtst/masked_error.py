"""PatchTST with a layer's output replaced by substitutes: its output and pretraining error."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from minsae_jax.encoder.base import Downstream
from minsae_jax.encoder.masked_error import Substitute, map_variants
from minsae_jax.encoder.patchtst.model import PatchTST, patches
from minsae_jax.parallel.mesh import map_first_axis


def downstream(
    model: PatchTST,
    x: Float[Array, "seq_len n_vars"],
    substitute: Substitute,
    layer: int,
) -> Downstream:
    """Return the outputs for one window.

    With RevIN, patches are reconstructed in the unit of the normalised windows.
    """
    a = model.architecture

    def finish(last: Float[Array, "1 T d_model"]) -> tuple[Array, Array | None]:
        if a.head_type != "pretrain":
            return last[0], None
        return last[0], _reconstruct(model, last)

    def run_channel(z: Float[Array, "T d_model"]) -> tuple[Array, Any]:
        return map_variants(model, z[None], layer, substitute, finish)

    embedded = model.embed(patches(a, model.normalized(x[None])))[0]
    hidden, outputs = map_first_axis(run_channel, embedded)
    # Variants before channels.
    last, reconstructed = jax.tree.map(lambda array: array.swapaxes(0, 1), outputs)
    return Downstream(hidden, last, reconstructed)


def window_errors(
    model: PatchTST,
    x: Float[Array, "seq_len n_vars"],
    mask: Bool[Array, " n_patches"],
    substitute: Substitute,
    layer: int,
) -> Float[Array, " variants"]:
    """Return the error of one window for every variant.

    Masked patches are set to 0, as in pretraining, in all channels alike. The layer's output for
    each channel is replaced by each of its substitutes, then the remaining layers and the pretrain
    head run. The error is the mean over masked patches, channels and samples of (output - patch)²;
    both are normalised like the encoder's input.
    """
    # [1, n_patches, n_vars, patch_len]
    target = patches(model.architecture, model.normalized(x[None]))
    embedded = model.embed(jnp.where(mask[None, :, None, None], 0, target))[0]

    def channel_errors(
        z: Float[Array, "T d_model"], target: Float[Array, "n_patches patch_len"]
    ) -> Float[Array, " variants"]:
        def error(last: Float[Array, "1 T d_model"]) -> Float[Array, ""]:
            squared = jnp.square(_reconstruct(model, last) - target).mean(1)
            return jnp.where(mask, squared, 0).sum() / mask.sum(dtype=jnp.float32)

        _, errors = map_variants(model, z[None], layer, substitute, error)
        return errors

    return map_first_axis(channel_errors, embedded, target[0].swapaxes(0, 1)).mean(0)


def _reconstruct(
    model: PatchTST, last: Float[Array, "1 T d_model"]
) -> Float[Array, "n_patches patch_len"]:
    """Return the pretrain head's patches of one channel, as those of a model with one channel."""
    return model.head(last[None])[0, :, 0]
