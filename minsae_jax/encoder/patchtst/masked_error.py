"""Pretraining error of the encoder with a layer's output replaced by substitutes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from minsae_jax.encoder import pure
from minsae_jax.encoder.base import Params, Substitutes
from minsae_jax.encoder.patchtst.architecture import Architecture
from minsae_jax.encoder.patchtst.model import PatchTST, patches
from minsae_jax.encoder.patchtst.pure import bind
from minsae_jax.parallel.mesh import map_members


def masked_errors(
    mesh: Mesh, a: Architecture, layer: int, revin: bool, substitutes: Substitutes
) -> Callable[[Any, Any, Any], Float[Array, "B variants"]]:
    """Return the jitted (params, substitutes' params, (windows, masks)) -> error of every window.

    Masked patches of a window are set to 0, as in pretraining. The layer's output for each channel
    is replaced by each of its substitutes, then the remaining layers and the pretrain head run. The
    error is the mean over masked patches, channels and samples of (output - patch)²; both are
    normalised like the encoder's input.
    """

    def window_errors(params: Params, x: Array, mask: Array, substitute: pure.Substitute) -> Array:
        return _window_errors(bind(a, params), x, mask, layer, revin, substitute)

    return pure.masked_errors(mesh, window_errors, substitutes)


def _window_errors(
    model: PatchTST,
    x: Float[Array, "time n_vars"],
    mask: Bool[Array, " n_patches"],
    layer: int,
    revin: bool,
    substitute: Callable[[Array], Array],
) -> Float[Array, " variants"]:
    """Return the error of one window for every variant, averaged over channels."""
    a = model.architecture
    normalized = model.revin(x[None]) if revin else x[None]
    target = patches(a, normalized)  # [1, n_patches, n_vars, patch_len]
    embedded = model.embed(jnp.where(mask[None, :, None, None], 0, target))[0]

    def channel_errors(
        z: Float[Array, "T d_model"], target: Float[Array, "n_patches patch_len"]
    ) -> Float[Array, " variants"]:
        # Once per channel: all substitutes have these layers in common.
        hidden, queries_keys = model.run_from(z[None], 0, layer + 1)

        def error(tokens: Float[Array, "T d_model"]) -> Float[Array, ""]:
            # Queries and keys of the earlier layers are those of the original activations: only
            # the residual stream is replaced.
            last, _ = model.run_from(tokens[None], layer + 1, a.n_layers, queries_keys)
            output = model.head(last[None])[0, :, 0]  # the head of a model with one channel
            squared = jnp.square(output - target).mean(1)
            return jnp.where(mask, squared, 0).sum() / mask.sum(dtype=jnp.float32)

        # One variant after the other, so that memory does not grow with their number.
        return jax.lax.map(error, substitute(hidden[0]))

    return map_members(channel_errors, embedded, target[0].swapaxes(0, 1)).mean(0)
